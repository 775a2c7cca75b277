"""The op of the in-batch losses whose positives are the pairs of two views, normalisation included.

It is `cosloss.ops.in_batch` after `cosloss.ops.unit_rows`, with both derivations, as one step of
autograd: the scaled rows are in no dtype but the products', and only while these are taken.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import pad

from cosloss.kernels import dispatch
from cosloss.kernels.stats import Gradients
from cosloss.modes import differentiates_itself, without_autocast
from cosloss.ops.in_batch import dense
from cosloss.ops.unit_rows import composed, fused
from cosloss.problem import Problem


def in_batch_pairs(
    z1: Tensor,
    z2: Tensor,
    scale: float,
    weight: Tensor | float,
    bias: Tensor | None,
    matrix: Problem,
    joined: bool,
) -> Tensor | None:
    """sum_i w_i l_i for constant weights, in float32; None where no kernels do it in one step.

    joined: whether the logits are those of both views' rows with both views' rows, each scaled to
        this length, or else those of z1's rows with z2's.
    """
    kernels, views = fused([z1, z2])
    given = weight if isinstance(weight, Tensor) else None
    if kernels is None or differentiates_itself(bias, given, *matrix.ids):
        return None
    if not torch.is_grad_enabled():  # a Function is not told that nothing will go backward
        views, bias = [z.detach() for z in views], None if bias is None else bias.detach()
    return InBatchPairs.apply(*views, bias, kernels, scale, weight, matrix, joined)


class InBatchPairs(Function):
    """The tiled loss of two views; its second derivative is the dense formula's.

    As with `InBatch`, an engine that keeps tiles computes the gradient in the forward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z1: Tensor,
        z2: Tensor,
        bias: Tensor | None,
        kernels: ModuleType,
        scale: float,
        weight: Tensor | float,
        matrix: Problem,
        joined: bool,
    ) -> Tensor:
        ctx.kernels, ctx.scale, ctx.weight = kernels, scale, weight
        ctx.matrix, ctx.joined = matrix, joined
        r, norm, products = kernels.forward((z1, z2), scale=scale, dtype=matrix.dtype)
        sides, positive = _matrix_of(r, products, bias, matrix, joined)
        engine = dispatch.in_batch(*sides)
        ctx.weighed = any(ctx.needs_input_grad) and hasattr(engine, "forward_backward")
        found: Sequence[Tensor | None]
        with without_autocast(r):
            if ctx.weighed:
                total, grad_positive, gradients = engine.forward_backward(
                    weight, positive, *sides, bias, matrix, _engine_needs(ctx)
                )
                found = _through(ctx, (z1, z2), norm, gradients, grad_positive)
            else:
                total = engine.forward(*sides, bias, matrix)
                found = norm, positive, total
        ctx.save_for_backward(z1, z2, bias, *found)
        return (matrix.criterion.loss(total, positive) * weight).sum().float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        found = ctx.saved_tensors[3:]
        if torch.is_grad_enabled() or differentiates_itself(grad):
            gradients = _dense_backward(ctx, grad)
        elif ctx.weighed:
            gradients = [x if x is None else grad * x for x in found]
        else:
            gradients = _tiled_backward(ctx, grad, *found)
        return *gradients, *(None for _ in ctx.needs_input_grad[3:])


def _tiled_backward(
    ctx: Any, grad: Tensor, norm: Tensor, positive: Tensor, total: Tensor
) -> Sequence[Tensor | None]:
    z1, z2, bias, *_ = ctx.saved_tensors
    matrix = ctx.matrix
    per_total, per_positive = matrix.criterion.loss_grad(total, positive)
    grad = grad * ctx.weight
    r, _, products = ctx.kernels.forward((z1, z2), scale=ctx.scale, dtype=matrix.dtype)
    sides, _ = _matrix_of(r, products, bias, matrix, ctx.joined)
    with without_autocast(r):
        gradients = dispatch.in_batch(*sides).backward(
            grad * per_total, total, *sides, bias, matrix, _engine_needs(ctx)
        )
    del r, sides  # their memory serves the gradients
    return _through(ctx, (z1, z2), norm, gradients, grad * per_positive)


def _dense_backward(ctx: Any, grad: Tensor) -> Sequence[Tensor | None]:
    z1, z2, bias, *_ = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs: list[Any] = [x if x is None else x.view_as(x) for x in (z1, z2, bias)]
        *views, offset = inputs
        r, products = composed(ctx.scale, views)
        assert products is not None
        sides, positive = _matrix_of(r, products, offset, ctx.matrix, ctx.joined)
        loss = dense(*sides, positive, ctx.weight, offset, ctx.matrix)
    wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(loss, wanted, grad, create_graph=create_graph))
    return [next(found) if need else None for need in needs]


def _matrix_of(
    r: Tensor, products: Tensor, bias: Tensor | None, matrix: Problem, joined: bool
) -> tuple[tuple[Tensor, Tensor | None], Tensor]:
    """The matrix's rows and columns, the latter None for the rows, and the losses' positives."""
    first, second = r.chunk(2)
    positive = products if matrix.column_losses else products[: first.shape[0]]
    positive = positive if bias is None else positive + bias
    return (r, None) if joined else (first, second), positive


def _engine_needs(ctx: Any) -> tuple[bool, bool, bool]:
    """Which gradients are needed: on the matrix's rows, its columns, the bias."""
    first, second, bias, *_ = ctx.needs_input_grad
    return (first or second, False, bias) if ctx.joined else (first, second, bias)


def _through(
    ctx: Any,
    views: tuple[Tensor, Tensor],
    norm: Tensor,
    gradients: Gradients,
    grad_positive: Tensor,
) -> Sequence[Tensor | None]:
    """The gradients on the views and the bias, from those on the matrix and the positives."""
    grad_r, grad_c, grad_bias = gradients
    needs = ctx.needs_input_grad[:2]
    grads_z: Sequence[Tensor | None] = (None, None)
    if any(needs):
        of_views: Sequence[Tensor | None] = (grad_r, grad_c)
        if ctx.joined and grad_r is not None:
            of_views = grad_r.chunk(2)
        missing = norm.shape[0] - grad_positive.shape[0]  # columns without losses
        grad_products = pad(grad_positive.float(), (0, missing))
        grads_z = ctx.kernels.backward(of_views, grad_products, views, norm, needs, scale=ctx.scale)
    if grad_bias is not None:
        grad_bias = grad_bias + grad_positive.sum().to(grad_bias.dtype)
    return *grads_z, grad_bias
