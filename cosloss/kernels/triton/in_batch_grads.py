"""The launches of the backward kernel: a side's gradient, or where it goes on to, its sources'.

A side is the rows or the columns of the logit matrix; its sources are the embeddings that it was
scaled from, one part of it after the other (`cosloss.kernels.inputs`).
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from cosloss.kernels.inputs import Inputs, Source
from cosloss.kernels.stats import LossGrads
from cosloss.kernels.triton import block_shapes
from cosloss.kernels.triton.card import card_of
from cosloss.kernels.triton.in_batch_bands import in_batch_bands_kernel
from cosloss.kernels.triton.in_batch_bwd import in_batch_bwd_kernel
from cosloss.kernels.triton.sources import (
    Part,
    as_two,
    common_of,
    found_in,
    part_of,
    reach,
)
from cosloss.kernels.triton.tile import diagonals_of, ids_of, limits_of, precision
from cosloss.kernels.triton.tuning import launch_fastest
from cosloss.problem import Mask, Problem

BAND_BYTES = 64 * 2**20  # of d_logits in memory at a time
BAND_ROWS = 128  # a multiple of which a band has


class Side(NamedTuple):
    """Its vectors, the loss's gradient on each, and their classes."""

    vectors: Tensor
    d_stat: Tensor | None
    shift: Tensor | None
    d_pos: Tensor | None
    classes: Tensor | None


class Matrix(NamedTuple):
    """A logit matrix as one side's gradient sees it: that side, the other, and what they share.

    scale: 0-d, what the gradients on the statistics were divided by; None is 1.
    """

    own: Side
    other: Side
    problem: Problem
    mask: Mask
    bias: Tensor | None
    scale: Tensor | None

    def transposed(self) -> "Matrix":
        """The same of the other side."""
        return self._replace(own=self.other, other=self.own, mask=self.mask.transposed())


def matrix_of(
    rows: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    problem: Problem,
    grads: LossGrads,
    scale: Tensor | None,
) -> Matrix:
    """The matrix as the rows' gradient sees it."""
    classes: tuple[Tensor | None, Tensor | None] = (None, None)
    if problem.positives is not None:
        classes = problem.positives.rows.contiguous(), problem.positives.columns.contiguous()
    own = Side(rows, grads.d_rows, grads.row_shift, grads.d_row_pos, classes[0])
    other = Side(columns, grads.d_columns, grads.column_shift, grads.d_column_pos, classes[1])
    return Matrix(own, other, problem, problem.mask, bias, scale)


def gradient(matrix: Matrix, sums: bool = False) -> tuple[Tensor, Tensor | None]:
    """The gradient on the own side, (S, N, D) whose S add up, in float32; its sums of d_logits."""
    vectors = matrix.own.vectors
    if block_shapes.in_bands(vectors):
        return _from_bands(matrix, sums)
    splits = _splits(matrix)
    grad = vectors.new_empty(splits, *vectors.shape, dtype=torch.float32)
    d_logit_sums = grad.new_empty(splits, vectors.shape[0]) if sums else None
    _launch(matrix, splits, grad, d_logit_sums)
    return grad, d_logit_sums


