"""Finite differences without Lightning: what they catch, excuse and say."""

import pytest
import torch
from torch.nn import functional as F

from cosloss import functional
from cosloss.gradient_check import (
    FiniteDifferences,
    check_finite_differences,
    compare_gradients,
)
from tests.callbacks import planted
from tests.gradient_check.test_compare import LOSSES, views


@pytest.mark.parametrize("loss", LOSSES)
def test_right_gradients_agree(loss):
    for seed in range(5):
        report = check_finite_differences(LOSSES[loss](functional), *views(8, seed=seed), seed=seed)
        assert report, report
        assert report.max_rel_error < 1e-6
        assert not report.degenerate


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_large_and_small_rows_are_judged_as_well(scale):
    pair = views(8, scale=scale)
    assert check_finite_differences(functional.nt_xent_loss, *pair)
    report = check_finite_differences(planted.PlantedLoss(planted.one_entry), *pair)
    assert not report, report


@pytest.mark.parametrize("rule", planted.WRONG, ids=lambda rule: rule.__name__)
def test_wrong_gradients_do_not(rule):
    report = check_finite_differences(planted.PlantedLoss(rule), *views(8))
    assert not report
    assert "finite differences" in report.reason


def test_collapsed_rows_are_degenerate_and_hide_nothing():
    row = torch.ones(8, 16)
    assert check_finite_differences(functional.nt_xent_loss, row, row).degenerate
    for rule in (planted.swapped, planted.negated, planted.zero, planted.million):
        report = check_finite_differences(planted.PlantedLoss(rule), row, row)
        assert report.degenerate
        assert not report
        assert "generic" in report.reason


def test_zero_rows_are_no_false_alarm():
    x, y = views(8)
    x[3] = 0
    assert check_finite_differences(functional.nt_xent_loss, x, y)
    assert check_finite_differences(functional.cosine_embedding_loss, x, y)


def test_a_kink_is_excused_and_a_fault_beside_it_is_not():
    x = torch.tensor([[0.0, 0.6, -0.8], [1.0, 0.0, 0.0]])
    assert check_finite_differences(lambda x: x.abs().sum(), x)
    assert check_finite_differences(lambda x: torch.relu(x).square().sum(), x)
    assert not check_finite_differences(
        lambda x: planted.Late.apply(x, {"step": 99}).abs().sum(), x
    )


