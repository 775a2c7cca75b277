"""The backward kernel of the in-batch losses: one pass in which a program owns its rows' gradient.

A program goes over the columns tile by tile, computes the logits again, and adds up

    grad_i = sum_j W_ij c_j,    W_ij = a_i dT_i/dx_ij + b_j dT_j/dx_ij

in registers. Where a row's positives are several, W_ij has their pairs' pulls too. A gradient wider
than BLOCK_D is done in parts, each of which computes the logits; of a small batch the columns are
dealt out to `splits` programs, whose sums are added up afterwards.
"""

import triton
import triton.language as tl

from cosloss.kernels.triton.tile import load_rows, products, same_ids, slope, without_excluded


@triton.jit
def in_batch_bwd_kernel(
    r,
    c,
    bias,
    a,
    b,
    row_totals,
    column_totals,
    unit,
    grad,
    weight_sums,
    ids,
    offsets,
    classes,
    pulls,
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
    if a is not None:
        row_a = tl.load(a + row, mask=inside, other=0)
        if KIND == "logsumexp":
            row_total = tl.load(row_totals + row, mask=inside, other=0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    weight_sum = tl.zeros((BLOCK_M,), tl.float32)
    for t in range(first, last):
        column = t * BLOCK_N + tl.arange(0, BLOCK_N)
        other = load_rows(c, column, columns, part, D, BLOCK_D)
        if WHOLE:
            x = tl.dot(own, tl.trans(other), input_precision=PRECISION)
        else:
            x = products(r, c, row, column, rows, columns, D, BLOCK_K, PRECISION)
        if bias is not None:
            x += tl.load(bias)
        x = without_excluded(x, row, column, rows, columns, ids, offsets, DIAGONALS)
        if b is not None:
            column_b = tl.load(b + column, mask=column < columns, other=0)
        if KIND == "logsumexp":
            weight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            if a is not None:
                weight += row_a[:, None] * tl.exp(x - row_total[:, None])
            if b is not None:
                total = tl.load(column_totals + column, mask=column < columns, other=0)
                weight += column_b[None, :] * tl.exp(x - total[None, :])
        else:
            weight = slope(x, margin, KIND)
            if a is None:
                weight *= column_b[None, :]
            elif b is None:
                weight *= row_a[:, None]
            else:
                weight *= row_a[:, None] + column_b[None, :]
        if pulls is not None:
            positive = same_ids(classes, row, column, rows, columns) & (x != float("-inf"))
            of_row = tl.load(pulls[0] + row, mask=inside, other=0)
            of_column = tl.load(pulls[1] + column, mask=column < columns, other=0)
            weight += tl.where(positive, of_row[:, None] + of_column[None, :], 0.0)
        if weight_sums is not None:
            weight_sum += tl.sum(weight, 1)
        acc = tl.dot(weight.to(other.dtype), other, acc, input_precision=PRECISION)

    scale = 1.0
    if unit is not None:
        scale = tl.load(unit)
    split = tl.program_id(2).to(tl.int64) * rows
    if weight_sums is not None and part == 0:
        tl.store(weight_sums + split + row, weight_sum * scale, mask=inside)
    place = part + tl.arange(0, BLOCK_D)
    pointers = grad + (split + row.to(tl.int64))[:, None] * D + place[None, :]
    tl.store(pointers, acc * scale, mask=inside[:, None] & (place < D)[None, :])
