"""GradientWatch in a plain loop: verdicts, counts, targets; and what a cotangent must see."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cosloss.gradient_check import compare_gradients
from cosloss.watch import GradientError, GradientWatch
from cosloss.watch.checks import Differences, Discrepancy


class WithoutMean(torch.autograd.Function):
    """A layer norm whose backward forgets its mean term."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.layer_norm(x, x.shape[-1:])

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        y = centred / deviation
        return (grad - y * (grad * y).mean(-1, keepdim=True)) / deviation


class Norm(nn.Module):
    def forward(self, x):
        return WithoutMean.apply(x)

    def reference(self):
        return lambda x: F.layer_norm(x, x.shape[-1:])


class Fussy(nn.Module):
    def forward(self, x):
        assert x.dtype == torch.float32, "float32 only"
        return x.tanh()


def step(watch, model, rows=6):
    with watch.step():
        model(torch.randn(rows, 8)).sin().sum().backward()


@pytest.mark.parametrize("width", [8, 16, 64])
def test_a_missing_mean_term_is_seen(width):
    norm = Norm()
    assert not compare_gradients(norm, norm.reference(), torch.randn(8, width))


def test_a_wrong_layer_raises_and_a_right_one_counts():
    model = nn.Sequential(nn.Linear(8, 8), Norm(), nn.Tanh())
    right, wrong = GradientWatch(model, "2", 2), GradientWatch(model, "1", 2, "raise")
    for _ in range(3):
        step(right, model)
    assert (right.checks_run, right.checks_failed, right.steps_seen) == (2, 0, 3)
    with pytest.raises(GradientError, match="`1`"):
        step(wrong, model)
    wrong.close()
    assert not model[1]._forward_hooks


def test_what_cannot_be_checked_is_said_once_and_counted():
    model = nn.Sequential(nn.Linear(8, 8), Fussy())
    watch = GradientWatch(model, "1", 1, "raise")
    with pytest.warns(UserWarning, match="AssertionError: float32 only"):
        step(watch, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(watch, model)
        step(watch, model)
    assert (watch.checks_run, watch.checks_skipped) == (0, 3)
    assert "float32 only" in watch.summary()
    assert [c["verdict"] for c in json.loads(watch.report())["checks"]] == ["not checked"] * 3


@pytest.mark.parametrize("factor", [1.0, 0.9])
def test_what_refuses_float64_is_differenced_in_float32(factor):
    class Tanh(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            assert x.dtype == torch.float32, "float32 only"
            ctx.save_for_backward(x)
            return x.tanh()

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return factor * grad / x.cosh().square()

    class Kernel(nn.Module):
        def forward(self, x):
            return Tanh.apply(x)

    model = nn.Sequential(nn.Linear(8, 8), Kernel())
    watch = GradientWatch(model, "1", 1, check=Differences())
    for _ in range(5):
        with warnings.catch_warnings():
            warnings.simplefilter("error" if factor == 1 else "ignore")
            step(watch, model)
    assert (watch.checks_run, watch.checks_skipped) == (5, 0)
    assert watch.checks_failed == (0 if factor == 1 else 5)


def test_the_summary_names_the_lines_that_stop_gradients():
    class Focal(nn.Module):
        def forward(self, x):
            return (x.detach().sigmoid() * x.square()).sum(-1)

    line = Focal.forward.__code__.co_firstlineno + 1
    model = nn.Sequential(nn.Linear(8, 8), Focal())
    watch = GradientWatch(model, "1", 1, "raise", check=Differences())
    step(watch, model)
    assert (watch.checks_run, watch.checks_failed) == (1, 0)
    assert f"constant what is made at test_gradient_watch.py:{line}" in watch.summary()


@pytest.mark.parametrize(
    "target",
    ["*.act", nn.Tanh, ["a.act", "b.act"], ["*.act"], [nn.Tanh], ["a.a?t", nn.Tanh], "modules"],
    ids=str,
)
def test_many_modules_take_turns(target):
    def block():
        return nn.Sequential()

    model = nn.Module()
    model.a, model.b = block(), block()
    for part in (model.a, model.b):
        part.add_module("lin", nn.Linear(8, 8))
        part.add_module("act", nn.Tanh())
    model.forward = lambda x: model.b(model.a(x))
    target = [model.a.act, model.b.act] if target == "modules" else target
    logged = []
    watch = GradientWatch(model, target, 1, log=lambda *scalar: logged.append(scalar))
    for _ in range(4):
        step(watch, model)
    seen = [c["module"] for c in json.loads(watch.report())["checks"]]
    assert seen == ["a.act", "b.act"] * 2
    assert ("gradient_discrepancy/b.act/input/relative" in {tag for tag, _, _ in logged}) or (
        "gradient_discrepancy/b.act/0/relative" in {tag for tag, _, _ in logged}
    )


def test_a_dict_names_what_a_pattern_finds():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Tanh())
    watch = GradientWatch(model, {"act": nn.Tanh, "first": "0"}, 1)
    step(watch, model)
    seen = {c["module"] for c in json.loads(watch.report())["checks"]}
    assert seen == {"act.1", "act.2", "first"}


def test_what_no_list_can_hold_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    with pytest.raises(ValueError, match="custom"):
        GradientWatch(model, ["1", "custom"])
    with pytest.raises(ValueError, match=r"no module that is blocks\.\*"):
        GradientWatch(model, ["1", "blocks.*"])


def test_the_first_layer_is_judged_by_its_parameters():
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x)
            return x @ w

        @staticmethod
        def backward(ctx, grad):
            return None, 0.5 * ctx.saved_tensors[0].T @ grad

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 4))

        def forward(self, x):
            return Halved.apply(x, self.w)

        def reference(self):
            return lambda x: x @ self.w

    model = nn.Sequential(First())
    with pytest.raises(GradientError, match=r"self\.w: .*0\.5 times"):
        step(GradientWatch(model, "0", 1, "raise"), model)


