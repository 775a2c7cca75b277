"""Cosine similarity and its losses in every mode of autograd, eager and compiled."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from cosloss import functional, reference
from cosloss.kernels import dispatch, native
from cosloss.kernels.eager import row_blocks

TARGET = torch.tensor([1, -1, 1, -1])
CASES = {
    "cosine_similarity": lambda m, a, b: m.cosine_similarity(a, b),
    "inside the eps ball": lambda m, a, b: m.cosine_similarity(a, b, eps=9.0),
    "pairwise": lambda m, a, b: m.pairwise_cosine_similarity(a, b),
    "pairwise of one": lambda m, a, b: m.pairwise_cosine_similarity(a * b),
    "embedding": lambda m, a, b: m.cosine_embedding_loss(a, b, TARGET, 0.1, "none"),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def pair(rows: int = 4, columns: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, rows, columns, dtype=torch.float64, generator=generator)
    return [x.to(dtype).requires_grad_() for x in (a, a + b)]


def weighted(case, module, weight=None):
    """A scalar of all outputs, whose incoming gradients differ and none is 1."""

    def scalar(a, b):
        out = case(module, a, b)
        w = torch.linspace(0.37, -1.1, out.numel(), dtype=out.dtype).view_as(out)
        return (out.sin() * w).sum()

    return scalar


def test_gradcheck_with_every_flag(case):
    assert gradcheck(
        lambda a, b: case(functional, a, b),
        pair(),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        check_undefined_grad=True,
    )


def test_gradgradcheck_with_every_flag(case):
    assert gradgradcheck(
        lambda a, b: case(functional, a, b),
        pair(),
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
        check_batched_grad=True,
    )


@pytest.mark.parametrize("outer", [jacrev, jacfwd, grad], ids=lambda f: f.__name__)
@pytest.mark.parametrize("inner", [jacrev, jacfwd, grad], ids=lambda f: f.__name__)
def test_transforms_twice_over_equal_the_twins(case, outer, inner):
    a, b = (x.detach() for x in pair())

    def second(module):
        first = inner(weighted(case, module), argnums=0)
        return outer(lambda a, b: (first(a, b) * a.cos()).sum(), argnums=1)(a, b)

    assert second(reference).abs().max() > 1e-3
    torch.testing.assert_close(second(functional), second(reference))


def test_hessian_equals_the_twins(case):
    a, b = (x.detach() for x in pair())
    ours, twin = (hessian(weighted(case, m), argnums=(0, 1))(a, b) for m in (functional, reference))
    torch.testing.assert_close(ours, twin)


def test_hessian_vector_product_forward_over_reverse(case):
    a, b = (x.detach() for x in pair())
    direction = torch.linspace(-1, 1, a.numel(), dtype=a.dtype).view_as(a)

    def product(module):
        return jvp(lambda a: grad(weighted(case, module))(a, b), (a,), (direction,))[1]

    torch.testing.assert_close(product(functional), product(reference))


def test_dual_tensors_through_a_backward_that_records_nothing(case):
    a, b = pair()
    tangent = torch.linspace(-1, 1, a.numel(), dtype=a.dtype).view_as(a)

    def through(module):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(a, tangent)
            (g,) = torch.autograd.grad(weighted(case, module)(dual, b), a)
            return forward_ad.unpack_dual(g).tangent

    torch.testing.assert_close(through(functional), through(reference))


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (2, 1)], ids=str)
def test_vmap_of_value_and_gradient(case, in_dims):
    a, b = (x.detach() for x in pair())
    batch = torch.linspace(0.5, 1.5, 3, dtype=a.dtype)
    stacked = [
        x if d is None else torch.stack([x * s + s.cos() for s in batch], d)
        for x, d in zip((a, b), in_dims, strict=True)
    ]

    def both(module):
        mapped = vmap(grad(weighted(case, module), argnums=(0, 1)), in_dims=in_dims)(*stacked)
        return (*mapped, vmap(lambda a, b: case(module, a, b), in_dims=in_dims)(*stacked))

    torch.testing.assert_close(both(functional), both(reference))


@pytest.mark.parametrize("module", [row_blocks, native.cosine_similarity], ids=["eager", "native"])
def test_only_the_gradients_asked_for_are_computed(monkeypatch, module):
    if module is native.cosine_similarity and native.library.loaded() is None:
        pytest.skip("the kernels are not compiled")
    asked = []
    original = module.backward
    monkeypatch.setattr(
        module,
        "backward",
        lambda *arguments: asked.append(tuple(arguments[-1][:2])) or original(*arguments),
    )
    a, b = (x.half() for x in pair()) if module is row_blocks else pair()
    functional.cosine_similarity(a, b.detach()).sum().backward()
    functional.cosine_similarity(a.detach(), b).sum().backward()
    assert asked == [(True, False), (False, True)]


def test_an_input_edited_in_place_before_backward_is_detected(case):
    a, b = pair()
    x = a * 1.5
    out = case(functional, x, b).sum()
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_checkpointing_and_saved_tensor_hooks_change_nothing(case):
    a, b = pair()
    scalar = weighted(case, functional)
    expected = torch.autograd.grad(scalar(a, b), (a, b))
    again = torch.autograd.grad(checkpoint(scalar, a, b, use_reentrant=False), (a, b))
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: packed.append(x.clone()) or len(packed) - 1, lambda i: packed[i]
    ):
        loss = scalar(a, b)
    assert packed
    torch.testing.assert_close(again, expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, (a, b)), expected, rtol=0, atol=0)


def test_inference_mode(case):
    a, b = pair(dtype=torch.float32)
    with torch.inference_mode():
        out = case(functional, a, b)
    assert out.is_inference()
    torch.testing.assert_close(out, case(reference, a, b).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_the_dtype_that_torch_gives(dtype):
    a, b = pair(dtype=torch.float32)
    target = torch.ones(4)
    with torch.autocast("cpu", dtype):
        for x, y in ((a, b), (a.to(dtype), b.to(dtype)), (a.to(dtype), b)):
            expected = torch.nn.functional.cosine_similarity(x, y).dtype
            assert functional.cosine_similarity(x, y).dtype == expected
            expected = torch.nn.functional.cosine_embedding_loss(x, y, target).dtype
            assert functional.cosine_embedding_loss(x, y, target).dtype == expected


@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_backward_pass_inside_autocast_is_the_one_outside(case, backend):
    a, b = pair(rows=4, dtype=torch.float32)
    with dispatch.use(backend):
        value = case(functional, a, b)
        weight = torch.linspace(0.37, -1.1, value.numel()).view_as(value)
        outside = torch.autograd.grad(value, (a, b), weight, retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            inside = torch.autograd.grad(value, (a, b), weight)
    torch.testing.assert_close(inside, outside, rtol=1e-6, atol=1e-6)