@pytest.mark.parametrize(("factor", "right"), [(1.0, True), (0.97, False)])
def test_a_function_that_computes_in_float32(factor, right):
    class Float32(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.float().exp().mean().to(x.dtype)

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return factor * grad * (x.float().exp() / x.numel()).to(x.dtype)

    for seed in range(10):
        assert bool(check_finite_differences(Float32.apply, *views(8)[:1], seed=seed)) is right


@pytest.mark.parametrize("constant", [10.0, 1000.0])
@pytest.mark.parametrize(("factor", "right"), [(1.0, True), (0.5, False)])
def test_a_value_in_float32_beside_a_large_constant(constant, factor, right):
    def far(x):
        return (0.01 * _Multiplied.apply(x, factor).float()).sin().sum() + constant

    for seed in range(5):
        assert bool(check_finite_differences(far, views(8)[0], seed=seed)) is right


class _Multiplied(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.factor * grad, None


def test_a_function_that_refuses_every_dtype_is_not_checked():
    def fussy(x):
        raise TypeError(f"expected int8; got {x.dtype}")

    report = check_finite_differences(fussy, torch.ones(3))
    assert not report
    assert report.skipped
    assert "cannot run in float64: expected int8; got torch.float64" in report.reason


def test_log_probabilities_may_take_a_gradient_that_log_softmax_completes():
    # torch's ctc_loss is right behind a log_softmax alone, and by itself it is not
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 3, 7, generator=generator)
    targets = torch.randint(1, 7, (3, 4), generator=generator)
    lengths = torch.full((3,), 12), torch.full((3,), 4)
    ctc = torch.nn.CTCLoss()
    report = check_finite_differences(ctc, logits.log_softmax(-1), targets, *lengths)
    assert report.skipped, report
    assert "log_softmax" in report.reason
    report = check_finite_differences(
        lambda x: 1.1 * planted.Late.apply(x.log_softmax(-1), {"step": 99}).sum(), logits
    )
    assert not report
    assert not report.skipped


def test_log_probabilities_excuse_no_other_gradient():
    def wrong(x):
        return planted.Late.apply(x, {"step": 99})[..., 0].sum()

    report = check_finite_differences(wrong, torch.randn(5, 4).log_softmax(-1))
    assert not report
    assert not report.skipped


def test_forward_ad_and_second_order_are_options():
    class NoSecond(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.pow(3).sum()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return 3 * grad * ctx.saved_tensors[0].square()

    x = views(4)[0]
    assert check_finite_differences(NoSecond.apply, x)
    assert not check_finite_differences(NoSecond.apply, x, how=FiniteDifferences(forward_ad=True))
    assert not check_finite_differences(NoSecond.apply, x, how=FiniteDifferences(second_order=True))
    both = FiniteDifferences(forward_ad=True, second_order=True)
    assert check_finite_differences(torch.tanh, x, how=both)


def test_the_domain_of_the_inputs_is_kept():
    probability, target = torch.rand(6, 4) * 0.8 + 0.1, torch.rand(6, 4).round()
    loss = torch.nn.functional.binary_cross_entropy
    assert check_finite_differences(loss, probability.requires_grad_(), target)


def test_random_state_is_left_alone():
    before = torch.get_rng_state()
    check_finite_differences(torch.sin, torch.ones(3, 2))
    assert torch.equal(before, torch.get_rng_state())


class FreedAfterUse(torch.autograd.Function):
    """tanh, whose backward gives back the memory of what it saved."""

    @staticmethod
    def forward(ctx, x):
        ctx.kept = torch.tanh(x).detach()
        return ctx.kept.clone()

    @staticmethod
    def backward(ctx, grad):
        assert ctx.kept.untyped_storage().size(), "a second backward would read freed memory"
        found = grad * (1 - ctx.kept.square())
        ctx.kept.untyped_storage().resize_(0)
        return found


class ScaledInPlace(torch.autograd.Function):
    """A third of the square, whose backward scales what forward kept of it."""

    @staticmethod
    def forward(ctx, x):
        ctx.kept = 2 * x / 3
        return x.square() / 3

    @staticmethod
    def backward(ctx, grad):
        return ctx.kept.mul_(grad)


@pytest.mark.parametrize("function", [FreedAfterUse, ScaledInPlace])
def test_a_graph_that_serves_one_backward(function):
    x = torch.randn(4, 3, dtype=torch.float64)
    report = check_finite_differences(function.apply, x)
    assert report, report
    assert not report.skipped, report


class _DoublesInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return grad.mul_(2)


def test_a_backward_may_write_into_its_incoming_gradient():
    assert check_finite_differences(_DoublesInPlace.apply, views(3)[0])


def test_nan_in_the_input_is_no_verdict():
    x = views(8)[0]
    x[0, 0] = torch.nan
    report = check_finite_differences(torch.tanh, x)
    assert report.skipped, report
    assert "NaN" in report.reason


def test_a_gradient_that_is_right_with_stops_alone_names_their_lines():
    def focal(x):
        weight = x.detach().sigmoid()  # the first stop
        return (weight * x.square()).sum() + x.square().sum().item() * x.sum()

    file, first = focal.__code__.co_filename.rpartition("/")[2], focal.__code__.co_firstlineno
    report = check_finite_differences(focal, views(4)[0])
    assert report, report
    assert report.constants == (f"{file}:{first + 1}", f"{file}:{first + 2}")
    assert f"{file}:{first + 1}" in report.reason
    # a detached value that takes no gradient away is no condition
    report = check_finite_differences(
        lambda x: torch.exp(x - x.max().detach()).log().sum(), x := views(4)[0]
    )
    assert report
    assert check_finite_differences(lambda x: (x + x.detach().mul(0)).sum(), x).constants == ()


def test_what_is_stopped_in_some_calls_alone_shifts_nothing():
    calls = []

    def logs_at_times(x):
        calls.append(x)
        if len(calls) % 3 == 1:
            calls[-1] = x.mean().item(), x.detach()[0]
        scale = x.mean().detach()
        return (x.detach().sigmoid() * x.square()).sum() / scale.square() * 2 ** float(scale > 9)

    report = check_finite_differences(logs_at_times, views(4)[0] + 1)
    assert report, report


def clamped_in_place(x):
    y = x.clone()
    y.data.clamp_(min=0.0).mul_(2)
    return y.square().sum() + x.sum()


def clamped_without_gradient(x):
    y = x.clone()
    with torch.no_grad():
        y.clamp_(min=0.0).mul_(2)
        y[0] = 1.0
    return y.square().sum() + x.sum()


def nll_of_small_variances(x):
    # torch: "The clamping is ignored with respect to autograd"
    return F.gaussian_nll_loss(x, torch.zeros_like(x), 1e-7 * x.exp())


TOKENS = torch.tensor([[1, 0, 3], [2, 0, 0], [1, 1, 2], [3, 2, 0]])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.gumbel_softmax(x, hard=True) * x.shape[1],
        nll_of_small_variances,
        clamped_in_place,
        clamped_without_gradient,
        lambda x: F.embedding(TOKENS, x, padding_idx=0),
        lambda x: F.embedding(TOKENS, x, padding_idx=1) @ x.new_ones(x.shape[1], 2),
        lambda x: F.embedding(TOKENS, x * 1, max_norm=0.5).tanh(),
        torch.nn.Embedding(4, 8, padding_idx=0),
        torch.nn.Embedding(4, 8, max_norm=0.5),
    ],
    ids=lambda function: getattr(function, "__name__", type(function).__name__),
)
def test_stops_within_functions_of_torch_and_in_place_are_held(function):
    given = TOKENS if isinstance(function, torch.nn.Module) else views(4)[0]
    report = check_finite_differences(function, given)
    assert report, report
    assert len(report.constants) == 1 or function is clamped_without_gradient, report


