"""The row-wise kernels against the table's budgets, the eager kernels, and every layout."""

import pytest
import torch

from cosloss import functional, reference
from cosloss.kernels.eager import cosine_similarity as eager_kernel
from cosloss.kernels.triton import cosine_similarity, layout
from cosloss.testing import OPS, errors
from cosloss.testing.inputs import generic_pair
from tests.slow import slow

HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
TABLE = [op for op in OPS if op.name in ("cosine_similarity", "cosine_embedding_loss")]

pytestmark = [
    pytest.mark.usefixtures("triton_backend"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, in the interpreter
]


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels launched."""
    names = []
    launch = layout.launch_rows

    def noted(kernel, *arguments, **keywords):
        names.append(kernel.__name__)
        launch(kernel, *arguments, **keywords)

    monkeypatch.setattr(cosine_similarity, "launch_rows", noted)
    return names


@pytest.mark.parametrize("dtype", [torch.float32, *slow(torch.bfloat16, torch.float16)], ids=str)
@pytest.mark.parametrize("op", TABLE, ids=lambda op: op.name)
def test_every_sample_keeps_its_budget(op, dtype, launches):
    budget = op.budget(dtype)
    for sample in (*op.generic(), *op.hard(dtype)):
        found = errors(op.function, op.twin, sample, dtype)
        assert found.within(budget), (sample.name, found, budget)
    assert set(launches) == {"cosine_similarity_fwd_kernel", "cosine_similarity_bwd_kernel"}


def assert_equals_eager(x1, x2, grad, eps=1e-8, needs=(True, True)):
    for name in ("forward", "distance_forward"):
        ours = getattr(cosine_similarity, name)(x1, x2, eps)
        torch.testing.assert_close(ours, getattr(eager_kernel, name)(x1, x2, eps))
    ours = cosine_similarity.backward(grad, x1, x2, eps, needs)
    eagers = eager_kernel.backward(grad, x1, x2, eps, needs)
    for x, own, eager in zip((x1, x2), ours, eagers, strict=True):
        assert (own is None) == (eager is None)
        if own is not None:
            # a gradient goes with 1 / |x|, and its rounding error with the largest entry of the row
            norm = torch.linalg.vector_norm(x.double(), dim=-1, keepdim=True)
            torch.testing.assert_close(own * norm, eager * norm, rtol=1e-5, atol=3e-7)


@pytest.mark.parametrize("columns", [1, 9, 48, *slow(200)])
@pytest.mark.parametrize("block", [(64, 16), (64, 64)], ids=["in parts", "whole"])
def test_many_programs_and_rows_in_parts(block, columns, monkeypatch):
    monkeypatch.setattr(layout, "BLOCK", block[0])
    monkeypatch.setattr(layout, "LARGEST_WIDTH", block[1])
    x1, x2 = (x.float() for x in generic_pair(rows=23, columns=columns))
    x2[3], x2[4], x1[5], x2[6], x1[7] = x1[3], -2 * x1[4], 0 * x1[5], 1e30 * x2[6], 1e-9 * x1[7]
    assert_equals_eager(x1, x2, torch.linspace(0.37, 1.4, 23))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.mT.contiguous().mT,
        lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
        lambda x: x.transpose(0, 2),
        lambda x: x[:, None, :, None].expand(2, 3, 4, 2, 5, 7)[:, :, ::2],
        lambda x: x[..., ::2],
        lambda x: x[1, 2, 3],
        lambda x: x[:0],
        lambda x: x[..., :0],
    ],
    ids=["transposed", "first", "swapped", "expanded", "strided", "a row", "no rows", "no columns"],
)
def test_any_strides(view):
    generator = torch.Generator().manual_seed(0)
    x1, x2 = (view(torch.randn(2, 4, 5, 7, generator=generator)) for _ in range(2))
    grad = torch.randn(x1.shape[:-1], generator=generator)
    assert_equals_eager(x1, x2, grad)
    assert_equals_eager(
        x1, x2.contiguous(), grad[..., :1].expand(grad.shape) if grad.ndim else grad
    )


def test_a_broadcast_input_is_read_where_it_lies(launches):
    x1, x2 = (x.float() for x in generic_pair(rows=5, columns=8))
    value = functional.cosine_similarity(x1[:, None], x2, dim=-1)
    torch.testing.assert_close(value, functional.pairwise_cosine_similarity(x1, x2))
    assert launches == ["cosine_similarity_fwd_kernel"]


def test_only_what_needs_a_gradient_gets_one():
    x1, x2 = (x.float() for x in generic_pair())
    grad = torch.full((6,), 0.37)
    for needs in ((True, False), (False, True)):
        assert_equals_eager(x1, x2, grad, needs=needs)


def test_nan_stays_in_its_row():
    x1, x2 = (x.float() for x in generic_pair())
    x1[2, 4], x2[4, 0] = torch.nan, torch.inf
    found = cosine_similarity.forward(x1, x2, 1e-8)
    assert found.isnan().tolist() == [False, False, True, False, True, False]
    for grad in cosine_similarity.backward(torch.ones(6), x1, x2, 1e-8, (True, True)):
        assert grad.isnan().any(1).tolist() == [False, False, True, False, True, False]


def test_a_row_with_itself_is_exactly_one_and_at_distance_zero():
    x = 10 * torch.randn(257, 33, generator=torch.Generator().manual_seed(0))
    assert (cosine_similarity.forward(x, x.clone(), 1e-8) == 1).all()
    assert (cosine_similarity.distance_forward(x, x.clone(), 1e-8) == 0).all()


def test_distance_is_accurate_at_small_angles():
    x, y = generic_pair(columns=64)
    near = (x + 1e-5 * y).float()
    u, v = (z.double() / z.double().norm(dim=1, keepdim=True) for z in (x.float(), near))
    distance = cosine_similarity.distance_forward(x.float(), near, 1e-8).double()
    torch.testing.assert_close(distance, (u - v).square().sum(1) / 2, rtol=1e-6, atol=0)


def test_second_derivatives_are_the_twins(launches):
    x1, x2 = (x.float().requires_grad_() for x in generic_pair())

    def penalty(function):
        grads = torch.autograd.grad(
            function(x1, x2), (x1, x2), torch.full((6,), 0.37), create_graph=True
        )
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (x1, x2))

    torch.testing.assert_close(
        penalty(functional.cosine_similarity), penalty(reference.cosine_similarity)
    )
    assert launches == ["cosine_similarity_fwd_kernel"]
