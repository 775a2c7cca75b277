"""The in-batch op over nested prefixes of its rows (Matryoshka), which share their products.

The loss is sum_k w_k L(z[:, :d_k]) of the in-batch loss L, each prefix normalised by itself. With
u = z[:d_k] / |z[:d_k]| and T the temperature, segment k of the rows R and the columns C is what u
has from column d_(k-1) on, over sqrt(T), and the logits accumulate as in
`cosloss.kernels.prefixes`, with links |z_i[:d_(k-1)]| / |z_i[:d_k]|. The gradient on segment k of
z_i is then, with h that on R's, from all prefixes that have it,

    (h - T a^k_i r_i,k) / (|z_i[:d_k]| sqrt(T)),    a^k_i = s^k_i + link_(k+1),i^2 a^(k+1)_i,

where s^k_i = sum_j d^k_ij x^k_ij is prefix k's <h, r_i> by itself. The pairs' parts chain alike.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from cosloss.distributed import Peers
from cosloss.kernels import dispatch
from cosloss.modes import differentiates_itself, without_autocast
from cosloss.ops.in_batch import composition, grads_of, in_batch
from cosloss.ops.operands import Rows, has_columns, tile_needs
from cosloss.ops.prefix_operands import prefix_of, prefix_operands
from cosloss.problem import Problem

SMALLEST_LINK = 1e-12  # its square times a gradient is a normal number of float32


def in_prefixes(
    rows: Rows,
    ends: tuple[int, ...],
    end_weights: tuple[float, ...],
    temperature: float | Tensor,
    bias: Tensor | None,
    weights: Tensor | float | None,
    problem: Problem,
    peers: Peers | None = None,
) -> Tensor:
    """sum_k w_k of `in_batch` over the prefixes of the rows that end there, in increasing order."""

    def in_turn(ends: tuple[int, ...], end_weights: tuple[float, ...]) -> Tensor:
        parts = [
            in_batch(prefix_of(rows, end), temperature, bias, weights, problem, peers) * weight
            for end, weight in zip(ends, end_weights, strict=True)
        ]
        return torch.stack(parts).sum(0)

    given: list[Any] = [temperature, bias, *rows]
    tensors = [x for x in (*given, weights) if isinstance(x, Tensor)]
    if ends[0] == 1 and len(ends) > 1:
        # a sign has no gradient, and from sums with others' rounding would be left
        rest = ends[1:], end_weights[1:], temperature, bias, weights, problem, peers
        return in_turn(ends[:1], end_weights[:1]) + in_prefixes(rows, *rest)
    shares = (
        len(ends) > 1
        and peers is None
        and not has_columns(bias)
        and not differentiates_itself(*tensors, *problem.ids)
        and dispatch.in_batch(*rows).in_batch.SHARES_PREFIXES
        and not _vanish(rows, ends)
    )
    if not shares:
        return in_turn(ends, end_weights)
    if not torch.is_grad_enabled():
        given = [x.detach() if isinstance(x, Tensor) else x for x in given]
    return InPrefixes.apply(ends, end_weights, weights, problem, *given)


def _vanish(rows: Rows, ends: tuple[int, ...]) -> bool:
    """Whether a row's shortest prefix is nothing beside the longest: no link leads back to it."""
    for x in rows:
        if x is None:
            continue
        # in float64 no square of a narrower number leaves the range
        order = torch.inf if x.dtype == torch.float64 else 2
        shortest, longest = (
            torch.linalg.vector_norm(x.detach()[:, :end], order, 1, dtype=torch.float64)
            for end in (ends[0], ends[-1])
        )
        if bool(((shortest <= SMALLEST_LINK * longest) & (longest != 0)).any()):
            return True
    return False


