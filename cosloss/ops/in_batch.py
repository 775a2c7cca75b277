"""The op of every in-batch loss: normalisation, temperature, bias, a logit matrix, the reduction.

With X = R C^T + b (`cosloss.ops.operands`), a statistic s_i over row i's pairs, a sum of f(x_ij) or
an lse, the positive's logit p_i and weights w, the loss is L = sum_i w_i l(s_i, p_i). With g on L,

    d_s_i = g w_i dl/ds_i,    d_x_ij = d_s_i ds_i/dx_ij  (+ d_s_j ds_j/dx_ij, of column j's loss),
    grad_R = d_x C,    grad_C = d_x^T R,    grad_b = sum_ij d_x_ij,    grad_p_i = g w_i dl/dp_i.

Where C is R, X is symmetric, d_x_ij = d_x_ji carries both terms, and grad_R = d_x R: the tiles
above the diagonal give the rest. Where p_i is the mean of several logits of its row, d_x_ij has
g w_i dl/dp_i / count_i more at those.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from cosloss.criteria import empty_lse
from cosloss.distributed import NO_SECOND, NOT_PLAIN, Peers
from cosloss.kernels import dispatch, eager
from cosloss.modes import differentiates_itself, without_autocast
from cosloss.ops import custom_ops, gathered
from cosloss.ops.inputs import grads_of_inputs, inputs_of
from cosloss.ops.operands import Operands, Rows, input_grads, operands_of, positives_of, tile_needs
from cosloss.problem import Problem

KEPT_BYTES = 4 * 2**20  # of operands that the backward pass need not compute again


def in_batch(
    rows: Rows,
    temperature: float | Tensor,
    bias: Tensor | None,
    weights: Tensor | float | None,
    problem: Problem,
    peers: Peers | None = None,
) -> Tensor:
    """sum_i w_i l_i for constant weights, or every l_i where weights is None; at least float32.

    Three routes part here and nowhere else: kernels that compute the gradient; the composition of
    operations that torch differentiates; and that around a custom op, where Triton is compiled in.
    """
    given: list[Any] = [temperature, bias, *rows]
    tensors = [x for x in (*given, weights) if isinstance(x, Tensor)]
    if not differentiates_itself(*tensors, *problem.ids):
        if not torch.is_grad_enabled():  # a Function sees requires_grad alone
            given = [x.detach() if isinstance(x, Tensor) else x for x in given]
        return InBatch.apply(weights, problem, peers, *given)
    if peers is not None:
        raise RuntimeError(NOT_PLAIN)
    by_triton = custom_ops.suits(*(x for x in rows if x is not None))
    dtype = dispatch.product_dtype(rows[0])
    return composition(rows, temperature, bias, weights, problem, dtype, by_triton)


class InBatch(Function):
    """The loss by a backend's kernels; its second derivative is the composition's.

    A loss that is one number has its gradient computed with it, where tiles are kept for that; the
    backward pass multiplies. Otherwise the tiles are computed again there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor | float | None,
        problem: Problem,
        peers: Peers | None,
        temperature: float | Tensor,
        bias: Tensor | None,
        *given: Any,
    ) -> Tensor:
        rows: Rows = given
        kernels = dispatch.in_batch(*rows, guided=problem.mask.guides is not None)
        needs, dtype = ctx.needs_input_grad[3:], dispatch.product_dtype(rows[0])
        if kernels is eager:  # whose products come out in the dtype of their factors
            dtype = dispatch.wide_product_dtype(rows[0])
        ctx.grads_in_forward = (
            weights is not None and peers is None and any(needs) and kernels.in_batch.KEEPS_TILES
        )
        folds = (
            weights is not None
            and peers is None
            and not isinstance(temperature, Tensor)
            and not kernels.in_batch.KEEPS_TILES
            and kernels.in_batch.folds(problem, bias, dtype)
        )
        ctx.folded = None
        found: Sequence[Tensor | None]
        with without_autocast(rows[0]):
            operands = operands_of(kernels.unit_rows, rows, temperature, bias, problem, dtype)
            if peers is not None:
                loss, *found = gathered.forward(kernels.in_batch, operands, weights, problem, peers)
            else:
                positive = positives_of(operands, problem)
                if weights is not None and folds:
                    ctx.folded = kernels.in_batch.forward_folded(
                        operands.r, operands.c, problem, weights=weights, positive=positive
                    )
                    found = ()
                elif weights is not None and ctx.grads_in_forward:
                    needed = tile_needs(rows, bias, problem, needs)
                    stat, d_positive, gradients = kernels.in_batch.forward_backward(
                        operands.r,
                        operands.c,
                        operands.bias,
                        problem,
                        weights=weights,
                        positive=positive,
                        needs=needed,
                    )
                    found = input_grads(
                        kernels.unit_rows,
                        rows,
                        temperature,
                        problem,
                        operands,
                        gradients,
                        d_positive,
                        needs,
                    )
                else:
                    stat = kernels.in_batch.forward(operands.r, operands.c, operands.bias, problem)
                    found = (stat,)
                if ctx.folded is None:
                    loss = problem.criterion.loss(stat, positive)
                    loss = loss if weights is None else (loss * weights).sum()
                else:
                    loss = ctx.folded.loss
        learnt = temperature if isinstance(temperature, Tensor) else None
        ctx.temperature = None if learnt is not None else temperature
        computes_again = any(needs) and peers is None and not ctx.grads_in_forward
        keeps = computes_again and operands.nbytes <= KEPT_BYTES
        ctx.operands = operands if keeps else None
        ctx.kernels, ctx.dtype = kernels, dtype
        ctx.weights, ctx.problem, ctx.peers = weights, problem, peers
        ctx.save_for_backward(learnt, bias, *rows, *found)
        return loss.to(torch.promote_types(rows[0].dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        learnt, bias, first, second, negatives, *found = ctx.saved_tensors
        rows = first, second, negatives
        temperature = ctx.temperature if learnt is None else learnt
        if torch.is_grad_enabled() or differentiates_itself(grad):
            if ctx.peers is not None:
                twice = torch.is_grad_enabled()
                raise RuntimeError(NO_SECOND if twice else NOT_PLAIN)
            result = _composed_grads(ctx, grad, learnt, bias, rows)
        elif ctx.grads_in_forward:
            result = [x if x is None else grad * x for x in found]
        else:
            result = _tiled_grads(ctx, grad, temperature, bias, rows, found)
        d_temperature, d_bias, *d_rows = result
        narrow = (d if d is None else d.to(x.dtype) for d, x in zip(d_rows, rows, strict=True))
        return None, None, None, d_temperature, d_bias, *narrow


def composition(
    rows: Rows,
    temperature: float | Tensor,
    bias: Tensor | None,
    weights: Tensor | float | None,
    problem: Problem,
    dtype: torch.dtype,
    by_triton: bool = False,
) -> Tensor:
    """The loss as operations that torch differentiates any number of times.

    The whole matrix is in memory, or by_triton, its statistics are a custom op's.
    """
    with without_autocast(rows[0]):
        # the custom op rounds its operands itself: their gradient is not to be rounded
        wide = None if by_triton else dtype
        operands = operands_of(eager.unit_rows, rows, temperature, bias, problem, wide)
        if by_triton:
            pair = None
            if problem.positives is None:
                pair = positives_of(operands, problem)
            stat, positive = custom_ops.in_batch_stats(
                operands.r, operands.c, operands.bias, pair, problem, dtype
            )
            stat = _shared(stat, problem)
        else:
            stat, positive = _dense_stats(operands, problem)
        loss = problem.criterion.loss(stat, positive)
        loss = loss if weights is None else (loss * weights).sum()
        return loss.to(torch.promote_types(rows[0].dtype, torch.float32))


def _dense_stats(operands: Operands, problem: Problem) -> tuple[Tensor, Tensor]:
    """Every loss's statistic and positive, from the whole matrix."""
    r, c = operands.r, operands.c
    x = r @ (r if c is None else c).T
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if operands.bias is not None:
        x = x + operands.bias
    x = _shared(x, problem)
    mask = problem.mask.dense(x)
    if problem.positives is None:
        positive = positives_of(operands, problem)
    else:
        pairs = problem.positives.tile() & ~mask
        positive = torch.where(pairs, x, 0).sum(1) / problem.positives.count
    x = x.masked_fill(mask, empty_lse(x.dtype))
    stat = problem.criterion.dense_stat(x, 1)
    if problem.column_losses and c is not None:
        stat = torch.cat([stat, problem.criterion.dense_stat(x, 0)])
    return stat, positive


def _shared(x: Tensor, problem: Problem) -> Tensor:
    """x, a share of which has a gradient."""
    share, constant = problem.criterion.share, x.detach()
    return x if share is None else constant + share * (x - constant)


def _tiled_grads(
    ctx: Any,
    grad: Tensor,
    temperature: float | Tensor,
    bias: Tensor | None,
    rows: Rows,
    found: Sequence[Tensor],
) -> list[Tensor | None]:
    """The gradients on temperature, bias and rows, from tiles that are computed again."""
    kernels, problem, needs = ctx.kernels, ctx.problem, ctx.needs_input_grad[3:]
    with without_autocast(rows[0]):
        if ctx.operands is not None:
            operands = replace(ctx.operands)  # what is released of it is there another time
        else:
            operands = operands_of(kernels.unit_rows, rows, temperature, bias, problem, ctx.dtype)
        if ctx.folded is not None:
            d_positive = ctx.folded.d_positive
            inputs = inputs_of(rows, temperature, problem, operands, d_positive, needs, grad)
            reached = kernels.in_batch.input_grads_folded(
                operands.r, operands.c, problem, inputs, ctx.folded
            )
            return grads_of_inputs(reached, rows, temperature, problem, operands, d_positive, needs)
        needed = tile_needs(rows, bias, problem, needs)
        if ctx.peers is not None:
            gradients, d_positive = gathered.backward(
                kernels.in_batch, grad, operands, problem, ctx.peers, needed, found
            )
        else:
            (stat,) = found
            d_loss = grad if ctx.weights is None else grad * ctx.weights
            d_stat, d_positive = problem.criterion.loss_grad(stat, positives_of(operands, problem))
            d_positive = d_loss * d_positive
            on_stats = {
                "d_stat": d_loss * d_stat,
                "stat": stat,
                "d_pos_logit": problem.d_pos_logit(d_positive),
            }
            if kernels.in_batch.REACHES_INPUTS and operands.column_bias is None:
                inputs = inputs_of(rows, temperature, problem, operands, d_positive, needs)
                reached = kernels.in_batch.input_grads(
                    operands.r, operands.c, operands.bias, problem, inputs, **on_stats
                )
                return grads_of_inputs(
                    reached, rows, temperature, problem, operands, d_positive, needs
                )
            gradients = kernels.in_batch.backward(
                operands.r,
                operands.c,
                operands.bias,
                problem,
                needs=needed,
                **on_stats,
            )
        of_rows = operands, gradients, d_positive, needs
        return input_grads(kernels.unit_rows, rows, temperature, problem, *of_rows)


def _composed_grads(
    ctx: Any, grad: Tensor, learnt: Tensor | None, bias: Tensor | None, rows: Rows
) -> list[Tensor | None]:
    """The gradients on temperature, bias and rows, differentiable if they are to be."""

    def composed(temperature: float | Tensor, bias: Tensor | None, rows: Rows) -> Tensor:
        return composition(rows, temperature, bias, ctx.weights, ctx.problem, ctx.dtype)

    inputs = learnt, bias, *rows
    return grads_of(composed, grad, ctx.temperature, inputs, ctx.needs_input_grad[3:])


def grads_of(
    loss_of: Callable[[Any, Tensor | None, Rows], Tensor],
    grad: Tensor,
    fixed_temperature: float | None,
    given: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients on a learnt temperature, bias and rows, by torch, where they are needed.

    They are differentiable if they are to be. loss_of: of temperature, bias and rows.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # aliases, since one input may be a function of another
        inputs = [x if x is None else x.view_as(x) for x in given]
        learnt, bias, first, second, negatives = inputs
        assert first is not None
        temperature = fixed_temperature if learnt is None else learnt
        loss = loss_of(temperature, bias, (first, second, negatives))
    wanted = [x for x, need in zip(inputs, needs, strict=True) if need and x is not None]
    found = iter(torch.autograd.grad(loss, wanted, grad, create_graph=create_graph))
    return [next(found) if need else None for need in needs]
