"""The engine of the in-batch losses: totals of a logit matrix, and the gradient, tile by tile.

Shapes: rows R (N, D); columns C (M, D), or None where they are the rows; logits X = R C^T + bias,
(N, M); totals (N,) in float64, or (N + M,) where the columns have a loss of their own, rows first.
Logits, sums and gradients are in float32 whatever dtype the products take.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from cosloss.kernels.eager.tiles import Excluded
from cosloss.kernels.eager.totals import Totals, empty_total
from cosloss.kernels.eager.walk import Matrix
from cosloss.kernels.triton import tuning
from cosloss.kernels.triton.in_batch_totals import in_batch_totals_kernel
from cosloss.kernels.triton.tile import ids_of, launch, offsets_of, precision

# float16 weights are made this large: the smallest that count are normal numbers
FLOAT16_UNIT = 2.0**13
# chunks of a symmetric matrix's rows: 528 pairs of them, four for each of 132 multiprocessors
CHUNKS = 32

Sums = tuple[Tensor | None, Tensor | None]


class Side(NamedTuple):
    """The rows or the columns: unit vectors, and where they have losses, coefficients and totals.

    For a logsumexp a weight is taken from the totals, else from the coefficients alone. Where
    positives are several, the ids of their classes, and the gradient on the logit of each.
    """

    vectors: Tensor
    coefficients: Tensor | None
    totals: Tensor | None
    pulls: Tensor | None
    classes: Tensor | None


def forward(r: Tensor, c: Tensor | None, bias: Tensor | None, matrix: Matrix) -> Tensor:
    """The totals."""
    rows, columns = _operands(r, c, matrix)
    n, d = rows.shape
    m = columns.shape[0]
    two_way = c is None or matrix.two_way
    totals = matrix.loss.totals(r, r)
    row_chunks, column_chunks = _chunks(n, m, c is None)
    of_rows = of_columns = _sums(r, column_chunks, n, totals)
    if c is not None:
        of_columns = _sums(r, row_chunks, m, totals) if two_way else (None, None)
    size = rows.element_size()
    width, whole = tuning.forward_width(d, size)
    launch(
        tuning.forward_tuner(size, width, n >= tuning.LARGE),
        (column_chunks, row_chunks),
        r,
        *(rows, columns, bias, of_rows, of_columns),
        *(ids_of(matrix.excluded), offsets_of(matrix.excluded)),
        *(n, m, d, totals.margin),
        KIND=totals.kind,
        SYMMETRIC=c is None,
        TWO_WAY=two_way,
        DIAGONALS=len(matrix.excluded.offsets),
        PRECISION=precision(),
        WHOLE=whole,
        BLOCK_D=width,
    )
    out = r.new_empty(n + m if two_way and c is not None else n, dtype=torch.float64)
    _add_up(of_rows, out[:n], totals)
    if out.shape[0] > n:
        _add_up(of_columns, out[n:], totals)
    return out


def backward(
    grad: Tensor,
    total: Tensor,
    r: Tensor,
    c: Tensor | None,
    bias: Tensor | None,
    matrix: Matrix,
    needs: tuple[bool, bool, bool],
    pulls: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients on r, c and bias, each only where `needs` asks, from the gradient on the totals.

    pulls: like the totals, the gradient on the logit of each of a row's positives.
    """
    rows, columns = _operands(r, c, matrix)
    totals = matrix.loss.totals(r, r)
    unit = None
    if rows.dtype == torch.float16:
        largest = grad.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        unit = (largest / FLOAT16_UNIT).float()
        grad, pulls = grad / unit, None if pulls is None else pulls / unit
    coefficients = totals.coefficients(grad, total, torch.float32).float()
    shifts = None
    if totals.kind == "logsumexp":
        shifts = total.clamp(min=empty_total(torch.float32)).float()
    per_loss = coefficients, shifts, None if pulls is None else pulls.float()
    of_rows, of_columns = _sides(rows, columns, c is None, matrix, per_loss)
    pairs = matrix.excluded
    grad_r = grad_c = grad_bias = None
    if needs[0] or needs[2]:
        grad_r, sums = _gradient(of_rows, of_columns, bias, unit, pairs, totals, needs[2])
        if bias is not None and sums is not None:
            grad_bias = sums.sum(dtype=torch.float64).to(bias.dtype)
    if c is not None and needs[1]:
        swapped = pairs.transposed()
        grad_c, _ = _gradient(of_columns, of_rows, bias, unit, swapped, totals, False)
    return grad_r if needs[0] else None, grad_c, grad_bias


