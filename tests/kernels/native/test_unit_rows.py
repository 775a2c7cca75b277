"""Rows of one length, compiled and eager, judged by torch's derivative of them in float64."""

import pytest
import torch

from cosloss.kernels import eager, native

KERNELS = {"native": native.unit_rows, "eager": eager.unit_rows}


@pytest.fixture(params=KERNELS)
def kernels(request):
    return KERNELS[request.param]


def rows(count, columns, seed=0):
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))


def views(count, columns):
    z1 = rows(count, columns)
    return z1, 0.6 * z1 + rows(count, columns, seed=1)


def exact(views, scale, grad_r, grad_products):
    """Outputs and gradients in float64."""
    wide = [z.double().requires_grad_() for z in views]
    r, _, products = eager.unit_rows.forward(wide, scale)
    pairs = [(r, grad_r), (products, grad_products)]
    used, given = zip(*(pair for pair in pairs if pair[1] is not None), strict=True)
    return (r, products), torch.autograd.grad(used, wide, [g.double() for g in given])


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1.0, 1e30, 1e37])
def test_rows_of_any_size(build, kernels, scale):
    z = rows(40, 9) * scale
    z[7] = 0
    small = 1e-6 if scale < 1e-38 else 1.0  # or the gradient overflows
    grad = small * rows(40, 9, seed=3)
    (true, _), (true_grad,) = exact([z], 3.0, grad, None)
    for strided in (z, z.T.contiguous().T, torch.cat([z, z], 1)[:, :9]):
        r, norm, _ = kernels.forward([strided], scale=3.0)
        torch.testing.assert_close(r, true.float(), rtol=1e-6, atol=1e-6)
        (ours,) = kernels.backward([grad], None, [strided], norm, [True], scale=3.0)
        assert (ours[7] == 0).all()
        size = z.double().norm(dim=1, keepdim=True) / small
        torch.testing.assert_close(ours * size, true_grad * size, rtol=1e-5, atol=1e-5)


def test_pairs_give_each_view_its_gradient_and_no_other(kernels):
    both = views(17, 6)
    grad_r, grad_products = rows(34, 6, seed=4), rows(34, 1, seed=5)[:, 0]
    r, norm, products = kernels.forward(both, scale=1.7)
    for given in ((grad_r, grad_products), (grad_r, None), (None, grad_products)):
        outputs, true = exact(both, 1.7, *given)
        for ours, exactly in zip((r, products), outputs, strict=True):
            torch.testing.assert_close(ours, exactly.float(), rtol=1e-6, atol=1e-6)
        of_views = (None, None) if given[0] is None else given[0].chunk(2)
        for needs in ((True, True), (True, False), (False, True)):
            found = kernels.backward(of_views, given[1], both, norm, needs, scale=1.7)
            assert [g is not None for g in found] == list(needs)
            for ours, exactly in zip(found, true, strict=True):
                if ours is not None:
                    torch.testing.assert_close(ours.double(), exactly, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_rows_are_widened_and_rounded_as_asked(kernels, dtype):
    both = [z.to(dtype) for z in views(17, 6)]
    wide, _, products = kernels.forward(both, scale=1.7)
    narrow, _, same = kernels.forward(both, scale=torch.tensor(1.7), dtype=dtype)
    assert (wide.dtype, narrow.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(narrow, wide.to(dtype))
    torch.testing.assert_close(same, products, rtol=1e-6, atol=1e-6)


def test_in_one_dimension_the_gradient_is_exactly_zero():
    both = rows(20, 1), rows(20, 1, seed=1)
    _, norm, _ = native.unit_rows.forward(both, scale=0.3**-0.5)
    grads = rows(40, 1, seed=2).chunk(2)
    found = native.unit_rows.backward(grads, torch.full((40,), 0.37), both, norm, (True, True))
    assert all((grad == 0).all() for grad in found)
