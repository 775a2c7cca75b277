"""The backward kernel of the in-batch losses: one pass in which a program owns its rows' gradient.

A program goes over the columns tile by tile, computes the logits again, and adds up

    grad_i = sum_j d_logit_ij c_j

in registers, d_logit as `cosloss.kernels.stats.LossGrads` has it. A gradient wider than BLOCK_D is
done in parts, each of which computes the logits; of a small batch the columns are dealt out to
`splits` programs, whose sums are added up afterwards.
"""

import triton
import triton.language as tl

from cosloss.kernels.triton.tile import load_rows, products, same_ids, slope, with_mask


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
    rows,
    columns,
    D,
    margin,
    KIND: tl.constexpr,
    DIAGONALS: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    part = tl.program_id(1) * BLOCK_D
    column_blocks = tl.cdiv(columns, BLOCK_N)
    share = tl.cdiv(column_blocks, tl.num_programs(2))
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, column_blocks)

    if WHOLE:
        own = load_rows(r, row, rows, 0, D, BLOCK_D)
    if d_rows is not None:
        d_row = tl.load(d_rows + row, mask=inside, other=0)
        if KIND == "logsumexp":
            shift = tl.load(row_shift + row, mask=inside, other=0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    d_logit_sum = tl.zeros((BLOCK_M,), tl.float32)
    for t in range(first, last):
        column = t * BLOCK_N + tl.arange(0, BLOCK_N)
        other = load_rows(c, column, columns, part, D, BLOCK_D)
        if WHOLE:
            x = tl.dot(own, tl.trans(other), input_precision=PRECISION)
        else:
            x = products(r, c, row, column, rows, columns, D, BLOCK_K, PRECISION)
        if bias is not None:
            x += tl.load(bias)
        x = with_mask(x, row, column, rows, columns, ids, limits, diagonals, DIAGONALS)
        if d_columns is not None:
            d_column = tl.load(d_columns + column, mask=column < columns, other=0)
        if KIND == "logsumexp":
            d_logits = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            if d_rows is not None:
                d_logits += d_row[:, None] * tl.exp(x - shift[:, None])
            if d_columns is not None:
                other_shift = tl.load(column_shift + column, mask=column < columns, other=0)
                d_logits += d_column[None, :] * tl.exp(x - other_shift[None, :])
        else:
            d_logits = slope(x, margin, KIND)
            if d_rows is None:
                d_logits *= d_column[None, :]
            elif d_columns is None:
                d_logits *= d_row[:, None]
            else:
                d_logits *= d_row[:, None] + d_column[None, :]
        if d_pos is not None:
            positive = same_ids(classes, row, column, rows, columns) & (x != float("-inf"))
            of_row = tl.load(d_pos[0] + row, mask=inside, other=0)
            of_column = tl.load(d_pos[1] + column, mask=column < columns, other=0)
            d_logits += tl.where(positive, of_row[:, None] + of_column[None, :], 0.0)
        if d_logit_sums is not None:
            d_logit_sum += tl.sum(d_logits, 1)
        acc = tl.dot(d_logits.to(other.dtype), other, acc, input_precision=PRECISION)

    scale = 1.0
    if grad_scale is not None:
        scale = tl.load(grad_scale)
    split = tl.program_id(2).to(tl.int64) * rows
    if d_logit_sums is not None and part == 0:
        tl.store(d_logit_sums + split + row, d_logit_sum * scale, mask=inside)
    place = part + tl.arange(0, BLOCK_D)
    pointers = grad + (split + row.to(tl.int64))[:, None] * D + place[None, :]
    tl.store(pointers, acc * scale, mask=inside[:, None] & (place < D)[None, :])
