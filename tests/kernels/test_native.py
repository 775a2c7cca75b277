"""The compiled kernels agree with the formulas for every case, in every build and without one."""

import os
import subprocess
import sys

import pytest
import torch
import torch.utils.flop_counter

import cosloss
from cosloss import verify
from cosloss.kernels import dispatch, native
from cosloss.kernels import eager as eager_kernels
from cosloss.kernels.dispatch import wants_native
from cosloss.kernels.eager import cosine_similarity as every_case
from cosloss.kernels.eager import pairwise_cosine_similarity as pairwise
from cosloss.kernels.native import library

WITHOUT_LIBRARY = """
import ctypes
import torch


class Refused(ctypes.CDLL):
    def __init__(self, name, *rest, **more):
        if name and "cosloss" in name:
            raise OSError("undefined symbol: GOMP_parallel")
        super().__init__(name, *rest, **more)


ctypes.CDLL = Refused
import cosloss
z1, z2 = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
loss = cosloss.cosine_embedding_loss(z1, z2, torch.ones(4)) + cosloss.nt_xent_loss(z1, z2)
(loss + cosloss.pairwise_cosine_similarity(z1, z2).sum()).backward()
assert z1.grad.norm() > 0
"""
pytestmark = pytest.mark.skipif(
    library.loaded() is None,
    reason="the kernels are not compiled: test_dispatch.py says if to worry",
)
SPACING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7}


@pytest.fixture(params=library.usable())
def build(request, monkeypatch):
    """Each build that this CPU runs, in turn, as the one that is loaded."""
    monkeypatch.setattr(library, "usable", lambda: (request.param,))
    yield from forgotten()


@pytest.fixture
def no_build(monkeypatch):
    """An installation without a compiler."""
    monkeypatch.setattr(library, "usable", tuple)
    yield from forgotten()


def forgotten():
    library.loaded.cache_clear()
    library.function.cache_clear()
    yield
    library.loaded.cache_clear()
    library.function.cache_clear()


def test_they_are_there(build):
    assert library.loaded() is not None
    assert library.loaded()._name.count(f"_{library.usable()[0]}.") == 1


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("dtype", SPACING, ids=str)
@pytest.mark.parametrize("rows", [23, 4000], ids=["one thread", "threads"])
def test_row_wise_equals_the_formulas_for_every_case(build, rows, dtype, needs):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, rows, 13, generator=generator).to(dtype)
    x[3], y[5] = 0, 1e-9 * y[5]
    y[7], y[8], x[9], y[11] = 3 * x[7], -x[8], 1e25 * x[9], x[11] + 1e-4 * y[11]
    grad = torch.linspace(-0.37, 1.1, rows).to(dtype)
    grad[13], grad[14], grad[15] = 0, 1e-30, 1e25
    similarity, statistics = native.cosine_similarity.forward(x, y, 1e-8, distance=False)
    distance, _ = native.cosine_similarity.forward(x, y, 1e-8, distance=True)
    pairs = [
        (similarity, every_case.forward(x, y, 1e-8)),
        (distance, every_case.distance_forward(x, y, 1e-8)),
    ]
    ours = native.cosine_similarity.backward(grad, x, y, statistics, 1e-8, 1, needs)
    exact = every_case.backward(grad, x, y, 1e-8, needs)
    for ours_i, exact_i, side in zip(ours, exact, (x, y), strict=True):
        assert (ours_i is None) == (exact_i is None)
        if exact_i is not None:
            size = (grad.abs() / side.norm(dim=1).clamp_min(1e-8)).clamp_min(1e-37)[:, None]
            pairs.append((ours_i / size, exact_i / size))
    for ours_i, exact_i in pairs:
        torch.testing.assert_close(ours_i, exact_i, rtol=SPACING[dtype], atol=SPACING[dtype])


@pytest.mark.parametrize("size", [1e-320, 1e-100, 1e100, 1e308])
def test_float64_rows_whose_squares_leave_its_range_are_left_to_the_formulas(size):
    x, y = torch.rand(2, 5, 3, dtype=torch.float64) + 0.5
    assert native.cosine_similarity.forward(x, y, 1e-8, distance=False) is not None
    y[2] *= size
    assert native.cosine_similarity.forward(x, y, 1e-8, distance=False) is None


