"""The in-batch kernels against the table's budgets, the twin in float64, and any shape of tiles."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from cosloss import functional, reference
from cosloss.kernels.eager import in_batch as eager
from cosloss.kernels.triton import (
    block_shapes,
    card,
    in_batch,
    in_batch_grads,
    sources,
    tile,
    tuning,
    unit_rows,
)
from cosloss.problem import Mask, PositiveMask, Problem
from cosloss.testing import errors
from cosloss.testing.contrastive import OPS
from cosloss.testing.op import Op
from tests.kernels.triton.engine import (
    CRITERIA,
    assert_gradients,
    problem,
    single,
    use_shapes,
    vectors,
)
from tests.losses import LOSSES, inputs, leaves
from tests.slow import slow

pytestmark = [
    pytest.mark.usefixtures("triton_backend"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, in the interpreter
]


NO_LAUNCHES = {
    f"aten::{name}"
    for name in (
        *("empty", "empty_like", "empty_strided", "new_empty", "slice", "as_strided", "chunk"),
        *("split", "narrow", "select", "detach", "detach_", "alias", "to", "promote_types"),
        "fill_",  # the tests' own, of memory that is not written yet
    )
}


@pytest.fixture
def calls(monkeypatch):
    """The names of the engine's functions that were called."""
    names = []

    def note(name):
        function = getattr(in_batch, name)

        def noted(*arguments, **keywords):
            names.append("forward" if "forward" in name else "backward")
            return function(*arguments, **keywords)

        monkeypatch.setattr(in_batch, name, noted)

    for name in ("forward", "backward", "input_grads", "forward_folded", "input_grads_folded"):
        note(name)
    return names


# to the kernels float16 differs from bfloat16 in the scale of its gradients alone
SCALED = [op for op in OPS if "," not in op.name]


@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        (OPS[0], torch.float32),
        *slow((OPS[0], torch.bfloat16)),
        *slow(*((op, kind) for op in OPS[1:] for kind in (torch.float32, torch.bfloat16))),
        *slow(*((op, torch.float16) for op in SCALED)),
    ],
    ids=lambda value: value.name if isinstance(value, Op) else str(value),
)
def test_every_sample_keeps_its_budget(op, dtype, calls, monkeypatch):
    use_shapes(monkeypatch, whole=True)  # in parts, 4099 columns take a minute
    budget = op.budget(dtype)
    for sample in (*op.generic(), *op.hard(dtype)):
        found = errors(op.function, op.twin, sample, dtype)
        assert found.within(budget), (sample.name, found, budget)
    assert set(calls) == {"forward", "backward"}


@pytest.mark.parametrize(("rows", "chunks"), [(1, 3), (33, 1), (48, 2), (70, 3), (70, 32)])
@pytest.mark.parametrize("kind", CRITERIA)
@pytest.mark.parametrize("columns", [None, 7, 40], ids=["symmetric", "7", "40"])
def test_totals_whatever_the_tiles(kind, columns, rows, chunks, monkeypatch):
    monkeypatch.setattr(in_batch, "CHUNKS", chunks)
    r, c = problem(rows, columns)
    matrix = Problem(CRITERIA[kind], Mask((0, 3, -3)), True)
    found = in_batch.forward(*single(r, c), None, matrix)
    exact = eager.forward(r, c, None, matrix)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("whole", "processors"), [(True, 40), (False, 1)], ids=["whole, dealt out", "in parts"]
)
@pytest.mark.parametrize("kind", CRITERIA)
@pytest.mark.parametrize("columns", [None, *slow(60)], ids=["symmetric", "two-way"])
def test_gradient_whatever_the_tiles(kind, columns, whole, processors, monkeypatch):
    monkeypatch.setattr(card, "INTERPRETER", card.INTERPRETER._replace(processors=processors))
    use_shapes(monkeypatch, whole)
    r, c = problem(41, columns, 37)
    matrix = Problem(CRITERIA[kind], Mask((0, 3, -3)), True)
    assert_gradients(r, c, None, matrix, (True, c is not None, False))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("learnt", [False, True], ids=["fixed", "learnt"])
