"""compare_gradients without Lightning: numbers, budgets, and what it says."""

import re

import pytest
import torch
from torch import nn

from cosloss import functional, reference
from cosloss.gradient_check import compare_gradients
from cosloss.gradient_check.generators import Draw
from cosloss.gradient_check.nests import map_tensors, sample_rows, tensors_in
from cosloss.gradient_check.report import _spacing
from tests.callbacks import planted

LOSSES = {
    "nt_xent": lambda m: lambda a, b: m.nt_xent_loss(a, b, 0.2),
    "nt_xent_rows": lambda m: lambda a, b: m.nt_xent_loss(a, b, 0.2, "none"),
    "in_batch_cosine": lambda m: lambda a, b: m.cosine_embedding_loss(a, b, margin=0.05),
    "cosine_similarity": lambda m: m.cosine_similarity,
}


def views(rows=33, columns=17, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, columns, generator=generator)
    other = base + torch.randn(rows, columns, generator=generator)
    return (scale * base).to(dtype), (scale * other).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", LOSSES)
def test_right_gradients_are_within_budget(loss, dtype):
    for seed in range(8):
        pair = views(dtype=dtype, seed=seed)
        report = compare_gradients(LOSSES[loss](functional), LOSSES[loss](reference), *pair)
        assert report, report


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", ["nt_xent", "nt_xent_rows", "cosine_similarity"])
def test_right_gradients_are_within_budget_under_autocast(loss, dtype):
    for seed in range(8):
        with torch.autocast("cpu", dtype):
            report = compare_gradients(
                LOSSES[loss](functional), LOSSES[loss](reference), *views(seed=seed)
            )
        assert report, report


def test_a_hinge_that_falls_to_the_other_side_is_excused():
    # similarities on the margin itself: float32 and float64 take different sides
    x, y = views(64, 16)
    x[1::2] = x[::2]
    fn = LOSSES["in_batch_cosine"]
    margin = torch.nn.functional.cosine_similarity(x[:1].double(), y[:1].double()).item()

    def loss(module):
        return lambda a, b: module.cosine_embedding_loss(a, b, margin=margin, reduction="sum")

    assert compare_gradients(loss(functional), loss(reference), x, y)
    assert compare_gradients(fn(functional), fn(reference), x, y)