def test_rows_that_overlap_or_lie_apart_are_read_where_they_are():
    base = torch.randn(6, 9, 2)
    for x in (base[:, 2:7, 0].T, base[::2, 3, :], base[1].T[:1].expand(6, 9)):
        y = torch.randn(x.shape)
        ours, _ = native.cosine_similarity.forward(x, y, 1e-8, distance=False)
        torch.testing.assert_close(ours, every_case.forward(x, y, 1e-8))


def test_under_a_dispatch_mode_it_is_not_plain():
    x = torch.ones(2, 3)
    assert wants_native(x)
    assert not wants_native(x.half())
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert not wants_native(x)


@pytest.mark.parametrize("dtype", SPACING, ids=str)
@pytest.mark.parametrize("block", [5, 16, 256])
@pytest.mark.parametrize("needs", [(True,), (True, True), (True, False), (False, True)], ids=str)
def test_pairwise_equals_the_formulas_for_every_case(build, monkeypatch, needs, block, dtype):
    monkeypatch.setattr(native.pairwise_cosine_similarity, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(299, 13, generator=generator).to(dtype)
    y = torch.randn(17, 13, generator=generator).to(dtype) if needs[1:] else None
    x[3], x[5], x[7], x[9] = 0, 1e25 * x[5], 3 * x[8], 1e-9 * x[9]
    ours, rows = native.pairwise_cosine_similarity.forward(x, y, 1e-8)
    exact = pairwise.forward(x, y, 1e-8)
    torch.testing.assert_close(ours, exact, rtol=0, atol=SPACING[dtype])
    if y is None:
        assert torch.equal(ours, ours.T)
        assert torch.equal(ours.diagonal() == 1, x.norm(dim=1) > 1e-8)
    grad = torch.randn(ours.shape, generator=generator).to(dtype)
    found = native.pairwise_cosine_similarity.backward(grad, rows, 1e-8, needs)
    for side, f, e in zip((x, y), found, pairwise.backward(grad, x, y, 1e-8, needs), strict=False):
        assert (f is None) == (e is None)
        if f is not None:
            size = grad.double().norm() / side.double().norm(dim=1, keepdim=True).clamp_min(1e-8)
            torch.testing.assert_close(f / size, e / size, rtol=0, atol=SPACING[dtype])


def test_a_row_that_is_not_a_number_is_alone_and_has_no_unit_diagonal(build):
    for bad in (torch.nan, torch.inf):
        x = torch.randn(20, 7)
        x[3, 2] = bad
        with dispatch.use("eager"):
            exact = cosloss.pairwise_cosine_similarity(x)
        ours = cosloss.pairwise_cosine_similarity(x)
        assert ours.isnan().sum() == 2 * 20 - 1
        torch.testing.assert_close(ours, exact, equal_nan=True)


@pytest.mark.parametrize("size", [1e-320, 1e308, torch.nan])
def test_pairwise_of_float64_rows_out_of_range_is_left_to_the_formulas(size):
    x = torch.rand(5, 3, dtype=torch.float64) + 0.5
    y = x.clone()
    y[2] *= size
    assert native.pairwise_cosine_similarity.forward(x, None, 1e-8) is not None
    assert native.pairwise_cosine_similarity.forward(y, None, 1e-8) is None
    assert native.pairwise_cosine_similarity.forward(x, y, 1e-8) is None


def values_and_gradients(function, *inputs, **keywords):
    inputs = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
    value = function(*inputs, **keywords)
    grad = torch.linspace(0.37, -1.1, value.numel(), dtype=value.dtype).view_as(value)
    leaves = [x for x in inputs if x.requires_grad]
    return value, *torch.autograd.grad(value, leaves, grad)


LAYOUTS = {
    "columns": lambda x: x.mT.contiguous().mT,
    "every other row": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
    "part of longer rows": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "one row, expanded": lambda x: x[..., :1, :].expand(x.shape),
    "one number, expanded": lambda x: x[..., :1, :1].expand(x.shape),
    "no rows": lambda x: x[..., :0, :],
    "no columns": lambda x: x[..., :0],
    "three dimensions": lambda x: x.reshape(3, -1, x.shape[-1]),
    "one dimension": lambda x: x[0],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize(
    "function", [cosloss.cosine_similarity, cosloss.pairwise_cosine_similarity]
)
def test_every_layout_and_choice_of_gradients_equals_eager(build, function, needs, layout):
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(2, 24, 5, generator=generator, dtype=torch.float64)
    x, y = map(layout, both)
    if x.ndim == 1 and function is cosloss.pairwise_cosine_similarity:
        x, y = x.expand(1, 5), y.expand(1, 5)
    x, y = (z.requires_grad_(need) for z, need in zip((x, y), needs, strict=True))
    more = {} if function is cosloss.pairwise_cosine_similarity else {"dim": -1}
    with dispatch.use("native"):
        ours = values_and_gradients(function, x, y, **more)
    with dispatch.use("eager"):
        exact = values_and_gradients(function, x, y, **more)
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "function", [cosloss.cosine_similarity, cosloss.pairwise_cosine_similarity]
)
def test_an_edit_in_place_between_the_passes_is_an_error(function):
    x, y = (torch.randn(4, 5, requires_grad=True) for _ in range(2))
    value = function(x, y)
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


def test_results_do_not_depend_on_the_number_of_threads(build):
    x, y = torch.randn(2, 5000, 37)
    grad = torch.randn(5000)

    def results():
        value, statistics = native.cosine_similarity.forward(x, y, 1e-8, distance=False)
        gradients = native.cosine_similarity.backward(grad, x, y, statistics, 1e-8, 1, (True, True))
        rows = native.pairwise_cosine_similarity._rows(x, 1e-8)
        through = native.pairwise_cosine_similarity._through(y.clone(), rows, 1e-8)
        return value, *gradients, *rows, through

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results()
        torch.set_num_threads(2)
        assert all(torch.equal(a, b) for a, b in zip(alone, results(), strict=True))
    finally:
        torch.set_num_threads(before)


def test_without_a_compiled_build_all_is_eagers(no_build):
    x, y = (torch.randn(4, 5, requires_grad=True) for _ in range(2))
    assert not wants_native(x, y)
    ours = values_and_gradients(cosloss.pairwise_cosine_similarity, x, y)
    with dispatch.use("eager"):
        torch.testing.assert_close(
            ours, values_and_gradients(cosloss.pairwise_cosine_similarity, x, y), rtol=0, atol=0
        )
    with (
        dispatch.use("native"),
        pytest.raises(RuntimeError, match="without its compiled kernels"),
    ):
        cosloss.cosine_similarity(x, y)


def test_a_library_that_does_not_load_is_done_without():
    program = [sys.executable, "-c", WITHOUT_LIBRARY]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    environment = os.environ | {"COSLOSS_BACKEND": "native"}
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert "without its compiled kernels" in done.stderr


def test_use_chooses_between_the_compiled_kernels_and_the_eager_ones(monkeypatch):
    called = []
    for module, name in ((native.cosine_similarity, "native"), (every_case, "eager")):
        original = module.forward
        monkeypatch.setattr(
            module,
            "forward",
            lambda *a, name=name, original=original: called.append(name) or original(*a),
        )
    x = torch.randn(2, 3)
    for name in ("native", "eager", None):
        with dispatch.use(name):
            cosloss.cosine_similarity(x, x)
    assert called == ["native", "eager", "native"]


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_the_table_judges_the_backend_that_runs(monkeypatch, backend):
    """Each op is right by either, and a wrong backward of its own is what the table then sees."""
    ops = [op for op in verify.OPS if op.name.endswith("cosine_similarity")]
    ops += [op for op in verify.OPS if op.name == "cosine_embedding_loss"]
    lines: list[str] = []

    def judged():
        lines.clear()
        with dispatch.use(backend):
            verify.verify(ops, ["float32"], show=lines.append)
        return [line.rsplit("  ", 1)[-1][:4].strip() for line in lines[1:]]

    assert judged() == ["ok"] * 6
    theirs = {"native": native, "eager": eager_kernels}
    for name in ("cosine_similarity", "pairwise_cosine_similarity"):
        kernel = getattr(theirs[backend], name)
        monkeypatch.setattr(kernel, "backward", off_by_five_per_cent(kernel.backward))
    assert judged() == ["FAIL"] * 6


def off_by_five_per_cent(backward):
    return lambda *a: [None if g is None else 1.05 * g for g in backward(*a)]


def test_a_tensor_whose_memory_is_not_its_values_is_not_read():
    x, y = torch.randn(2, 4, 8)
    negated = torch._neg_view(x)  # as the imaginary part of a conjugate is
    assert not wants_native(negated)
    ours = cosloss.cosine_similarity(negated, y)
    torch.testing.assert_close(ours, -cosloss.cosine_similarity(x, y))
    assert not wants_native(x.to("meta"))
    assert wants_native(torch.nn.Parameter(x), x.requires_grad_() * 2)
    with torch.inference_mode():
        assert wants_native(x, x * 2)