def _gradient(
    own: Side,
    other: Side,
    bias: Tensor | None,
    unit: Tensor | None,
    pairs: Excluded,
    totals: Totals,
    sums: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradient on a side's vectors in float32, and if asked for, its rows' sums of weights."""
    n, d = own.vectors.shape
    m = other.vectors.shape[0]
    size = own.vectors.element_size()
    width, whole = tuning.backward_width(d, size)
    parts = triton.cdiv(d, width)
    splits = _splits(own.vectors, m, parts)
    grad = own.vectors.new_empty(splits, n, d, dtype=torch.float32)
    weight_sums = grad.new_empty(splits, n) if sums else None
    launch(
        tuning.backward_tuner(size, width, n >= tuning.LARGE),
        lambda chosen: (triton.cdiv(n, chosen["BLOCK_M"]), parts, splits),
        grad,
        *(own.vectors, other.vectors, bias),
        *(own.coefficients, other.coefficients, own.totals, other.totals),
        *(unit, grad, weight_sums),
        *(ids_of(pairs), offsets_of(pairs)),
        (own.classes, other.classes),
        None if own.pulls is None else (own.pulls, other.pulls),
        *(n, m, d, totals.margin),
        KIND=totals.kind,
        DIAGONALS=len(pairs.offsets),
        PRECISION=precision(),
        WHOLE=whole,
        BLOCK_D=width,
        BLOCK_K=tuning.PART[size],
    )
    return grad[0] if splits == 1 else grad.sum(0), weight_sums


def _operands(r: Tensor, c: Tensor | None, matrix: Matrix) -> tuple[Tensor, Tensor]:
    rows = r.to(matrix.dtype).contiguous()
    return rows, rows if c is None else c.to(matrix.dtype).contiguous()


def _sides(
    rows: Tensor,
    columns: Tensor,
    symmetric: bool,
    matrix: Matrix,
    per_loss: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> tuple[Side, Side]:
    """The rows' and the columns' side; per_loss: coefficients, totals and pulls of all losses."""

    def side(vectors: Tensor, part: slice | None, classes: Tensor | None) -> Side:
        coefficients, totals, pulls = (
            None if x is None or part is None else x[part] for x in per_loss
        )
        ids = None if classes is None else classes.contiguous()
        return Side(vectors, coefficients, totals, pulls, ids)

    n, positives = rows.shape[0], matrix.positives
    of_columns: slice | None = slice(n)
    if not symmetric:
        of_columns = slice(n, None) if matrix.two_way else None
    if positives is None:
        return side(rows, slice(n), None), side(columns, of_columns, None)
    return side(rows, slice(n), positives.rows), side(columns, of_columns, positives.columns)


def _chunks(rows: int, columns: int, symmetric: bool) -> tuple[int, int]:
    """Into how many chunks rows and columns are dealt, so that enough pairs of them run at once."""
    row_blocks, column_blocks = (triton.cdiv(x, tuning.SMALLEST_BLOCK) for x in (rows, columns))
    of_columns = min(CHUNKS, column_blocks)
    if symmetric:
        return of_columns, of_columns
    pairs = CHUNKS * (CHUNKS + 1) // 2
    of_rows = min(triton.cdiv(pairs, of_columns), row_blocks)
    return of_rows, min(triton.cdiv(pairs, of_rows), column_blocks)


def _sums(r: Tensor, lines: int, count: int, totals: Totals) -> Sums:
    """Memory for lines of sums, and for the greatest logits where they are kept."""
    partial = r.new_empty(lines, count, dtype=torch.float32)
    return partial, torch.empty_like(partial) if totals.kind == "logsumexp" else None


def _add_up(sums: Sums, out: Tensor, totals: Totals) -> None:
    partial, largest = sums
    assert partial is not None
    lines, count = partial.shape
    launch(
        in_batch_totals_kernel,
        (triton.cdiv(count, 64),),
        out,
        *(partial, largest, out, lines, count),
        empty=empty_total(torch.float64),
        KIND=totals.kind,
        LINES=32,
        BLOCK=64,
    )


def _splits(rows: Tensor, columns: int, parts: int) -> int:
    """Into how many parts the columns are dealt, so that a small batch occupies the device."""
    programs = triton.cdiv(rows.shape[0], 64) * parts
    return max(1, min(2 * tuning.processors(rows) // programs, triton.cdiv(columns, 128)))
