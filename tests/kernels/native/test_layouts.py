"""Inputs of every layout, gradients of every choice: the compiled kernels read what is there."""

import pytest
import torch

import cosloss
from cosloss.kernels import dispatch, native

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
def test_every_layout_and_choice_of_gradients_equals_eager(
    build, values_and_gradients, function, needs, layout
):
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


def test_a_tensor_whose_memory_is_not_its_values_is_not_read():
    x, y = torch.randn(2, 4, 8)
    negated = torch._neg_view(x)  # as the imaginary part of a conjugate is
    assert not dispatch.wants_native(negated)
    ours = cosloss.cosine_similarity(negated, y)
    torch.testing.assert_close(ours, -cosloss.cosine_similarity(x, y))
    assert not dispatch.wants_native(x.to("meta"))
    assert dispatch.wants_native(torch.nn.Parameter(x), x.requires_grad_() * 2)
    with torch.inference_mode():
        assert dispatch.wants_native(x, x * 2)
