"""The statistics of a logit matrix and the gradients through it, by Triton's kernels.

Shapes: rows R (N, D); columns C (M, D), or None where they are the rows; logits X = R C^T + bias,
(N, M); statistics (N,) in float64, or (N + M,) where columns have losses of their own, rows first.
Logits, sums and gradients are in float32 whatever dtype the products take.
"""

from ctypes import c_float
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from cosloss.criteria import Criterion, empty_lse
from cosloss.kernels.inputs import InputGrads, Inputs
from cosloss.kernels.schedule import Needs
from cosloss.kernels.stats import Gradients, LossGrads, loss_grads
from cosloss.kernels.triton import block_shapes
from cosloss.kernels.triton.card import card_of
from cosloss.kernels.triton.in_batch_fwd import in_batch_fwd_kernel
from cosloss.kernels.triton.in_batch_grads import Matrix, gradient, matrix_of, source_grads
from cosloss.kernels.triton.in_batch_stats import in_batch_stats_kernel, in_batch_total_kernel
from cosloss.kernels.triton.sources import reach
from cosloss.kernels.triton.tile import diagonals_of, ids_of, launch, limits_of, precision
from cosloss.kernels.triton.tuning import launch_fastest
from cosloss.problem import Problem

# float16's d_logits are scaled to at most this: the smallest that count are normal numbers
LARGEST_FLOAT16_GRAD = 2.0**13
# chunks of a symmetric matrix's rows: 528 pairs of them, four for each of 132 multiprocessors
CHUNKS = 32
KEEPS_TILES = False  # a gradient that comes early saves no work
SHARES_PREFIXES = False
REACHES_INPUTS = True
NUM_PARTIALS = 32  # partial sums that a program adds up at once
STATS_BLOCK = 64  # rows whose sums it adds up
# of `in_batch_stats_kernel`, each None where it is not written or read
OUTPUTS = (
    *("out", "positive", "weights", "d_stat", "shift", "d_positive", "losses"),
    "FORMULA",
)

Partials = tuple[Tensor | None, Tensor | None]


class Folded(NamedTuple):
    """A loss that the forward kernels computed, and what the backward pass needs of it.

    loss: 0-d, float32. grads: the gradient on the statistics. d_positive: on each loss's positive.
    """

    loss: Tensor
    grads: LossGrads
    d_positive: Tensor


def forward(r: Tensor, c: Tensor | None, bias: Tensor | None, problem: Problem) -> Tensor:
    """Every loss's statistic."""
    n, row_sums, column_sums = _sums(r, c, bias, problem)
    criterion, m = problem.criterion, r.shape[0] if c is None else c.shape[0]
    column_losses = problem.column_losses and c is not None
    out = r.new_empty(n + m if column_losses else n, dtype=torch.float64)
    _add_up(row_sums, criterion, out=out[:n])
    if column_losses:
        _add_up(column_sums, criterion, out=out[n:])
    return out


