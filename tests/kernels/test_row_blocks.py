"""The eager row-wise similarity of plain numbers against the formulas for every case."""

import pytest
import torch

from cosloss.kernels import eager
from cosloss.kernels.eager import row_blocks

every_case = eager.cosine_similarity
SHAPES = [
    (7, 5),
    (600, 128),
    (3, 40, 700),
    (2, 3, 4, 33),
    (5,),
    (0, 4),
    (4, 0),
    (40000, 3),
    (2, 70000),
]
DTYPES = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def rows(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    if len(shape) == 2 and min(shape) > 3:
        x[0] = 0
        y[1] = x[1]  # a pair of equal rows
        y[2] = x[2] * (1 + 1e-6 * torch.arange(shape[1]))
        x[3] *= 1e-9  # below eps
    return x.to(dtype), y.to(dtype)


def by_either(x, y, eps=1e-8, needs=(True, True)):
    """Similarity, distance and gradients: of the blocks, and of the formulas for every case."""
    grad = torch.linspace(-1, 1.7, x.shape[:-1].numel()).reshape(x.shape[:-1]).to(x.dtype)

    def all_of_them():
        return (
            every_case.forward(x, y, eps),
            every_case.distance_forward(x, y, eps),
            *every_case.backward(grad, x, y, eps, needs),
        )

    with torch.no_grad():
        assert row_blocks.suits(x, y, grad)
        ours = all_of_them()
    return ours, all_of_them()  # that torch differentiates


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_equal_the_formulas_for_every_case(shape, dtype):
    ours, exact = by_either(*rows(shape, dtype))
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=DTYPES[dtype], atol=DTYPES[dtype] / 10)


@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-3, 5.0])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e30])
def test_every_scale_and_eps(scale, eps):
    x, y = rows((50, 16), torch.float32)
    ours, exact = by_either(scale * x, y / scale, eps)
    for a, b in zip(ours, exact, strict=True):
        # of equal rows the gradient is 0, or a rounding of float64's
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-12 * float(b.abs().max()))


def test_float64_whose_squares_leave_the_range_goes_another_way():
    x, y = rows((50, 16), torch.float64)
    for scale in (1e-200, 1e200):
        with torch.no_grad():
            assert row_blocks.forward(scale * x[4:], y[4:], 0.0, distance=False) is None
        ours, exact = by_either(scale * x[4:], y[4:], 0.0)
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_small_distances_keep_their_relative_accuracy():
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    y = x + 1e-5 * torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        distance = every_case.distance_forward(x, y, 1e-8)
    exact = every_case.distance_forward(x.double(), y.double(), 1e-8)
    torch.testing.assert_close(distance.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_asked_for_are_computed(needs):
    (_, _, *grads), _ = by_either(*rows((9, 5), torch.float32), needs=needs)
    assert [g is not None for g in grads] == list(needs)


def test_not_a_number_and_infinities_reach_their_rows_alone():
    x, y = rows((8, 5), torch.float32)
    x[5, 0], y[6, 1] = torch.nan, torch.inf
    (similarity, distance, *grads), _ = by_either(x, y)
    for found in (similarity, distance, *(g.sum(-1) for g in grads)):
        assert found.isnan().nonzero().flatten().tolist() == [5, 6]


def test_memory_of_one_block_beyond_the_gradients():
    from experiments.benchmarks.measure import peak_memory

    x, y = torch.randn(2, 8192, 512)
    with torch.no_grad():
        peak = peak_memory(lambda: every_case.backward(torch.ones(8192), x, y, 1e-8, (True, True)))
    assert peak < 2 * 16 + 3, "MiB: two gradients, and blocks of float64"
