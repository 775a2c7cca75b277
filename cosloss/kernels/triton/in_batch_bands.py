"""The kernel that writes a band of d_logits, for gradients so wide that a library multiplies them.

A program that owns its rows' gradient computes all of the logits once for each part of a wide one.
Here they are computed once: a band of rows at a time, d_logits go to memory in the operands' dtype,
and the gradient on the band is their product with the columns.
"""

import triton
import triton.language as tl

from cosloss.kernels.triton.in_batch_bwd import d_logits_of
from cosloss.kernels.triton.tile import products


@triton.jit
def in_batch_bands_kernel(
    r,
    c,
    bias,
    d_rows,
    d_columns,
    row_shift,
    column_shift,
    band,
    d_logit_sums,
    ids,
    limits,
    diagonals,
    classes,
    d_pos,
    first,
    last,
    rows,
    columns,
    D,
    margin,
    KIND: tl.constexpr,
    DIAGONALS: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write d_logits of the rows from first to last, (last - first, columns), a tile a program.

    d_logit_sums: of each row over each block of columns, (blocks, rows), or None.
    """
    row = first + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < last
    x = products(r, c, row, column, rows, columns, D, BLOCK_D, PRECISION, False, False, EVEN)
    d_row = None
    shift = None
    if d_rows is not None:
        d_row = tl.load(d_rows + row, mask=inside, other=0)
        if KIND == "logsumexp":
            shift = tl.load(row_shift + row, mask=inside, other=0)
    d_logits = d_logits_of(
        x,
        bias,
        d_row,
        d_columns,
        shift,
        column_shift,
        ids,
        limits,
        diagonals,
        classes,
        d_pos,
        row,
        column,
        rows,
        columns,
        margin,
        KIND,
        DIAGONALS,
        False,
    )
    if d_logit_sums is not None:
        place = tl.program_id(0).to(tl.int64) * rows + row
        tl.store(d_logit_sums + place, tl.sum(d_logits, 1), mask=inside)
    pointers = band + (row - first).to(tl.int64)[:, None] * columns + column[None, :]
    mask = inside[:, None] & (column < columns)[None, :]
    tl.store(pointers, d_logits.to(band.dtype.element_ty), mask=mask)
