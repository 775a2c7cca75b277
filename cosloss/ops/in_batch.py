"""The op of every in-batch loss: rows of a logit matrix, each with a positive, reduced or not.

With X = R C^T + b, T_i a total over row i's pairs (a sum of f(x_ij), or a logsumexp), p_i the
positive's logit and weights w, the loss is L = sum_i w_i l(T_i, p_i). Then, with g on L,

    a_i = g w_i dl/dT_i,    W_ij = a_i dT_i/dx_ij  (+ b_j dT_j/dx_ij where column j has a loss too),
    grad_R = W C,    grad_C = W^T R,    grad_b = sum_ij W_ij,    grad_p_i = g w_i dl/dp_i.

Where C is R, X is symmetric, W_ij = W_ji carries both terms, and grad_R = W R: the tiles above the
diagonal give the rest. Normalisation and temperature lie outside, in R = u / sqrt(temperature), so
that the gradient on the temperature costs no pass over the matrix: it is sum_i <R_i, grad_R_i>.

Where p_i is the mean of several logits of its row, W_ij has g w_i dl/dp_i / count_i more at those.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from cosloss.criteria import empty_lse
from cosloss.kernels.dispatch import in_batch as engine_for
from cosloss.modes import differentiates_itself, without_autocast
from cosloss.ops.opaque import in_batch_totals, opaque
from cosloss.problem import Problem


def in_batch(
    r: Tensor,
    c: Tensor | None,
    positive: Tensor,
    weight: Tensor | float | None,
    bias: Tensor | None,
    matrix: Problem,
) -> Tensor:
    """sum_i w_i l_i for constant weights, or every l_i where weight is None.

    positive: (N,), differentiable, also where it is the mean of the matrix's own positives.
    """
    if matrix.positives is not None:
        positive = positive.detach()  # the gradient through it is the matrix's
    if opaque(r, c):
        loss = matrix.criterion.loss(*in_batch_totals(r, c, positive, bias, matrix))
        return (loss if weight is None else (loss * weight).sum()).to(r.dtype)
    given = weight if isinstance(weight, Tensor) else None
    if differentiates_itself(r, c, positive, given, bias, *matrix.ids):
        return dense(r, c, positive, weight, bias, matrix)
    return InBatch.apply(r, c, positive, weight, bias, matrix)


def dense(
    r: Tensor,
    c: Tensor | None,
    positive: Tensor,
    weight: Tensor | float | None,
    bias: Tensor | None,
    matrix: Problem,
) -> Tensor:
    """The loss with the whole matrix in memory, differentiable any number of times."""
    with without_autocast(r):
        columns = r if c is None else c
        x = (r.to(matrix.dtype) @ columns.to(matrix.dtype).T).to(r.dtype)
        if bias is not None:
            x = x + bias
        excluded = matrix.mask.dense(x)
        if matrix.positives is not None:
            pairs = matrix.positives.tile() & ~excluded
            positive = torch.where(pairs, x, 0).sum(1) / matrix.positives.count
        x = x.masked_fill(excluded, empty_lse(x.dtype))
        total = matrix.criterion.dense_stat(x, 1)
        if matrix.column_losses and c is not None:
            total = torch.cat([total, matrix.criterion.dense_stat(x, 0)])
        loss = matrix.criterion.loss(total, positive)
        return loss if weight is None else (loss * weight).sum()


class InBatch(Function):
    """The tiled loss; its second derivative is the dense formula's.

    A loss that is one number has its gradient computed with it, while its tiles are there; the
    backward pass multiplies. Otherwise the tiles are computed again there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        r: Tensor,
        c: Tensor | None,
        positive: Tensor,
        weight: Tensor | float | None,
        bias: Tensor | None,
        matrix: Problem,
    ) -> Tensor:
        needs_r, needs_c, _, _, needs_bias, _ = ctx.needs_input_grad
        needs = (needs_r, needs_c, needs_bias)
        engine = engine_for(r, c)
        # Triton keeps no tiles, and so gains nothing from knowing early what is to be weighed
        ctx.weighed = any(needs) and weight is not None and hasattr(engine, "forward_backward")
        found: tuple[Tensor | None, ...]
        with without_autocast(r):
            if weight is not None and ctx.weighed:
                total, grad_positive, (grad_r, grad_c, grad_bias) = engine.forward_backward(
                    weight, positive, r, c, bias, matrix, needs
                )
                found = grad_r, grad_c, grad_positive.to(positive.dtype), grad_bias
            else:
                total = engine.forward(r, c, bias, matrix)
                found = (total,)
        ctx.weight, ctx.matrix = weight, matrix
        ctx.save_for_backward(r, c, positive, bias, *found)
        loss = matrix.criterion.loss(total, positive)
        return (loss if weight is None else (loss * weight).sum()).to(r.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or differentiates_itself(grads[0]):
            return _dense_backward(ctx, grads[0])
        r, c, positive, bias, *found = ctx.saved_tensors
        needs_r, needs_c, needs_positive, _, needs_bias, _ = ctx.needs_input_grad
        if ctx.weighed:
            grad_r, grad_c, grad_positive, grad_bias = (
                x if x is None else grads[0] * x for x in found
            )
            return grad_r, grad_c, grad_positive if needs_positive else None, None, grad_bias, None
        total = found[0]
        grad = grads[0] if ctx.weight is None else grads[0] * ctx.weight
        per_total, per_positive = ctx.matrix.criterion.loss_grad(total, positive)
        grad_positive = grad * per_positive
        with without_autocast(r):
            grad_r, grad_c, grad_bias = engine_for(r, c).backward(
                grad * per_total,
                total,
                r,
                c,
                bias,
                ctx.matrix,
                (needs_r, needs_c, needs_bias),
                ctx.matrix.d_pos_logit(grad_positive),
            )
        grad_positive = grad_positive.to(positive.dtype) if needs_positive else None
        return grad_r, grad_c, grad_positive, None, grad_bias, None


def _dense_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    r, c, positive, bias, *_ = ctx.saved_tensors
    needs = ctx.needs_input_grad
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # aliases, since one input may be a function of another: the positive's logit is one of r
        inputs: list[Any] = [x if x is None else x.view_as(x) for x in (r, c, positive, bias)]
        loss = dense(inputs[0], inputs[1], inputs[2], ctx.weight, inputs[3], ctx.matrix)
    inputs.insert(3, None)
    wanted = [x for x, need in zip(inputs, needs, strict=False) if need]
    found = iter(torch.autograd.grad(loss, wanted, grad, create_graph=create_graph))
    return tuple(next(found) if need else None for need in needs)