@pytest.mark.parametrize("loss", ["nt_xent", "sigmoid", *slow("queue", "hard", "sup_con")])
@pytest.mark.parametrize("wanted", [[True, True], *slow([True, False], [False, True])], ids=str)
def test_the_way_on_to_the_embeddings(wanted, loss, learnt, splits, monkeypatch):
    monkeypatch.setattr(in_batch_grads, "_splits", lambda matrix: splits)
    in_memory = []
    reach = in_batch_grads.reach
    monkeypatch.setattr(
        in_batch_grads, "reach", lambda *given: in_memory.extend(given[0]) or reach(*given)
    )
    z1, z2, temperature = inputs(41, 37, torch.float32)
    z1[3], z2[5] = 0, 0
    if loss in ("nt_xent", "sigmoid"):  # the others multiply their rows, beyond float32
        z1[7] *= 8e37  # whose norm is beyond it
        z2[8] *= 1e-40

    def grads(module, dtype):
        given = [z1.to(dtype), z2.to(dtype), temperature.to(dtype)]
        for x, want in zip(given, (*wanted, learnt), strict=True):
            x.requires_grad_(want)
        of_loss = [*given[:2], given[2] if learnt else 0.3]
        value = LOSSES[loss](module, *of_loss)
        weight = torch.linspace(0.37e-4, 1.4e-4, value.numel(), dtype=dtype).view_as(value)
        return torch.autograd.grad(value, [x for x in given if x.requires_grad], weight)

    ours, exact = grads(functional, torch.float32), grads(reference, torch.float64)
    assert (splits > 1) == any(grad is not None for grad in in_memory)
    for found, true in zip(ours, exact, strict=True):
        size = true.abs() if true.ndim == 0 else true.abs().amax(1, keepdim=True)
        assert ((found - true).abs() <= 4e-6 * size.clamp_min(1e-38)).all()


@pytest.mark.parametrize("two_way", [True, False], ids=["two-way", "one-way"])
@pytest.mark.parametrize("kind", CRITERIA)
def test_groups_bias_and_one_way(kind, two_way):
    r, c = problem(35, 22)
    groups = Mask(groups=(torch.arange(35) % 6, torch.arange(22) % 5))
    bias = torch.tensor(-0.3, dtype=torch.float64)
    matrix = Problem(CRITERIA[kind], groups, two_way)
    for needs in ((True, True, True), (False, False, True), (False, True, False)):
        assert_gradients(r, c, bias, matrix, needs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [None, 22], ids=["symmetric", "two-way"])
