"""The compiled pairwise kernels agree with the formulas for every case, in every build."""

import pytest
import torch

import cosloss
from cosloss.kernels import dispatch, native
from cosloss.kernels.eager import pairwise_cosine_similarity as every_case

SPACING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7}


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
    exact = every_case.forward(x, y, 1e-8)
    torch.testing.assert_close(ours, exact, rtol=0, atol=SPACING[dtype])
    if y is None:
        assert torch.equal(ours, ours.T)
        assert torch.equal(ours.diagonal() == 1, x.norm(dim=1) > 1e-8)
    grad = torch.randn(ours.shape, generator=generator).to(dtype)
    found = native.pairwise_cosine_similarity.backward(grad, rows, 1e-8, needs)
    for side, f, e in zip(
        (x, y), found, every_case.backward(grad, x, y, 1e-8, needs), strict=False
    ):
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
