"""The backward kernel of the in-batch losses: one pass in which a program owns its rows' gradient.

A program goes over the columns tile by tile, computes the logits again, and adds up

    grad_i = sum_j d_logit_ij c_j

in registers, d_logit as `cosloss.kernels.stats.LossGrads` has it. Where that is all of the gradient
on its rows, the program takes it on to the embeddings that these were scaled from. A gradient wider
than BLOCK_D is done in parts, each of which computes the logits; of a small batch the columns are
dealt out to `splits` programs, whose sums are added up afterwards.
"""

import triton
import triton.language as tl

from cosloss.kernels.triton.epilogue import write_whole_grads
from cosloss.kernels.triton.sources import ROWS_OF
from cosloss.kernels.triton.tile import (
    exponential,
    load_rows,
    products,
    same_ids,
    slope,
    with_mask,
)
from cosloss.kernels.triton.walk import masked_tile, masked_tiles, plain_tile, spans_of


@triton.jit
def in_batch_bwd_kernel(
    r,
    c,
    bias,
    d_rows,
    d_columns,
    row_shift,
    column_shift,
    grad_scale,
    grad,
    d_logit_sums,
    ids,
    limits,
    diagonals,
    classes,
    d_pos,
    starts,
    first_part,
    second_part,
    common,
    rows,
    columns,
    D,
    margin,
    KIND: tl.constexpr,
    REACHES: tl.constexpr,
    DIAGONALS: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad: where the gradient on all rows goes. REACHES: or rather on to two parts' embeddings.

    starts: the numbers of the parts' first rows. first_part, second_part: each a `Part`, or Nones.
    common: what `common_of` gives.
    """
    block = tl.program_id(0)
    begin, end = 0, rows
    if second_part[0] is not None:
        blocks = tl.cdiv(first_part[ROWS_OF], BLOCK_M)
        of_second = block >= blocks
        block = tl.where(of_second, block - blocks, block)
        begin = tl.where(of_second, starts[1], starts[0])
        end = begin + tl.where(of_second, second_part[ROWS_OF], first_part[ROWS_OF])
    elif REACHES:
        begin, end = starts[0], starts[0] + first_part[ROWS_OF]
    first_row = begin + block * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    inside = row < end
    part = tl.program_id(1) * BLOCK_D
    column_blocks = tl.cdiv(columns, BLOCK_N)
    share = tl.cdiv(column_blocks, tl.num_programs(2))
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, column_blocks)

    own = row
    if WHOLE:
        own = load_rows(r, row, rows, 0, D, BLOCK_D, False, EVEN)
    d_row = None
    shift = None
    if d_rows is not None:
        d_row = tl.load(d_rows + row, mask=inside, other=0)
        if KIND == "logsumexp":
            shift = tl.load(row_shift + row, mask=inside, other=0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    d_logit_sum = tl.zeros((BLOCK_M,), tl.float32)
    # rows that do not fill their block need no mask: nothing of theirs is written
    spans = spans_of(
        first_row,
        first,
        last,
        columns,
        diagonals,
        BLOCK_M,
        BLOCK_N,
        DIAGONALS,
        False,
    )
    of_spans = masked_tiles(spans)
    for masked in tl.static_range(2):
        count = of_spans if masked else last - first - of_spans
        # a second pipeline for the few tiles with a mask would take its own memory
        for k in tl.range(0, count, num_stages=1 if masked else None):
            acc, d_logit_sum = _add_tile(
                acc,
                d_logit_sum,
                r,
                c,
                own,
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
                masked_tile(k, spans) if masked else plain_tile(k, first, spans),
                part,
                rows,
                columns,
                D,
                margin,
                d_logit_sums is not None,
                KIND,
                DIAGONALS,
                PRECISION,
                WHOLE,
                EVEN,
                BLOCK_D,
                BLOCK_K,
                BLOCK_N,
                not masked,
            )

    scale = 1.0
    if grad_scale is not None:
        scale = tl.load(grad_scale)
    split = tl.program_id(2).to(tl.int64) * rows
    if d_logit_sums is not None and part == 0:
        tl.store(d_logit_sums + split + row, d_logit_sum * scale, mask=inside)
    if not REACHES:
        place = part + tl.arange(0, BLOCK_D)
        pointers = grad + (split + row.to(tl.int64))[:, None] * D + place[None, :]
        tl.store(pointers, acc * scale, mask=inside[:, None] & (place < D)[None, :])
    else:
        own_row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        if second_part[0] is None:
            write_whole_grads(first_part, acc * scale, own_row, common, D, BLOCK_D)
        elif of_second:
            write_whole_grads(second_part, acc * scale, own_row, common, D, BLOCK_D)
        else:
            write_whole_grads(first_part, acc * scale, own_row, common, D, BLOCK_D)


@triton.jit
def _add_tile(
    acc,
    d_logit_sum,
    r,
    c,
    own,
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
    t,
    part,
    rows,
    columns,
    D,
    margin,
    SUMS: tl.constexpr,
    KIND: tl.constexpr,
    DIAGONALS: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """The rows' gradient, and the sums of their d_logits, with those of tile t.

    own: the rows, if they are held whole. INSIDE: see `with_mask`.
    """
    column = t * BLOCK_N + tl.arange(0, BLOCK_N)
    other = load_rows(c, column, columns, part, D, BLOCK_D, INSIDE, EVEN)
    if WHOLE:
        x = tl.dot(own, tl.trans(other), input_precision=PRECISION)
    else:
        x = products(r, c, row, column, rows, columns, D, BLOCK_K, PRECISION, False, INSIDE, EVEN)
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
        INSIDE,
    )
    if SUMS:
        d_logit_sum += tl.sum(d_logits, 1)
    acc = tl.dot(d_logits.to(other.dtype), other, acc, input_precision=PRECISION)
    return acc, d_logit_sum


@triton.jit
def d_logits_of(
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
    KIND: tl.constexpr,
    DIAGONALS: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """The gradient on a tile's logits, 0 at masked ones, from the products x.

    d_row, shift: the rows' numbers. d_columns, column_shift: where the columns' are. INSIDE: see
    `with_mask`.
    """
    if bias is not None:
        x += tl.load(bias)
    x = with_mask(x, row, column, rows, columns, ids, limits, diagonals, DIAGONALS, INSIDE)
    if d_columns is not None:
        d_column = _of_columns(d_columns, column, columns, INSIDE)
    if KIND == "logsumexp":
        d_logits = tl.zeros(x.shape, tl.float32)
        if d_row is not None:
            d_logits += d_row[:, None] * exponential(x - shift[:, None])
        if d_columns is not None:
            other_shift = _of_columns(column_shift, column, columns, INSIDE)
            d_logits += d_column[None, :] * exponential(x - other_shift[None, :])
    else:
        d_logits = slope(x, margin, KIND)
        if d_row is None:
            d_logits *= d_column[None, :]
        elif d_columns is None:
            d_logits *= d_row[:, None]
        else:
            d_logits *= d_row[:, None] + d_column[None, :]
    if d_pos is not None:
        positive = same_ids(classes, row, column, rows, columns) & (x != float("-inf"))
        of_row = tl.load(d_pos[0] + row, mask=row < rows, other=0)
        of_column = _of_columns(d_pos[1], column, columns, INSIDE)
        d_logits += tl.where(positive, of_row[:, None] + of_column[None, :], 0.0)
    return d_logits


@triton.jit
def _of_columns(numbers, column, columns, INSIDE: tl.constexpr):
    if INSIDE:
        result = tl.load(numbers + column)
    else:
        result = tl.load(numbers + column, mask=column < columns, other=0)
    return result