@pytest.mark.parametrize("kind", ["exp", "logsumexp"])
def test_positives_have_weights_of_their_own(kind, columns, dtype):
    r, c = problem(35, columns)
    r, c = r.to(dtype), None if c is None else c.to(dtype)
    ids = torch.arange(35) % 3, torch.arange(columns or 35) % 3
    pairs = Mask((0,), tuple(x // 2 for x in ids), ids)
    positives = PositiveMask(*ids, torch.ones(35))
    matrix = Problem(CRITERIA[kind], pairs, True, positives=positives)
    wide_r, wide_c = r.double(), None if c is None else c.double()
    rounding = 1e-6 if dtype == torch.float32 else 1e-3
    needs = (True, c is not None, False)
    assert_gradients(wide_r, wide_c, None, matrix, needs, rounding, dtype=dtype)


@pytest.mark.parametrize(
    "labels", [(torch.arange(60) % 14)[::2], torch.arange(30) / 2 % 3], ids=str
)
def test_labels_strided_or_fractional(labels):
    z, ignore = vectors(30, 8).requires_grad_(), (torch.arange(60) % 6)[::2]
    for keywords in ({}, {"ignore": ignore}):
        values = [
            m.sup_con_loss(x, labels, **keywords)
            for m, x in ((functional, z.float()), (reference, z))
        ]
        ours, twin = (torch.autograd.grad(value, z)[0] for value in values)
        torch.testing.assert_close(ours, twin, rtol=1e-4, atol=1e-6)


def test_sup_con_on_tight_clusters_errs_no_more_than_the_twin():
    labels = torch.arange(60) % 4
    z = (vectors(4, 16)[labels] + 0.01 * vectors(60, 16, 1)).float()

    def gradient(module, dtype):
        leaf = z.to(dtype).requires_grad_()
        return torch.autograd.grad(module.sup_con_loss(leaf, labels), leaf)[0].double()

    exact = gradient(reference, torch.float64)
    ours, twin = (gradient(module, torch.float32) - exact for module in (functional, reference))
    assert ours.norm() <= 2 * twin.norm()


def test_a_row_without_pairs_has_total_and_gradient_zero():
    r, c = problem(20, 9)
    rows, columns = torch.arange(20) % 3, torch.zeros(9, dtype=torch.int64)
    for kind, loss in CRITERIA.items():
        matrix = Problem(loss, Mask(groups=(rows, columns)), False)
        total = in_batch.forward(*single(r, c), None, matrix)
        without = total[rows == 0]
        assert (without < -1e300).all() if "exp" in kind else (without == 0).all()
        asked = {"d_stat": torch.ones(20).double(), "stat": total, "needs": (True, False, False)}
        grad, _, _ = in_batch.backward(*single(r, c), None, matrix, **asked)
        assert (grad[rows == 0] == 0).all()
        assert (grad[rows == 1].abs().sum(1) > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, *slow(torch.float16)], ids=str)
@pytest.mark.parametrize("kind", CRITERIA)
def test_half_precision_products_are_those_of_the_rounded_vectors(kind, dtype):
    r, c = problem(70, 33)
    r, c = r.to(dtype), c.to(dtype)
    matrix = Problem(CRITERIA[kind], Mask((0,)), True)
    found = in_batch.forward(r, c, None, matrix)
    exact = eager.forward(r.double(), c.double(), None, matrix)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=2e-6)
    # weights are rounded to the dtype for the second product, and nothing else is
    rounding = torch.finfo(dtype).eps / 2
    needs = (True, True, False)
    assert_gradients(r.double(), c.double(), None, matrix, needs, rounding, dtype=dtype)


@pytest.fixture
def bands(monkeypatch):
    """The rows' numbers at which bands begin, of gradients that are taken from bands."""
    monkeypatch.setattr(block_shapes, "in_bands", lambda rows: rows.dtype != torch.float32)
    monkeypatch.setattr(in_batch_grads, "BAND_ROWS", 16)
    monkeypatch.setattr(in_batch_grads, "BAND_BYTES", 1)
    begun = []

    def noted(kernel, *given, **named):
        begun.extend([named["first"]] if "band" in named else [])
        launch_fastest(kernel, *given, **named)

    launch_fastest = in_batch_grads.launch_fastest
    monkeypatch.setattr(in_batch_grads, "launch_fastest", noted)
    return begun


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", CRITERIA)
def test_gradients_from_bands(kind, dtype, bands):
    rounding = torch.finfo(dtype).eps / 2
    for columns, mask in ((None, Mask((0, 3, -3))), (33, Mask((0,)))):
        r, c = problem(40, columns)
        r, c = (None if x is None else x.to(dtype).double() for x in (r, c))
        bias = None if columns is None else torch.tensor(-0.3, dtype=torch.float64)
        matrix = Problem(CRITERIA[kind], mask, True)
        needs = (True, c is not None, bias is not None)
        assert_gradients(r, c, bias, matrix, needs, rounding, dtype=dtype)
    assert bands == [0, 16, 32] * 2 + [0, 16, 32]


