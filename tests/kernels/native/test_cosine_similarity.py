"""The compiled row-wise kernel agrees with the formulas for every case, in every build."""

import pytest
import torch

from cosloss.kernels import native
from cosloss.kernels.eager import cosine_similarity as every_case

SPACING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7}


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
