"""The compiled kernels agree with the formulas for every case."""

import pytest
import torch
import torch.utils.flop_counter

from cosloss.kernels import native
from cosloss.kernels.dispatch import wants_native
from cosloss.kernels.eager import cosine_similarity as every_case
from cosloss.kernels.eager import pairwise_cosine_similarity as pairwise
from cosloss.kernels.eager import pairwise_cosine_similarity_blocks as pairwise_blocks
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


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("side", [1, 5, 512])
@pytest.mark.parametrize("two", [True, False], ids=["two", "one"])
def test_pairwise_blocks_equal_the_formulas_for_every_case(monkeypatch, side, needs, two):
    monkeypatch.setattr(pairwise_blocks, "SIDE", side)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(23, 13, generator=generator)
    y = torch.randn(17, 13, generator=generator) if two else None
    x[3], x[5] = 1e-7 * x[3], 1e8 * x[5]
    rows1 = pairwise_blocks.rows(x, 1e-8)
    rows2 = None if y is None else pairwise_blocks.rows(y, 1e-8)
    assert rows1 is not None
    ours = pairwise_blocks.forward(rows1, rows2)
    torch.testing.assert_close(ours, pairwise.forward(x, y, 1e-8), rtol=0, atol=5e-7)
    grad = torch.randn(ours.shape, generator=generator)
    found = pairwise_blocks.backward(grad, rows1, rows2, needs)
    exact = pairwise.backward(grad, x, y, 1e-8, needs)
    for side, f, e in zip((x, y), found, exact, strict=True):
        assert (f is None) == (e is None)
        if f is not None:
            scale = side.norm(dim=1, keepdim=True)
            torch.testing.assert_close(f * scale, e * scale, rtol=1e-5, atol=1e-5)


def test_a_row_that_needs_care_takes_the_formulas_for_every_case():
    x = torch.ones(3, 4)
    for entry in (0, 1e-9, 1e30, torch.nan, torch.inf):
        x[1] = entry
        assert pairwise_blocks.rows(x, 1e-8) is None, entry