def _from_bands(matrix: Matrix, sums: bool) -> tuple[Tensor, Tensor | None]:
    """The same, from bands of d_logits in memory."""
    vectors, columns = matrix.own.vectors, matrix.other.vectors
    n, d = vectors.shape
    m, size = columns.shape[0], vectors.element_size()
    grad = vectors.new_empty(1, n, d, dtype=torch.float32)
    height = min(n, max(BAND_BYTES // (size * m) // BAND_ROWS, 1) * BAND_ROWS)
    band = vectors.new_empty(height, m)
    blocks = triton.cdiv(m, block_shapes.SMALLEST_BLOCK)
    # a larger block leaves the rest of them 0
    d_logit_sums = grad.new_zeros(blocks, n) if sums else None
    for first in range(0, n, height):
        last = min(first + height, n)

        def grid(chosen: Any, rows: int = last - first) -> tuple[int, int]:
            return triton.cdiv(m, chosen["BLOCK"]), triton.cdiv(rows, chosen["BLOCK"])

        launch_fastest(
            in_batch_bands_kernel,
            block_shapes.forward_configs(d, size, card_of(vectors)),
            grid,
            like=vectors,
            key=("KIND",),
            band=band,
            d_logit_sums=d_logit_sums,
            first=first,
            last=last,
            rows=n,
            **_numbers(matrix),
        )
        _multiply(band[: last - first], columns, out=grad[0, first:last])
    if matrix.scale is not None:
        grad *= matrix.scale
        d_logit_sums = None if d_logit_sums is None else d_logit_sums * matrix.scale
    return grad, d_logit_sums


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write a b, of half precision, in float32."""
    if a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:  # the interpreter's tensors
        torch.mm(a.float(), b.float(), out=out)


def source_grads(
    matrix: Matrix, sources: Sequence[Source], inputs: Inputs, sums: bool = False
) -> tuple[list[Tensor | None], list[Tensor], Tensor | None]:
    """The gradients on the own side's sources, <r, grad_r> of its rows, and its sums of d_logits.

    sums: needs all sources to be wanted.
    """
    ends = list(accumulate(source.x.shape[0] for source in sources))
    starts = [0, *ends[:-1]]
    vectors = matrix.own.vectors
    if _splits(matrix) > 1 or not block_shapes.reaches(vectors):
        grad, d_logit_sums = gradient(matrix, sums)
        on_sources = [grad[:, start:end] for start, end in zip(starts, ends, strict=True)]
        return *reach(on_sources, sources, inputs), d_logit_sums
    d_logit_sums = None
    if sums:
        d_logit_sums = vectors.new_empty(1, vectors.shape[0], dtype=torch.float32)
    parts = [part_of(x, inputs) if x.wanted else None for x in sources]
    given = [(start, part) for start, part in zip(starts, parts, strict=True) if part is not None]
    if given:
        _launch(matrix, 1, None, d_logit_sums, given, common_of(inputs, vectors))
    return *found_in(parts), d_logit_sums


def _launch(
    matrix: Matrix,
    splits: int,
    grad: Tensor | None,
    d_logit_sums: Tensor | None,
    given: Sequence[tuple[int, Part]] = (),
    common: tuple[Any, ...] | None = None,
) -> None:
    """The gradient on all rows, or on the sources of some: each one's first row, and its part."""
    own = matrix.own
    n, d = own.vectors.shape
    size = own.vectors.element_size()
    starts = [start for start, _ in given]
    parts = [part for _, part in given]
    counts = [part.rows for _, part in given] or [n]
    widths = triton.cdiv(d, block_shapes.gradient_width(d, size))
    launch_fastest(
        in_batch_bwd_kernel,
        block_shapes.backward_configs(d, size, card_of(own.vectors), matrix.problem.criterion.kind),
        lambda chosen: (sum(triton.cdiv(x, chosen["BLOCK_M"]) for x in counts), widths, splits),
        like=own.vectors,
        key=("KIND", "REACHES"),
        grad_scale=matrix.scale,
        grad=grad,
        d_logit_sums=d_logit_sums,
        starts=(*starts, 0, 0)[:2],
        **dict(zip(("first_part", "second_part"), as_two(parts), strict=True)),
        common=common,
        REACHES=grad is None,
        rows=n,
        **_numbers(matrix),
    )


def _numbers(matrix: Matrix) -> dict[str, Any]:
    """What every kernel takes of a matrix."""
    own, other, problem, mask, bias, _ = matrix
    d = own.vectors.shape[1]
    return {
        "r": own.vectors,
        "c": other.vectors,
        "bias": bias,
        "d_rows": own.d_stat,
        "d_columns": other.d_stat,
        "row_shift": own.shift,
        "column_shift": other.shift,
        "ids": ids_of(mask),
        "limits": limits_of(mask),
        "diagonals": diagonals_of(mask),
        "classes": (own.classes, other.classes),
        "d_pos": None if own.d_pos is None else (own.d_pos, other.d_pos),
        "columns": other.vectors.shape[0],
        "D": d,
        "margin": problem.criterion.margin,
        "KIND": problem.criterion.kind,
        "DIAGONALS": len(mask.diagonals),
        "PRECISION": precision(own.vectors.dtype),
        "EVEN": block_shapes.even(d, own.vectors.element_size()),
    }


def _splits(matrix: Matrix) -> int:
    """Into how many parts the columns are dealt, so that a small batch occupies the device."""
    vectors = matrix.own.vectors
    n, d = vectors.shape
    widths = triton.cdiv(d, block_shapes.gradient_width(d, vectors.element_size()))
    programs = triton.cdiv(n, 64) * widths
    columns = matrix.other.vectors.shape[0]
    return max(1, min(2 * card_of(vectors).processors // programs, triton.cdiv(columns, 128)))