class InPrefixes(Function):
    """The loss by a backend's kernels; its second derivative is the compositions'.

    As in `cosloss.ops.in_batch.InBatch`, the gradient of one number is computed with it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ends: tuple[int, ...],
        end_weights: tuple[float, ...],
        weights: Tensor | float | None,
        problem: Problem,
        temperature: float | Tensor,
        bias: Tensor | None,
        *given: Any,
    ) -> Tensor:
        rows: Rows = given
        kernels, needs = dispatch.in_batch(*rows), ctx.needs_input_grad[4:]
        ctx.grads_in_forward = weights is not None and any(needs)
        ctx.kernels, ctx.dtype = kernels, dispatch.product_dtype(rows[0])
        ctx.ends, ctx.end_weights, ctx.weights = ends, end_weights, weights
        ctx.problem = problem
        found: Sequence[Tensor | None] = ()
        with without_autocast(rows[0]):
            operands = prefix_operands(
                kernels.unit_rows, rows, ends, temperature, bias, problem, ctx.dtype
            )
            each = operands.positive.new_tensor(end_weights)[:, None]
            factors = each if weights is None else each * weights
            if ctx.grads_in_forward:
                stat, d_positive, gradients = kernels.in_batch.forward_backward(
                    operands.r,
                    operands.c,
                    bias,
                    problem,
                    weights=factors,
                    positive=operands.positive,
                    needs=tile_needs(rows, bias, problem, needs),
                    prefixes=operands.prefixes,
                )
                found = operands.input_grads(
                    kernels.unit_rows, rows, temperature, problem, gradients, d_positive, needs
                )
            else:
                stat = kernels.in_batch.forward(
                    operands.r, operands.c, bias, problem, operands.prefixes
                )
                found = (stat,)
            loss = problem.criterion.loss(stat, operands.positive) * factors
            loss = loss.sum(0) if weights is None else loss.sum()
        learnt = temperature if isinstance(temperature, Tensor) else None
        ctx.temperature = None if learnt is not None else temperature
        ctx.save_for_backward(learnt, bias, *rows, *found)
        return loss.to(torch.promote_types(rows[0].dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        learnt, bias, first, second, negatives, *found = ctx.saved_tensors
        rows = first, second, negatives
        temperature = ctx.temperature if learnt is None else learnt
        if torch.is_grad_enabled() or differentiates_itself(grad):
            result = _composed_grads(ctx, grad, learnt, bias, rows)
        elif ctx.grads_in_forward:
            result = [x if x is None else grad * x for x in found]
        else:
            result = _tiled_grads(ctx, grad, temperature, bias, rows, *found)
        d_temperature, d_bias, *d_rows = result
        narrow = (d if d is None else d.to(x.dtype) for d, x in zip(d_rows, rows, strict=True))
        return None, None, None, None, d_temperature, d_bias, *narrow


def _tiled_grads(
    ctx: Any,
    grad: Tensor,
    temperature: float | Tensor,
    bias: Tensor | None,
    rows: Rows,
    stat: Tensor,
) -> list[Tensor | None]:
    """The gradients on temperature, bias and rows, from tiles that are computed again."""
    kernels, problem, needs = ctx.kernels, ctx.problem, ctx.needs_input_grad[4:]
    with without_autocast(rows[0]):
        operands = prefix_operands(
            kernels.unit_rows, rows, ctx.ends, temperature, bias, problem, ctx.dtype
        )
        d_stat, d_positive = problem.criterion.loss_grad(stat, operands.positive)
        each = operands.positive.new_tensor(ctx.end_weights)[:, None]
        d_loss = each * (grad if ctx.weights is None else grad * ctx.weights)
        d_positive = d_loss * d_positive
        gradients = kernels.in_batch.backward(
            operands.r,
            operands.c,
            bias,
            problem,
            d_stat=d_loss * d_stat,
            stat=stat,
            needs=tile_needs(rows, bias, problem, needs),
            d_pos_logit=problem.d_pos_logit(d_positive),
            prefixes=operands.prefixes,
        )
        return operands.input_grads(
            kernels.unit_rows, rows, temperature, problem, gradients, d_positive, needs
        )


def _composed_grads(
    ctx: Any, grad: Tensor, learnt: Tensor | None, bias: Tensor | None, rows: Rows
) -> list[Tensor | None]:
    """The gradients on temperature, bias and rows, differentiable if they are to be."""

    def composed(temperature: float | Tensor, bias: Tensor | None, rows: Rows) -> Tensor:
        parts = [
            composition(
                prefix_of(rows, end), temperature, bias, ctx.weights, ctx.problem, ctx.dtype
            )
            * weight
            for end, weight in zip(ctx.ends, ctx.end_weights, strict=True)
        ]
        return torch.stack(parts).sum(0)

    needs = ctx.needs_input_grad[4:]
    return grads_of(composed, grad, ctx.temperature, (learnt, bias, *rows), needs)
