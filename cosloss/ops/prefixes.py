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
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import pad

from cosloss.distributed import Peers
from cosloss.kernels import dispatch
from cosloss.kernels.prefixes import Prefixes
from cosloss.kernels.stats import Gradients
from cosloss.modes import differentiates_itself, without_autocast
from cosloss.ops.in_batch import composition, grads_of, in_batch
from cosloss.ops.operands import (
    Rows,
    has_columns,
    operands_of,
    positives_of,
    tile_needs,
    views_of,
)
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


def prefix_of(rows: Rows, end: int) -> Rows:
    """The rows' first columns."""
    first, second, negatives = rows
    return (
        first[:, :end],
        None if second is None else second[:, :end],
        None if negatives is None else negatives[:, :end],
    )


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
            operands = _operands(
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


@dataclass
class PrefixOperands:
    """The factors of all prefixes' logits, as `cosloss.ops.operands.Operands` are of one matrix's.

    positive: (K, losses). pairs: (K, losses of both views) or None: the pairs' logits without bias.
    norms: each prefix's, as in `Operands`.
    """

    r: Tensor
    c: Tensor | None
    prefixes: Prefixes
    positive: Tensor
    pairs: Tensor | None
    norms: list[tuple[Tensor, ...]]
    scale: float | Tensor

    def input_grads(
        self,
        unit_rows: ModuleType,
        rows: Rows,
        temperature: float | Tensor,
        problem: Problem,
        gradients: Gradients,
        d_positive: Tensor,
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """The gradients on temperature, bias and rows, where needed, from those on the operands."""
        (grad_r, grad_c, grad_bias), (along_r, along_c) = gradients[:3], gradients[3:]
        assert along_r is not None
        assert along_c is not None
        n, views, negatives = rows[0].shape[0], views_of(rows), rows[2]
        needs_temperature, needs_bias, *needs_rows = needs
        of_second = negatives is None or problem.negatives_beside
        total = along_r.sum() if self.c is None else along_r.sum() + along_c.sum()
        if not problem.self_similarity:
            own = along_c[:, :n] if of_second else torch.zeros_like(along_r)
            along_views = torch.cat([along_r, own], 1)[:, : len(views) * n]
        else:
            along_views = along_r
        d_pairs = None
        if self.pairs is not None:
            sign = -1 if problem.criterion.distance else 1
            d_pairs = pad(sign * d_positive, (0, self.pairs.shape[1] - d_positive.shape[1]))
            of_pairs = d_pairs * (1 - self.pairs if problem.criterion.distance else self.pairs)
            total = total + 2 * of_pairs.sum()
            along_views = along_views + of_pairs + of_pairs.roll(n, 1)
        d_temperature = None
        if isinstance(temperature, Tensor) and needs_temperature:
            d_temperature = (-total / (2 * temperature.to(total))).to(temperature)
        if grad_bias is not None:
            grad_bias = grad_bias + d_positive.sum().to(grad_bias.dtype)
        self.r, self.c = self.r.new_empty(0), None  # their memory serves the gradients
        d_views: list[Tensor | None] = [None, None]
        d_negatives = None
        if any(needs_rows[:2]):
            grad_second = grad_c[:n] if of_second and grad_c is not None else None
            grads: list[Tensor | None] = [grad_r, grad_second]
            if problem.self_similarity:
                grads = [None] if grad_r is None else [*grad_r.chunk(len(views))]
            d_views[: len(views)] = self._through_rows(
                unit_rows, 0, grads[: len(views)], d_pairs, views, along_views, needs_rows
            )
        if negatives is not None and needs_rows[2]:
            assert grad_c is not None
            m = negatives.shape[0]
            (d_negatives,) = self._through_rows(
                unit_rows, 1, [grad_c[-m:]], None, [negatives], along_c[:, -m:], [True]
            )
        return [d_temperature, grad_bias if needs_bias else None, *d_views, d_negatives]

    def _through_rows(
        self,
        unit_rows: ModuleType,
        which: int,
        grads: Sequence[Tensor | None],
        d_pairs: Tensor | None,
        views: Sequence[Tensor],
        along: Tensor,
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """The gradients on the views whose norms are those, from those on their segments' rows.

        d_pairs: (K, V N), on the pairs' logits. along: (K, V N), <h, r> of each prefix alone.
        """
        wide = torch.promote_types(views[0].dtype, torch.float32)
        norms = [each[which] for each in self.norms]
        links = [unit_rows.ratio(*pair) for pair in pairwise(norms)]
        found: list[list[Tensor | None]] = []
        chained_along = chained_pairs = None
        for k, segment in reversed([*enumerate(self.prefixes.segments)]):
            own_along, own_pairs = along[k], None if d_pairs is None else d_pairs[k]
            if chained_along is not None:
                own_along = own_along + links[k] ** 2 * chained_along
            if own_pairs is not None and chained_pairs is not None:
                both = links[k] * links[k].roll(views[0].shape[0], 0)
                own_pairs = own_pairs + both * chained_pairs
            chained_along, chained_pairs = own_along, own_pairs
            found.append(
                unit_rows.backward(
                    [None if grad is None else grad[:, segment] for grad in grads],
                    None if own_pairs is None else own_pairs.to(wide),
                    [x[:, segment] for x in views],
                    norms[k],
                    needs[: len(views)],
                    scale=self.scale,
                    along=own_along,
                )
            )
        rest = views[0].shape[1] - self.prefixes.ends[-1]  # columns beyond the longest prefix
        return [
            None if parts[0] is None else pad(torch.cat([*reversed(parts)], 1), (0, rest))
            for parts in zip(*found, strict=True)
        ]


def _operands(
    unit_rows: ModuleType,
    rows: Rows,
    ends: tuple[int, ...],
    temperature: float | Tensor,
    bias: Tensor | None,
    problem: Problem,
    dtype: torch.dtype,
) -> PrefixOperands:
    """The operands, from those of each prefix in turn."""
    of_rows: list[Tensor] = []
    of_columns: list[Tensor] = []
    row_links: list[Tensor] = []
    column_links: list[Tensor] = []
    norms: list[tuple[Tensor, ...]] = []
    positives: list[Tensor] = []
    pairs: list[Tensor] = []
    n, begin = rows[0].shape[0], 0
    scale: float | Tensor = 1.0
    for end in ends:
        own = operands_of(unit_rows, prefix_of(rows, end), temperature, None, problem, dtype)
        own.bias = bias
        positives.append(positives_of(own, problem))
        if own.pair is not None:
            pairs.append(own.pair)
        of_rows.append(own.r[:, begin:end])
        if own.c is not None:
            of_columns.append(own.c[:, begin:end])
        before = norms[-1] if norms else own.norms
        links = [unit_rows.ratio(*pair) for pair in zip(before, own.norms, strict=True)]
        if problem.self_similarity:
            row_links.append(links[0])
        else:
            row_links.append(links[0][:n])
            of_keys = [links[0][n:]] if rows[2] is None or problem.negatives_beside else []
            column_links.append(torch.cat([*of_keys, *links[1:]]))
        norms.append(own.norms)
        begin, scale = end, own.scale
    linked = torch.stack(row_links)
    return PrefixOperands(
        torch.cat(of_rows, 1),
        torch.cat(of_columns, 1) if of_columns else None,
        Prefixes(ends, linked, torch.stack(column_links) if column_links else linked),
        torch.stack(positives),
        torch.stack(pairs) if pairs else None,
        norms,
        scale,
    )


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
        operands = _operands(
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