def test_it_imports_torch_alone():
    code = "import sys, cosloss.watch; print({'lightning', 'hydra', 'triton'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


class ClosedOver(torch.nn.Module):
    """A module whose forward is a function that reaches its live parameters past any copy."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))
        self.forward = lambda x: x * self.scale


def test_a_closure_over_the_module_is_not_checked_and_not_wrong():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), ClosedOver())
    watch = GradientWatch(model, target="1", every=1)
    with pytest.warns(UserWarning, match="closure over the module itself"), watch.step():
        model(torch.randn(3, 4)).sum().backward()
    assert (watch.checks_run, watch.checks_failed, watch.checks_skipped) == (0, 0, 1)


class Detour(torch.autograd.Function):
    """The gradient that `detached` lacks, times a factor."""

    @staticmethod
    def forward(ctx, x, detached, factor):
        ctx.factor = factor
        return x + detached

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.factor * grad, None, None


@pytest.mark.parametrize(("factor", "right"), [(1.0, True), (1.03, False)])
def test_a_value_detached_on_the_way_to_a_whole_gradient(factor, right):
    from cosloss.gradient_check import check_finite_differences

    x = torch.randn(4, 3, dtype=torch.float64)
    report = check_finite_differences(lambda x: Detour.apply(x, x.detach(), factor), x)
    assert bool(report) is right, report


class _Averaged(torch.nn.Module):
    """A loss against a moving average of its own; `wrong` doubles the gradient."""

    def __init__(self, keeps, wrong):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.keeps, self.wrong = keeps, wrong

    def forward(self, x):
        loss = (x - self.mean).square().mean()
        if self.keeps:
            with torch.no_grad():
                self.mean += 0.5 * (x.mean(0) + 1)
        return 2 * loss - loss.detach() if self.wrong else loss


@pytest.mark.parametrize(("keeps", "wrong"), [(True, False), (False, True)])
def test_a_twin_without_the_functions_state_shows_nothing(keeps, wrong):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), _Averaged(keeps, wrong))
    watch = GradientWatch(model, "1", 1, twin=lambda x: x.square().mean())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            with watch.step():
                model(torch.randn(8, 4)).backward()
    assert watch.checks_failed == (3 if wrong else 0), watch.summary()
    assert watch.checks_skipped == (2 if keeps else 0), watch.summary()


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("check", [Discrepancy, Differences])
def test_a_gradient_that_is_asked_for_alone_is_judged_alone(check, wrong):
    model = nn.Sequential(nn.Linear(8, 8), Norm() if wrong else nn.LayerNorm(8), nn.Linear(8, 8))
    watches = [GradientWatch(model, name, 1, check=check()) for name in ("1", "2")]
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if wrong else "error")
            with watches[0].step(), watches[1].step():
                out = model(torch.randn(6, 8)).sin().sum()
                torch.autograd.grad(out, [model[0].weight, model[2].bias])
    assert [w.checks_run for w in watches] == [2, 2]
    assert [w.checks_failed for w in watches] == [2 * wrong, 0]


def test_many_compiled_modules_are_watched_without_a_word(caplog):
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6)))
    watch = GradientWatch(model, "*.1", 1, "raise")
    compiled = torch.compile(model, backend="eager")
    for _ in range(8):
        with watch.step():
            compiled(torch.randn(6, 8)).sin().sum().backward()
    assert watch.checks_run == 8
    assert "recompile_limit" not in caplog.text


@pytest.mark.parametrize("wrong", [False, True])
def test_an_argument_that_is_handed_through_is_no_output(wrong):
    class Pyramid(nn.Module):
        def forward(self, x):
            return [x, Norm()(x) if wrong else x.exp()]

    encoder, pyramid = nn.Linear(8, 8), Pyramid()
    twin = (lambda x: [x, F.layer_norm(x, x.shape[-1:])]) if wrong else None
    watch = GradientWatch(nn.Sequential(encoder, pyramid), "1", 1, twin=twin)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if wrong else "error")
        with watch.step():
            same, made = pyramid(encoder(torch.randn(5, 8)))
            (same.sin().sum() + made.sin().sum()).backward()
    assert (watch.checks_run, watch.checks_failed) == (1, int(wrong)), watch.summary()


@pytest.mark.parametrize("check", [Discrepancy, Differences])
def test_a_call_that_returns_nan_is_not_accused(check):
    model = nn.Sequential(nn.Linear(8, 8), nn.Identity(), nn.Linear(8, 8))
    model[1].forward = lambda x: x.pow(0.6)
    watch = GradientWatch(model, "1", 1, check=check())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with watch.step():
            model(torch.randn(6, 8)).nansum().backward()
    assert (watch.checks_failed, watch.checks_skipped) == (0, 1), watch.summary()