@pytest.mark.parametrize("rule", planted.WRONG, ids=lambda rule: rule.__name__)
def test_wrong_gradients_are_beyond_budget(rule):
    loss = planted.PlantedLoss(rule)
    assert not compare_gradients(loss, loss.reference(), *views())
    assert compare_gradients(planted.PlantedLoss(planted.right), loss._twin, *views()) or (
        rule is planted.eps_branch
    )


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (planted.doubled, "2 times the right one"),
        (planted.negated, "-1 times"),
        (planted.zero, "it is zero"),
        (planted.one_row, "1 of 33 rows are wrong, first row 32"),
        (planted.one_entry, "1 of 33 rows are wrong, first row 0"),
        (planted.swapped, "its direction is wrong"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_diagnosis(rule, words):
    loss = planted.PlantedLoss(rule)
    assert words in compare_gradients(loss, loss.reference(), *views()).reason


def test_numbers_by_hand(monkeypatch):
    monkeypatch.setattr(Draw, "cotangent", lambda _, output: torch.full_like(output, 0.375))
    x = torch.tensor([[3.0, 4.0], [6.0, 8.0]])

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.tensor([[1.0, 1.0], [1.0, 2.0]])

    found = compare_gradients(Off.apply, torch.sum, x).inputs["0"]
    # the truth is 0.375 everywhere: norm 0.75, and one entry off by 0.375
    assert found.relative == found.analytic_vs_float64 == pytest.approx(0.5)
    assert found.autograd_vs_float64 == 0
    assert found.max_abs == pytest.approx(0.375)
    assert found.ulp_p50 == 0
    assert found.ulp_p99 == pytest.approx(0.375 / (2**-2 * 2**-23))
    cosine = (3 + 2) / (7**0.5 * 2)
    assert found.cosine_distance == pytest.approx(1 - cosine)
    torch.testing.assert_close(
        found.row_error, torch.tensor([0.0, 0.375 / (0.375 * 2**0.5)]).double()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_spacing_is_the_distance_to_the_next_number(dtype):
    values = torch.tensor([1.0, 1.5, 0.1, 300.0, 2.0**-14, 1e-8, 0.0], dtype=dtype)
    up = torch.nextafter(values, torch.full_like(values, torch.inf)).double() - values.double()
    torch.testing.assert_close(_spacing(values.double(), dtype), up, rtol=0, atol=0)


def test_without_a_twin_rounding_shows_and_inputs_have_names():
    class Coarse(nn.Module):
        def forward(self, first, rest, scale):
            coarse = first.bfloat16() if first.dtype == torch.float32 else first
            return (coarse * rest["second"] * scale).sum()

    x, y = views()
    report = compare_gradients(Coarse(), None, x, {"second": y}, scale=2)
    assert list(report.inputs) == ["first", "rest.second"]
    assert [found.passed for found in report.inputs.values()] == [False, False]
    assert max(found.analytic_vs_float64 for found in report.inputs.values()) < 2**-8


def test_only_inputs_that_require_a_gradient_are_judged():
    x, y = views()
    report = compare_gradients(torch.dot, torch.dot, x[0].requires_grad_(), y[0])
    assert list(report.inputs) == ["0"]
    assert x.grad is None
    with pytest.raises(ValueError, match="floating-point"):
        compare_gradients(torch.sum, None, torch.ones(2, dtype=torch.long))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_never_pass(bad):
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.tensor([1.0, bad, 1.0])

    report = compare_gradients(Bad.apply, torch.sum, torch.ones(3))
    assert not report
    assert "NaN or inf in 1 of 3 rows" in report.reason
    assert not compare_gradients(torch.sum, lambda x: x.sum() * bad, torch.ones(3))


def test_random_state_and_graph_are_left_alone():
    x, y = (z.requires_grad_() for z in views())
    before = torch.get_rng_state()
    compare_gradients(functional.nt_xent_loss, reference.nt_xent_loss, x, y)
    assert torch.equal(before, torch.get_rng_state())
    assert x.grad is None
    with torch.inference_mode():
        assert compare_gradients(functional.nt_xent_loss, reference.nt_xent_loss, x, y)
    with torch.no_grad():
        assert compare_gradients(functional.nt_xent_loss, reference.nt_xent_loss, x, y)


def test_sampling_keeps_rows_together():
    def sampled(rows=3, **inputs):
        return sample_rows({"args": inputs}, ["args.z"], rows, Draw(4))["args"]

    z, y = torch.arange(20.0).reshape(10, 2), torch.arange(10)
    few = sampled(z=z, y=y, ids=list(range(10)))
    assert few["y"].tolist() == few["ids"] == (few["z"][:, 0] / 2).tolist()
    assert few["ids"] == sorted(few["ids"])
    assert len(few["y"]) == 3
    assert len(sampled(rows=10, z=z)["z"]) == 10


@pytest.mark.parametrize("other", [torch.ones(30, 2), [1, 2], {"y": torch.arange(4)}])
def test_what_may_not_be_one_batch_is_not_sampled(other):
    inputs = {"args": {"z": torch.ones(10, 2), "other": other}}
    assert sample_rows(inputs, ["args.z"], 3, Draw(0)) is inputs


def test_nests_keep_their_types():
    from collections import OrderedDict, namedtuple

    pair = namedtuple("pair", "a b")
    nest = OrderedDict(p=pair(torch.ones(1), [torch.ones(1), "text"]))
    changed = map_tensors(lambda name, t: t + 1, nest)
    assert isinstance(changed, OrderedDict)
    assert isinstance(changed["p"], pair)
    assert changed["p"].b[1] == "text"
    assert list(tensors_in(changed)) == ["p.0", "p.1.0"]


def test_a_failure_names_the_worst_entries():
    def one_off(x):
        y = x.square()
        y.register_hook(
            lambda grad: grad.index_put((torch.tensor(3), torch.tensor(1)), grad[3, 1] + 9)
        )
        return y

    x = torch.ones(4, 2)
    report = compare_gradients(one_off, torch.square, x)
    worst = report.inputs["x"].worst
    ours, expected = re.match(r"\[3, 1\] is (\S+), expected (\S+);", worst).groups()
    assert float(ours) - float(expected) == 18
    assert "Worst entries of x: [3, 1] is" in str(report)