def folds(problem: Problem, bias: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether `forward_folded` computes the loss of a problem whose products are of that dtype."""
    plain = problem.criterion.formula is not None and problem.positives is None and bias is None
    return plain and dtype != torch.float16  # whose gradients are scaled by the largest


def forward_folded(
    r: Tensor, c: Tensor | None, problem: Problem, *, weights: Tensor | float, positive: Tensor
) -> Folded:
    """sum_i weights_i loss_i, with all that depends on a loss alone in the statistics' kernel."""
    n, row_sums, column_sums = _sums(r, c, None, problem)
    criterion = problem.criterion
    d_stat, shift, d_positive = (torch.empty_like(positive) for _ in range(3))
    given, weight = None, (1.0, 0.0)
    if isinstance(weights, Tensor):
        given = weights.to(positive.dtype)
    else:  # a kernel takes a number in float32
        rounded = c_float(weights).value
        weight = rounded, weights - rounded
    sides = [(row_sums, slice(0, n))]
    if positive.shape[0] > n:
        sides.append((column_sums, slice(n, None)))
    starts = [0, *accumulate(_programs(positive[part].shape[0]) for _, part in sides)]
    losses = r.new_empty(starts[-1], dtype=torch.float64)
    for (sums, part), start in zip(sides, starts, strict=False):
        _add_up(
            sums,
            criterion,
            positive=positive[part],
            weights=None if given is None else given[part],
            weight=weight,
            d_stat=d_stat[part],
            shift=shift[part],
            d_positive=d_positive[part],
            losses=losses[start:],
            FORMULA=criterion.formula,
        )
    total = r.new_empty((), dtype=torch.float32)
    launch(
        in_batch_total_kernel, (1,), like=r, losses=losses, out=total, count=starts[-1], BLOCK=1024
    )
    shifts: tuple[Tensor | None, Tensor | None] = (None, None)
    if criterion.kind == "logsumexp":
        shifts = problem.split(shift, r, c)
    return Folded(total, LossGrads(*problem.split(d_stat, r, c), *shifts, None, None), d_positive)


def backward(
    r: Tensor,
    c: Tensor | None,
    bias: Tensor | None,
    problem: Problem,
    *,
    d_stat: Tensor,
    stat: Tensor,
    needs: Needs,
    d_pos_logit: Tensor | None = None,
) -> Gradients:
    """Gradients on r, c and bias, each only where `needs` asks, from that on the statistics.

    d_pos_logit: like the statistics, the gradient on the logit of each of a row's positives.
    """
    matrix = _matrix(r, c, bias, problem, d_stat, stat, d_pos_logit)
    grad_r = grad_c = grad_bias = None
    if needs[0] or needs[2]:
        parts, sums = gradient(matrix, needs[2])
        grad_r, grad_bias = _total(parts), _bias_grad(sums, bias)
    if c is not None and needs[1]:
        grad_c = _total(gradient(matrix.transposed())[0])
    return grad_r if needs[0] else None, grad_c, grad_bias


def input_grads(
    r: Tensor,
    c: Tensor | None,
    bias: Tensor | None,
    problem: Problem,
    inputs: Inputs,
    *,
    d_stat: Tensor,
    stat: Tensor,
    d_pos_logit: Tensor | None = None,
) -> InputGrads:
    """The same on what r and c were scaled from."""
    return _input_grads(_matrix(r, c, bias, problem, d_stat, stat, d_pos_logit), inputs)


def input_grads_folded(
    r: Tensor, c: Tensor | None, problem: Problem, inputs: Inputs, folded: Folded
) -> InputGrads:
    """The same of a loss that is folded, for a gradient of 1 on it."""
    return _input_grads(matrix_of(*_operands(r, c), None, problem, folded.grads, None), inputs)


def _matrix(
    r: Tensor,
    c: Tensor | None,
    bias: Tensor | None,
    problem: Problem,
    d_stat: Tensor,
    stat: Tensor,
    d_pos_logit: Tensor | None,
) -> Matrix:
    rows, columns = _operands(r, c)
    scale = None
    if rows.dtype == torch.float16:
        largest = d_stat.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        scale = (largest / LARGEST_FLOAT16_GRAD).float()
        d_stat = d_stat / scale
        d_pos_logit = None if d_pos_logit is None else d_pos_logit / scale
    grads = loss_grads(problem, d_stat, stat, d_pos_logit, r, c, torch.float32)
    return matrix_of(rows, columns, bias, problem, grads, scale)


def _input_grads(matrix: Matrix, inputs: Inputs) -> InputGrads:
    found, alongs, sums = source_grads(matrix, inputs.rows, inputs, inputs.bias)
    if any(source.wanted for source in inputs.columns):
        on_columns, more, _ = source_grads(matrix.transposed(), inputs.columns, inputs)
        found, alongs = found + on_columns, alongs + more
    else:
        found += [None] * len(inputs.columns)
    found += reach([None] * len(inputs.apart), inputs.apart, inputs)[0]
    along = torch.cat(alongs).sum() if inputs.along else None
    return InputGrads(found, along, _bias_grad(sums, matrix.bias))


def _total(parts: Tensor) -> Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def _bias_grad(sums: Tensor | None, bias: Tensor | None) -> Tensor | None:
    if sums is None or bias is None:
        return None
    return sums.sum(dtype=torch.float64).to(bias.dtype)


def _sums(
    r: Tensor, c: Tensor | None, bias: Tensor | None, problem: Problem
) -> tuple[int, Partials, Partials]:
    """The number of rows, and the partial sums of rows and of columns."""
    rows, columns = _operands(r, c)
    n, d = rows.shape
    m = columns.shape[0]
    column_losses = c is None or problem.column_losses
    criterion, mask = problem.criterion, problem.mask
    row_chunks, column_chunks = _chunks(n, m, c is None)
    row_sums = column_sums = _partials(r, column_chunks, n, criterion)
    if c is not None:
        column_sums = _partials(r, row_chunks, m, criterion) if column_losses else (None, None)
    launch_fastest(
        in_batch_fwd_kernel,
        block_shapes.forward_configs(d, rows.element_size(), card_of(r)),
        (column_chunks, row_chunks),
        like=r,
        key=("KIND", "SYMMETRIC", "COLUMN_LOSSES"),
        r=rows,
        c=columns,
        bias=bias,
        row_sums=row_sums,
        column_sums=column_sums,
        ids=ids_of(mask),
        limits=limits_of(mask),
        diagonals=diagonals_of(mask),
        rows=n,
        columns=m,
        D=d,
        margin=criterion.margin,
        KIND=criterion.kind,
        SYMMETRIC=c is None,
        COLUMN_LOSSES=column_losses,
        DIAGONALS=len(mask.diagonals),
        PRECISION=precision(rows.dtype),
        EVEN=block_shapes.even(d, rows.element_size()),
    )
    return n, row_sums, column_sums


def _operands(r: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = r.contiguous()
    return rows, rows if c is None else c.contiguous()


def _chunks(rows: int, columns: int, symmetric: bool) -> tuple[int, int]:
    """Into how many chunks rows and columns are dealt, so that enough pairs of them run at once."""
    row_blocks, column_blocks = (
        triton.cdiv(x, block_shapes.SMALLEST_BLOCK) for x in (rows, columns)
    )
    of_columns = min(CHUNKS, column_blocks)
    if symmetric:
        return of_columns, of_columns
    pairs = CHUNKS * (CHUNKS + 1) // 2
    of_rows = min(triton.cdiv(pairs, of_columns), row_blocks)
    return of_rows, min(triton.cdiv(pairs, of_rows), column_blocks)


def _partials(r: Tensor, number: int, count: int, criterion: Criterion) -> Partials:
    """Memory for partial sums, and for the largest logits where they are kept."""
    sums = r.new_empty(number, count, dtype=torch.float32)
    return sums, torch.empty_like(sums) if criterion.kind == "logsumexp" else None


def _add_up(partials: Partials, criterion: Criterion, **outputs: Any) -> None:
    """Write the statistics that partial sums add up to, or what a loss's formula makes of them."""
    sums, largest = partials
    assert sums is not None
    number, count = sums.shape
    given = dict.fromkeys(OUTPUTS) | {"weight": (1.0, 0.0)} | outputs
    launch(
        in_batch_stats_kernel,
        (_programs(count),),
        like=sums,
        sums=sums,
        largest=largest,
        partials=number,
        count=count,
        empty=empty_lse(torch.float64),
        empty_shift=empty_lse(torch.float32),
        KIND=criterion.kind,
        NUM_PARTIALS=NUM_PARTIALS,
        BLOCK=STATS_BLOCK,
        **given,
    )


def _programs(count: int) -> int:
    """The number of programs that add up so many sums."""
    return int(triton.cdiv(count, STATS_BLOCK))
