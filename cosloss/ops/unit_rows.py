"""Rows scaled to one length at any scale, r = s z / |z|, with the gradient

    grad_z = (s g - <g, r> r / s) / |z|,

and 0 for a zero row; and with them the inner products p_i = <r_i, r_pair(i)> of two views' rows,
whose gradient g_p adds (g_p,i + g_p,pair(i)) r_pair(i) to g.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from cosloss.kernels import dispatch
from cosloss.kernels.eager import rows as eager
from cosloss.modes import differentiates_itself


class UnitRows(Function):
    """u = z / |z|, row by row."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        u, *norm = eager.unit_rows(z)
        ctx.save_for_backward(z, u, *norm)
        return u

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        z, *unit = ctx.saved_tensors
        if torch.is_grad_enabled():
            # for a second derivative everything must be seen to come from z
            unit = eager.unit_rows(z)
        return eager.through_unit_rows(grads[0], *unit)


class FusedUnitRows(Function):
    """The scaled rows of one or two views, one after the other, and the products of two's pairs.

    In one pass, by the kernels that `dispatch.unit_rows` names.
    """

    @staticmethod
    def forward(
        ctx: Any, kernels: ModuleType, scale: float, *views: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        r, norm, products = kernels.forward(views, scale=scale)
        ctx.kernels, ctx.scale = kernels, scale
        ctx.save_for_backward(norm, *views)
        return r, products

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        norm, *views = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        kernels: ModuleType = ctx.kernels
        given = [grad for grad in grads if grad is not None]
        if torch.is_grad_enabled() or dispatch.unit_rows(*given) is not kernels:
            return None, None, *_again(ctx.scale, views, grads, needs)
        grad_r, grad_products = grads
        of_views = (None,) * len(views) if grad_r is None else grad_r.chunk(len(views))
        found = kernels.backward(of_views, grad_products, views, norm, needs, scale=ctx.scale)
        return None, None, *found


def unit_rows(z: Tensor, scale: float = 1.0) -> Tensor:
    """scale z / |z|, row by row, in at least float32."""
    return _unit_rows(scale, [z])[0]


def unit_pairs(z1: Tensor, z2: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The same of z1's rows and then z2's, (2N, D), and their products <r_i, r_pair(i)>, (2N,)."""
    r, products = _unit_rows(scale, [z1, z2])
    assert products is not None
    return r, products


def fused(views: Sequence[Tensor]) -> tuple[ModuleType | None, list[Tensor]]:
    """The kernels that take the views in one pass, if any, and the views as these take them."""
    if not dispatch.wants_triton(*views):  # which reads narrow rows as they are
        views = [_wide(z) for z in views]
    return None if differentiates_itself(*views) else dispatch.unit_rows(*views), list(views)


def composed(scale: float, views: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """The views' rows and products by operations that torch differentiates any number of times."""
    z = _wide(torch.cat(list(views)) if len(views) == 2 else views[0])
    u = eager.unit_rows(z)[0] if differentiates_itself(z) else UnitRows.apply(z)
    r = u if scale == 1 else u * scale
    return r, (r * r.roll(views[0].shape[0], 0)).sum(1) if len(views) == 2 else None


def _unit_rows(scale: float, views: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    kernels, views = fused(views)
    if kernels is None:
        return composed(scale, views)
    return FusedUnitRows.apply(kernels, scale, *views)


def _wide(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))


def _again(
    scale: float, views: list[Tensor], grads: tuple[Tensor | None, ...], needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients by way of the operations."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [z.view_as(z) for z in views]
        results = composed(scale, inputs)
    pairs = [(x, grad) for x, grad in zip(results, grads, strict=True) if grad is not None]
    wanted = [z for z, need in zip(inputs, needs, strict=True) if need]
    outputs, given = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, given, create_graph=create_graph))
    return [next(found) if need else None for need in needs]