def test_what_is_held_excuses_nothing_else():
    def half(x):
        y = x.clone()
        with torch.no_grad():
            y.mul_(3)
        return OffByTwo.apply(y).sum()

    assert not check_finite_differences(half, views(4)[0])
    assert not check_finite_differences(
        lambda x: OffByTwo.apply(F.embedding(TOKENS, x, padding_idx=0)), views(4)[0]
    )
    assert not check_finite_differences(
        lambda x: OffByTwo.apply(F.gumbel_softmax(x, hard=True)), views(4)[0]
    )


class OffByTwo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        return 4 * ctx.saved_tensors[0] * grad


DOMAINS = {
    "logdet": (lambda x: torch.logdet(x), torch.diag(torch.tensor([3.0, 2.0, 1.0]))),
    "cholesky": (
        lambda x: torch.linalg.cholesky((x + x.mT) / 2),
        torch.eye(3) + 0.5 * torch.ones(3, 3),
    ),
    "square root": (lambda x: (x - 0.4).sqrt(), torch.tensor([[0.9, 0.7, 0.5]])),
    "raises": (lambda x: x.exp() if x.max() < 1 else 1 / 0, torch.full((3, 4), 0.25)),
}


@pytest.mark.parametrize("name", DOMAINS)
def test_a_generic_point_outside_of_the_domain_is_no_failure(name):
    function, x = DOMAINS[name]
    for seed in range(5):
        report = check_finite_differences(function, x, seed=seed)
        assert report, report
        assert not check_finite_differences(lambda x: OffByTwo.apply(function(x)), x, seed=seed)


def test_infinite_outputs_are_left_out():
    def masked(x):
        return x.square().masked_fill(torch.eye(8, x.shape[1], dtype=torch.bool), -torch.inf)

    x = views(8)[0]
    assert check_finite_differences(masked, x)
    assert check_finite_differences(lambda x: masked(x).softmax(1), x)
    report = check_finite_differences(lambda x: masked(OffByTwo.apply(x)), x)
    assert not report
    assert not report.skipped


@pytest.mark.parametrize("function", [torch.log, lambda x: (x - x).log() + x], ids=["some", "all"])
def test_a_value_that_is_not_finite_is_no_verdict(function):
    x = views(8)[0]
    x[0, 0] = -1.0
    report = check_finite_differences(function, x)
    assert report.skipped, report
    assert "NaN" in report.reason


def test_a_gradient_that_is_nan_where_the_value_is_not_is_wrong():
    x = views(8)[0].abs()
    x[0, 0] = 0.0
    report = check_finite_differences(
        lambda x: torch.where(x > 0.0, x.sqrt(), 0.0), x, how=FiniteDifferences(unit_rows=False)
    )
    assert not report
    assert not report.skipped
    assert "NaN" in report.reason


COMPLEX = {
    "exp": torch.exp,
    "abs": lambda z: z.abs().log1p(),
    "product": lambda z: z @ z.mH,
    "real part": lambda z: z.real.exp() * z.imag,
}


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_inputs_alone(name):
    z = torch.complex(*views(6))
    assert check_finite_differences(COMPLEX[name], z)
    assert check_finite_differences(COMPLEX[name], z[0] if name != "product" else z)
    assert compare_gradients(COMPLEX[name], None, z)
    assert compare_gradients(COMPLEX[name], lambda z: COMPLEX[name](z * 1), z)
    assert not check_finite_differences(lambda z: OffByTwo.apply(COMPLEX[name](z)), z)
    wrong = compare_gradients(
        lambda z: OffByTwo.apply(COMPLEX[name](z)), lambda z: COMPLEX[name](z).square(), z
    )
    assert not wrong
