"""Rows scaled to one length at any scale, r = s z / |z|, with the gradient

    grad_z = (s g - <g, r> r / s) / |z|,

and 0 for a zero row; and with them the inner products p_i = <r_i, r_pair(i)> of two views' rows,
whose gradient g_p adds (g_p,i + g_p,pair(i)) r_pair(i) to g.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from cosloss.kernels.dispatch import wants_native
from cosloss.kernels.eager import rows as kernel
from cosloss.kernels.native import unit_rows as native
from cosloss.ops.transformed import transformed


class UnitRows(Function):
    """u = z / |z|, row by row."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        u, *norm = kernel.unit_rows(z)
        ctx.save_for_backward(z, u, *norm)
        return u

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        z, *unit = ctx.saved_tensors
        if torch.is_grad_enabled():
            # for a second derivative everything must be seen to come from z
            unit = kernel.unit_rows(z)
        return kernel.through_unit_rows(grads[0], *unit)


class NativeUnitRows(Function):
    """The scaled rows of one or two views, one after the other, and the products of two's pairs.

    By the compiled kernels, for float32 rows that torch.func does not see.
    """

    @staticmethod
    def forward(ctx: Any, scale: float, *views: Tensor) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        found = native.forward(views, scale=scale)
        assert found is not None  # no float32 row is out of range
        r, norm, products = found
        ctx.scale = scale
        ctx.save_for_backward(r, norm, *views)
        return r, products

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        r, norm, *views = ctx.saved_tensors
        (grad_r, grad_products), needs = grads, ctx.needs_input_grad[1:]
        given = [grad for grad in grads if grad is not None]
        if torch.is_grad_enabled() or not wants_native(*given):
            return None, *_again(ctx.scale, views, grads, needs)
        return None, *native.backward(grad_r, grad_products, r, norm, needs, scale=ctx.scale)


def unit_rows(z: Tensor, scale: float = 1.0) -> Tensor:
    """scale z / |z|, row by row, by the Function that suits z or by what it consists of."""
    return _unit_rows(scale, z)[0]


def unit_pairs(z1: Tensor, z2: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The same of z1's rows and then z2's, (2N, D), and their products <r_i, r_pair(i)>, (2N,)."""
    r, products = _unit_rows(scale, z1, z2)
    assert products is not None
    return r, products


def _unit_rows(scale: float, *views: Tensor) -> tuple[Tensor, Tensor | None]:
    if views[0].dtype == torch.float32 and not transformed(*views) and wants_native(*views):
        return NativeUnitRows.apply(scale, *views)
    return _operations(scale, *views)


def _operations(scale: float, *views: Tensor) -> tuple[Tensor, Tensor | None]:
    z = torch.cat(views) if len(views) == 2 else views[0]
    u = kernel.unit_rows(z)[0] if transformed(z) else UnitRows.apply(z)
    r = u if scale == 1 else u * scale
    return r, (r * r.roll(len(views[0]), 0)).sum(1) if len(views) == 2 else None


def _again(
    scale: float, views: list[Tensor], grads: tuple[Tensor | None, ...], needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients by way of the operations, which torch differentiates any number of times."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [z.view_as(z) for z in views]
        results = _operations(scale, *inputs)
    pairs = [(x, grad) for x, grad in zip(results, grads, strict=True) if grad is not None]
    wanted = [z for z, need in zip(inputs, needs, strict=True) if need]
    outputs, given = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, given, create_graph=create_graph))
    return [next(found) if need else None for need in needs]