def test_positives_from_bands(bands):
    r = problem(40, None)[0].bfloat16().double()
    ids = torch.arange(40) % 3
    pairs = Mask((0,), (ids // 2, ids // 2), (ids, ids))
    matrix = Problem(
        CRITERIA["logsumexp"], pairs, True, positives=PositiveMask(ids, ids, torch.ones(40))
    )
    assert_gradients(r, None, None, matrix, (True, False, False), 4e-3, dtype=torch.bfloat16)
    assert bands == [0, 16, 32]


def test_embeddings_from_bands(bands):
    z1, z2, temperature = leaves(41, 37, torch.bfloat16)
    ours = functional.nt_xent_loss(z1, z2, temperature)
    found = torch.autograd.grad(ours, (z1, z2, temperature))
    wide = [x.detach().double().requires_grad_() for x in (z1, z2, temperature)]
    exact = torch.autograd.grad(reference.nt_xent_loss(*wide), wide)
    assert bands == [*range(0, 82, 16)]
    for own, true in zip(found, exact, strict=True):
        assert (own - true).abs().max() <= 0.02 * true.abs().max()


def test_which_gradients_are_from_bands():
    assert torch.are_deterministic_algorithms_enabled()  # as these tests are
    wide = torch.zeros(3, 512, dtype=torch.bfloat16)
    assert not block_shapes.in_bands(wide)
    torch.use_deterministic_algorithms(False)
    assert block_shapes.in_bands(wide)
    assert block_shapes.in_bands(wide.half())
    assert not block_shapes.in_bands(wide.float())
    assert not block_shapes.in_bands(wide[:, 1:])


def test_float16_weights_far_below_its_range():
    r, c = problem(40, 30)
    matrix = Problem(CRITERIA["exp"], Mask(()), True)
    r, c = r.half().double(), c.half().double()
    needs = (True, True, False)
    assert_gradients(r, c, None, matrix, needs, 5e-4, scale=1e-9, dtype=torch.float16)


def test_tf32_only_where_torch_allows_it():
    assert tile.precision(torch.float32) == "tf32x3"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert tile.precision(torch.float32) == "tf32"
        # what no switch changes is not compiled again
        assert {tile.precision(dtype) for dtype in (torch.bfloat16, torch.float16)} == {"ieee"}
        z1, z2 = (vectors(20, 9, seed).float() for seed in (0, 1))
        exact = reference.nt_xent_loss(z1.double(), z2.double(), 0.1).float()
        rough = functional.nt_xent_loss(z1, z2, 0.1)
    finally:
        torch.set_float32_matmul_precision(before)
    fine = functional.nt_xent_loss(z1, z2, 0.1)
    assert (fine - exact).abs() < 1e-6 < (rough - exact).abs()


@pytest.mark.parametrize(
    "change",
    [lambda g: 2 * g, lambda g: -g, lambda g: g.flip(0), lambda g: g + 1e-4 * g.abs().mean()],
    ids=["doubled", "negated", "swapped rows", "one in ten thousand off"],
)
def test_the_judge_catches_a_wrong_gradient(change, monkeypatch):
    right = in_batch.backward
    monkeypatch.setattr(
        in_batch, "backward", lambda *a, **k: (change(right(*a, **k)[0]), None, None)
    )
    r, _ = problem(20, None)
    matrix = Problem(CRITERIA["exp"], Mask((0,)), True)
    with pytest.raises(AssertionError):
        assert_gradients(r, None, None, matrix, (True, False, False))


BACKWARD = ["in_batch_bwd_kernel"]


@pytest.mark.parametrize(
    ("loss", "rows", "processors", "backward"),
    [
        # the columns of a small batch are dealt out to programs whose sums are added up
        ("nt_xent_loss", 256, 132, [*BACKWARD, "unit_rows_bwd_kernel"]),
        ("nt_xent_loss", 256, 1, BACKWARD),
        ("info_nce_loss", 256, 1, [*BACKWARD, *BACKWARD]),
    ],
)
def test_a_step_is_six_launches_at_most(loss, rows, processors, backward, monkeypatch):
    monkeypatch.setattr(card, "INTERPRETER", card.INTERPRETER._replace(processors=processors))
    launched = []
    for module in (in_batch, sources, tuning, unit_rows):
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: launched.append(kernel))
    z1, z2 = (vectors(rows, 20, seed).float().requires_grad_() for seed in (0, 1))
    one = torch.tensor(1.0)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        getattr(functional, loss)(z1, z2, 0.5).backward(one)
    sums = ["in_batch_fwd_kernel", "in_batch_stats_kernel", "in_batch_total_kernel"]
    names = [kernel.__name__ for kernel in launched]
    assert names == ["unit_rows_fwd_kernel", *sums, *backward]
    # of torch's operations, those that would launch nothing
    others = {event.name for event in profiler.events() if event.name.startswith("aten::")}
    assert others <= NO_LAUNCHES, others - NO_LAUNCHES
