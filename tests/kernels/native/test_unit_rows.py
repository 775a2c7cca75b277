"""The compiled rows of one length, judged by the eager ones in float64."""

import pytest
import torch

from cosloss.kernels import dispatch
from cosloss.ops import unit_pairs, unit_rows


def rows(count, columns, seed=0):
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))


def views(count, columns):
    z1 = rows(count, columns)
    return z1, 0.6 * z1 + rows(count, columns, seed=1)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1.0, 1e30, 1e37])
def test_rows_of_any_size(build, scale):
    z = rows(40, 9) * scale
    z[7] = 0
    for strided in (z, z.T.contiguous().T, torch.cat([z, z], 1)[:, :9]):
        leaf = strided.detach().requires_grad_()
        u = unit_rows(leaf, 3.0)
        wide = z.double().requires_grad_()
        with dispatch.use("eager"):
            exact = unit_rows(wide, 3.0)
        torch.testing.assert_close(u, exact.float(), rtol=1e-6, atol=1e-6)
        small = 1e-6 if scale < 1e-38 else 1.0  # or the gradient overflows
        grad = small * rows(40, 9, seed=3)
        (ours,) = torch.autograd.grad(u, leaf, grad)
        (true,) = torch.autograd.grad(exact, wide, grad.double())
        assert (ours[7] == 0).all()
        size = z.double().norm(dim=1, keepdim=True) / small
        torch.testing.assert_close(ours * size, true * size, rtol=1e-5, atol=1e-5)


def test_pairs_give_each_view_its_gradient_and_no_other():
    z1, z2 = views(17, 6)
    grad_r, grad_products = rows(34, 6, seed=4), rows(34, 1, seed=5)[:, 0]
    for wanted in ((True, True), (True, False), (False, True)):
        for given in ((grad_r, grad_products), (grad_r, None), (None, grad_products)):
            found = []
            for dtype in (torch.float32, torch.float64):
                both = [
                    z.to(dtype).requires_grad_(w) for z, w in zip((z1, z2), wanted, strict=True)
                ]
                outputs = unit_pairs(*both, 1.7)
                pairs = [
                    (o, g.to(dtype)) for o, g in zip(outputs, given, strict=True) if g is not None
                ]
                used, weights = zip(*pairs, strict=True)
                asked = [z for z, w in zip(both, wanted, strict=True) if w]
                found.append([g.double() for g in torch.autograd.grad(used, asked, weights)])
            for ours, true in zip(*found, strict=True):
                torch.testing.assert_close(ours, true, rtol=1e-5, atol=1e-6)


def test_in_one_dimension_the_gradient_is_exactly_zero():
    z = rows(20, 1).requires_grad_()
    other = rows(20, 1, seed=1).requires_grad_()
    r, products = unit_pairs(z, other, 0.3**-0.5)
    ((r * rows(40, 1, seed=2)).sum() + (products * 0.37).sum()).backward()
    assert (z.grad == 0).all()
    assert (other.grad == 0).all()
