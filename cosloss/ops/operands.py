"""The operands of an in-batch loss: its embeddings scaled to logits, and their positives.

With u = z / |z|, rows R = u / sqrt(T) for a temperature T, and columns C likewise, the logits are
R C^T + b. A bias of each column is a further column of C, beside ones in R. A loss L reaches T
through R, C and the positives alone, all of them powers of T:

    grad_T = -(<R, grad_R> + <C, grad_C>) / 2T - sum_i p_i grad_p_i / T,    p_i = <r_i, r_pair(i)>.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn.functional import pad

from cosloss.kernels.stats import Gradients
from cosloss.problem import Problem

Rows = tuple[Tensor, Tensor | None, Tensor | None]  # a first view, a second, and further negatives


@dataclass
class Operands:
    """The factors of the logit matrix, and the logits of the pairs.

    r: (N, D). c: (M, D), or None where the columns are the rows.
    pair: each row's logit with its pair, first view first, or its distance 1 - S where the
        criterion wants that; None of a single view.
    norms: of the rows, and of the further negatives.
    scale: what the unit rows were multiplied by.
    bias: on every logit, 0-d. column_bias: (M,), which r and c have in their last columns.
    """

    r: Tensor
    c: Tensor | None
    pair: Tensor | None
    norms: tuple[Tensor, ...]
    scale: float | Tensor
    bias: Tensor | None = None
    column_bias: Tensor | None = None
    appended: int = 0  # columns of the column bias

    def add_column_bias(self, bias: Tensor) -> None:
        """Give r and c the columns whose product is the bias, to float32's last digit.

        In narrow products it would be rounded: it is the sum of three numbers of 8 bits.
        """
        assert self.c is not None
        parts = [bias.to(self.c.dtype)]
        if bias.dtype != torch.float64:
            parts, rest = [], bias
            for _ in range(3):
                parts.append(rest.bfloat16().to(bias.dtype))
                rest = rest - parts[-1]
        columns = torch.stack(parts, 1).to(self.c.dtype)
        self.r = torch.cat([self.r, self.r.new_ones(self.r.shape[0], len(parts))], 1)
        self.c = torch.cat([self.c, columns], 1)
        self.column_bias, self.appended = bias, len(parts)

    @property
    def nbytes(self) -> int:
        """The memory of r and c, where they are views of one tensor counted for each."""
        return self.r.nbytes + (0 if self.c is None else self.c.nbytes)

    def release(self) -> None:
        """Hand back the memory of r and c, which serves the gradients."""
        self.r, self.c = self.r.new_empty(0), None


def operands_of(
    unit_rows: ModuleType,
    rows: Rows,
    temperature: float | Tensor,
    bias: Tensor | None,
    problem: Problem,
    dtype: torch.dtype | None,
) -> Operands:
    """The operands by a backend's `unit_rows`, in the products' dtype, or None for a wide one.

    Where a share of S / T alone has a gradient, the logits are S / (share T).
    """
    share = problem.criterion.share
    scale = (temperature if share is None else temperature * share) ** -0.5
    operands = _without_bias(unit_rows, rows, scale, problem, dtype)
    if has_columns(bias):
        operands.add_column_bias(bias)
    else:
        operands.bias = bias
    return operands


def has_columns(bias: Tensor | None) -> TypeGuard[Tensor]:
    """Whether there is a bias of each column."""
    return bias is not None and bias.ndim == 1


def _without_bias(
    unit_rows: ModuleType,
    rows: Rows,
    scale: float | Tensor,
    problem: Problem,
    dtype: torch.dtype | None,
) -> Operands:
    views, negatives = views_of(rows), rows[2]
    distance = problem.criterion.distance
    r, norm, pair = unit_rows.forward(views, scale=scale, dtype=None if distance else dtype)
    n = views[0].shape[0]
    if distance:
        pair = _distance(r[:n], r[n:]).repeat(2)
        r = r if dtype is None else r.to(dtype)
    if problem.self_similarity:
        return Operands(r, None, pair, (norm,), scale)
    r, c = r[:n], r[n:]
    if negatives is None:
        return Operands(r, c, pair, (norm,), scale)
    others, norm_c, _ = unit_rows.forward([negatives], scale=scale, dtype=dtype)
    c = torch.cat([c, others]) if problem.negatives_beside else others
    return Operands(r, c, pair, (norm, norm_c), scale)


def positives_of(operands: Operands, problem: Problem, class_sums: Tensor | None = None) -> Tensor:
    """Each loss's positive; class_sums: of all columns where they are more than the rows."""
    r, pair, bias = operands.r, operands.pair, operands.bias
    if problem.positives is not None:
        if class_sums is None:
            class_sums = problem.positives.class_sums(r)
        return problem.positives.mean_logits(r, class_sums)
    n = r.shape[0]
    if pair is None:  # of a single view: the loss has none
        return r.new_zeros(n, dtype=torch.promote_types(r.dtype, torch.float32))
    positive = pair if problem.column_losses else pair[:n]
    if operands.column_bias is not None:
        return positive + operands.column_bias[:n].repeat(positive.shape[0] // n)
    return positive if bias is None else positive + bias


def input_grads(
    unit_rows: ModuleType,
    rows: Rows,
    temperature: float | Tensor,
    problem: Problem,
    operands: Operands,
    gradients: Gradients,
    d_positive: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients on temperature, bias and rows, where needed, from those on the operands."""
    pair, norms = operands.pair, operands.norms
    needs_temperature, needs_bias, *needs_rows = needs
    grad_r, grad_c, grad_bias = _without_bias_columns(gradients, operands, d_positive)
    views, negatives = views_of(rows), rows[2]
    d_pair = d_pair_of(operands, d_positive, problem)
    d_temperature = None
    if isinstance(temperature, Tensor) and needs_temperature:
        along = _inner(operands.r, grad_r)
        if operands.c is not None:
            along = along + _inner(operands.c, grad_c)
        d_temperature = temperature_grad(temperature, along, pair, d_pair)
    if d_pair is not None and pair is not None and d_pair.shape != pair.shape:
        d_pair = pad(d_pair, (0, pair.shape[0] - d_pair.shape[0]))
    operands.release()
    d_views: list[Tensor | None] = [None, None]
    d_negatives = None
    scale = operands.scale
    if any(needs_rows[:2]):
        of_second = negatives is None or problem.negatives_beside
        grad_second = grad_c[: views[0].shape[0]] if of_second and grad_c is not None else None
        grads: Sequence[Tensor | None] = [grad_r, grad_second]
        if problem.self_similarity:
            grads = [None] if grad_r is None else grad_r.chunk(len(views))
        needed = needs_rows[: len(views)]
        d_views[: len(views)] = unit_rows.backward(
            grads[: len(views)], d_pair, views, norms[0], needed, scale=scale
        )
    if negatives is not None and needs_rows[2]:
        assert grad_c is not None
        (d_negatives,) = unit_rows.backward(
            [grad_c[-negatives.shape[0] :]],
            None,
            [negatives],
            norms[1],
            [True],
            scale=scale,
        )
    return [d_temperature, grad_bias if needs_bias else None, *d_views, d_negatives]


def d_pair_of(operands: Operands, d_positive: Tensor, problem: Problem) -> Tensor | None:
    """The gradient on the pairs' products that have one, the first view's first."""
    if operands.pair is None:
        return None
    d_pair = -d_positive if problem.criterion.distance else d_positive
    return d_pair.to(operands.pair.dtype)


def temperature_grad(
    temperature: Tensor, along: Tensor, pair: Tensor | None, d_pair: Tensor | None
) -> Tensor:
    """The gradient on the temperature; along: <R, grad_R> + <C, grad_C>, 0-d, float64."""
    if pair is not None and d_pair is not None:
        along = along + 2 * _inner(pair[: d_pair.shape[0]], d_pair)
    return (-along / (2 * temperature.to(along))).to(temperature)


def _without_bias_columns(
    gradients: Gradients, operands: Operands, d_positive: Tensor
) -> Gradients:
    """The gradients on r and c as they are without the bias, and on the bias, the positives' too.

    It leaves the operands without those columns.
    """
    grad_r, grad_c, grad_bias = gradients
    if operands.column_bias is None:
        if grad_bias is not None:
            grad_bias = grad_bias + d_positive.sum().to(grad_bias.dtype)
        return grad_r, grad_c, grad_bias
    assert operands.c is not None
    n, d = operands.r.shape[0], operands.r.shape[1] - operands.appended
    if grad_c is not None:
        grad_bias = grad_c[:, d].to(operands.column_bias.dtype, copy=True)
        grad_bias[:n] += d_positive.view(-1, n).sum(0).to(grad_bias.dtype)
    operands.r, operands.c = operands.r[:, :d], operands.c[:, :d]
    grad_r, grad_c = (x if x is None else x[:, :d].contiguous() for x in (grad_r, grad_c))
    return grad_r, grad_c, grad_bias


def tile_needs(
    rows: Rows, bias: Tensor | None, problem: Problem, needs: Sequence[bool]
) -> tuple[bool, bool, bool]:
    """Which gradients are needed: on r, c and a bias on every logit."""
    temperature, needs_bias, first, second, negatives = needs
    if problem.self_similarity:
        return temperature or first or second, False, needs_bias
    columns = second if rows[2] is None else negatives or (problem.negatives_beside and second)
    if has_columns(bias):
        return temperature or first, temperature or columns or needs_bias, False
    return temperature or first, temperature or columns, needs_bias


def views_of(rows: Rows) -> list[Tensor]:
    first, second, _ = rows
    return [first] if second is None else [first, second]


def _inner(x: Tensor, grad: Tensor | None) -> Tensor:
    """<x, grad>, added up in float64."""
    assert grad is not None
    rows = (x * grad).sum(-1) if x.ndim == 2 else x * grad
    return rows.sum(dtype=torch.float64)


def _distance(u1: Tensor, u2: Tensor) -> Tensor:
    """1 - <u1, u2> of unit or zero rows, with a small relative error where it is small."""
    # |u1 - u2|^2 / 2 is that for two unit rows; a zero row's square lacks its half
    halves = sum((u.detach() == 0).all(1).to(u.dtype) / 2 for u in (u1, u2))
    return (u1 - u2).square().sum(1) / 2 + halves
