"""The blocks of plain CPU tensors agree with the formulas for every case, whatever their size."""

import pytest
import torch
import torch.utils.flop_counter

from cosloss.kernels.eager import cosine_similarity as kernel
from cosloss.kernels.eager import cosine_similarity_blocks as blocks
from cosloss.kernels.eager import pairwise_cosine_similarity as pairwise
from cosloss.kernels.eager import pairwise_cosine_similarity_blocks as pairwise_blocks
from cosloss.kernels.eager.plain import usable


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("block", [1, 40, 1 << 21])
def test_blocks_equal_the_formulas_for_every_case(monkeypatch, block, needs):
    monkeypatch.setattr(blocks, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 23, 13, generator=generator)
    x[3], y[5] = 0, 1e-9 * y[5]  # careful rows among direct ones
    y[7], y[8], x[9], y[11] = 3 * x[7], -x[8], 1e25 * x[9], x[11] + 1e-4 * y[11]
    grad = torch.linspace(-0.37, 1.1, 23)
    grad[13], grad[14], grad[15] = 0, 1e-30, 1e25
    assert usable(grad, x, y)
    similarity, factors, careful = blocks.forward(x, y, 1e-8, distance=False)
    distance, _, _ = blocks.forward(x, y, 1e-8, distance=True)
    pairs = [
        (similarity, kernel.forward(x, y, 1e-8)),
        (distance, kernel.distance_forward(x, y, 1e-8)),
    ]
    ours = blocks.backward(grad, x, y, factors, careful, 1e-8, needs)
    exact = kernel.backward(grad, x, y, 1e-8, needs)
    for ours_i, exact_i, side in zip(ours, exact, (x, y), strict=True):
        assert (ours_i is None) == (exact_i is None)
        if exact_i is not None:
            size = (grad.abs() / side.norm(dim=1).clamp_min(1e-8)).clamp_min(1e-37)[:, None]
            pairs.append((ours_i / size, exact_i / size))
    for ours_i, exact_i in pairs:
        torch.testing.assert_close(ours_i, exact_i, rtol=1e-6, atol=1e-6)


def test_under_a_dispatch_mode_it_is_not_plain():
    x = torch.ones(2, 3)
    assert usable(x)
    assert not usable(x.half())
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert not usable(x)


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
