"""The eager row-wise similarity of plain numbers against the formulas for every case."""

import pytest
import torch

from cosloss import cosine_similarity, release_memory
from cosloss.kernels import dispatch, eager
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

    exact = (
        every_case.forward(x, y, eps),
        every_case.distance_forward(x, y, eps),
        *every_case.backward(grad, x, y, eps, needs),
    )
    found = row_blocks.forward(x, y, eps, distance=False)
    if found is None:
        return None, exact
    similarity, statistics = found
    distance, _ = row_blocks.forward(x, y, eps, distance=True)
    gradients = row_blocks.backward(grad, x, y, statistics, eps, 1, needs)
    minus = row_blocks.backward(grad, x, y, statistics, eps, -1, needs)
    for a, b in zip(gradients, minus, strict=True):
        assert a is b is None or torch.equal(a.nan_to_num(), -b.nan_to_num())
    return (similarity, distance, *gradients), exact


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
        a, b = (scale * x[4:]).requires_grad_(), y[4:]
        ours, exact = by_either(a.detach(), b, 0.0)
        assert ours is None
        with dispatch.use("eager"):
            similarity = cosine_similarity(a, b, eps=0.0)
        torch.testing.assert_close(similarity, exact[0], rtol=1e-12, atol=0)
        (gradient,) = torch.autograd.grad(similarity.sum(), a)
        assert gradient.isfinite().all()
        assert gradient.any(1).all()


def test_small_distances_keep_their_relative_accuracy():
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    y = x + 1e-5 * torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    distance, _ = row_blocks.forward(x, y, 1e-8, distance=True)
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
    _, statistics = row_blocks.forward(x, y, 1e-8, distance=False)
    release_memory()
    needs = (True, True)
    peak = peak_memory(
        lambda: row_blocks.backward(torch.ones(8192), x, y, statistics, 1e-8, 1, needs)
    )
    assert peak < 2 * 16 + 3, "MiB: two gradients, and blocks of float64"


@pytest.mark.parametrize("shape", [(600, 128), (40000, 3), (9, 5)], ids=str)
def test_the_inputs_are_left_as_they_were(shape):
    for dtype in DTYPES:
        x, y = rows(shape, dtype)
        before = x.clone(), y.clone()
        by_either(x, y)
        assert torch.equal(x, before[0])
        assert torch.equal(y, before[1])


@pytest.mark.parametrize("shape", [(600, 128), (40000, 3)], ids=str)
def test_rows_that_overlap_or_lie_apart_are_read_where_they_are(shape):
    n, d = shape
    y = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for x in (torch.randn(d, n).T, torch.randn(n, d, 2)[..., 1], torch.randn(d).expand(n, d)):
        for a, b in zip(*by_either(x, y), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_step_takes_the_blocks(monkeypatch):
    x, y = (a.requires_grad_() for a in rows((9, 5), torch.float32))
    for name in ("forward", "backward", "distance_forward"):
        monkeypatch.setattr(every_case, name, None)
    with dispatch.use("eager"):
        cosine_similarity(x, y).sum().backward()
    assert x.grad.any()
    assert y.grad.any()
