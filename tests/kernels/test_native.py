"""The compiled kernels agree with the formulas for every case."""

import pytest
import torch
import torch.utils.flop_counter

from cosloss.kernels import native
from cosloss.kernels.dispatch import wants_native
from cosloss.kernels.eager import cosine_similarity as every_case
from cosloss.kernels.eager import pairwise_cosine_similarity as pairwise
from cosloss.kernels.native import library

SPACING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7}


def test_they_are_there():
    assert library.loaded() is not None


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("dtype", SPACING, ids=str)
@pytest.mark.parametrize("rows", [23, 4000], ids=["one thread", "threads"])
def test_row_wise_equals_the_formulas_for_every_case(rows, dtype, needs):
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
def test_pairwise_equals_the_formulas_for_every_case(monkeypatch, needs, block, dtype):
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
