"""The forward kernels of the in-batch losses: every row's statistic, and every column's.

Rows and columns are dealt out in chunks, and a program has the tiles of one chunk of rows and one
of columns. A row's partial sum goes to row_sums, (chunks of columns, rows), at the number of the
program's chunk of columns; a column's to column_sums, (chunks of rows, columns), at that of its
chunk of rows. So each of these numbers is one program's, which adds to it in one order: two runs
give the same bits. A second kernel adds up the partial sums.

Of a symmetric matrix, whose columns' sums are the rows', only the tiles on and above the diagonal
are walked: no program's chunk of columns comes before its chunk of rows.
"""

import triton
import triton.language as tl

from cosloss.kernels.triton.tile import (
    EMPTY,
    exponential,
    load_rows,
    products,
    value,
    with_mask,
)
from cosloss.kernels.triton.walk import masked_tile, masked_tiles, plain_tile, spans_of


@triton.jit
def in_batch_fwd_kernel(
    r,
    c,
    bias,
    row_sums,
    column_sums,
    ids,
    limits,
    diagonals,
    rows,
    columns,
    D,
    margin,
    KIND: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    COLUMN_LOSSES: tl.constexpr,
    DIAGONALS: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    POLYNOMIAL: tl.constexpr = 0,
):
    """row_sums, column_sums: pointers to partial sums and, for an lse, to the largest logits.

    POLYNOMIAL: see `exponentials`.
    """
    row_chunk, column_chunk = tl.program_id(1), tl.program_id(0)
    if SYMMETRIC and column_chunk < row_chunk:
        return
    row_blocks, column_blocks = tl.cdiv(rows, BLOCK), tl.cdiv(columns, BLOCK)
    height = tl.cdiv(row_blocks, tl.num_programs(1))
    width = tl.cdiv(column_blocks, tl.num_programs(0))
    first_i, first_j = row_chunk * height, column_chunk * width
    last_i = tl.minimum(first_i + height, row_blocks)
    last_j = tl.minimum(first_j + width, column_blocks)
    row_place = column_chunk.to(tl.int64) * rows
    column_place = row_chunk.to(tl.int64) * columns
    for i in range(first_i, last_i):
        _clear(row_sums, row_place, i * BLOCK + tl.arange(0, BLOCK), rows, KIND)
    if COLUMN_LOSSES:
        for j in range(first_j, last_j):
            _clear(column_sums, column_place, j * BLOCK + tl.arange(0, BLOCK), columns, KIND)
    tl.debug_barrier()

    for i in range(first_i, last_i):
        row = i * BLOCK + tl.arange(0, BLOCK)
        begin = first_j
        if SYMMETRIC:
            begin = tl.maximum(first_j, i)
        if KIND == "logsumexp":
            total = tl.zeros((BLOCK,), tl.float32)
        else:
            total = tl.zeros((BLOCK, BLOCK), tl.float32)
        highest = tl.full((BLOCK,), EMPTY, tl.float32)
        a = row
        if WHOLE:
            a = load_rows(r, row, rows, 0, D, BLOCK_D, False, EVEN)
        spans = spans_of(
            i * BLOCK, begin, last_j, columns, diagonals, BLOCK, BLOCK, DIAGONALS, SYMMETRIC
        )
        plain = last_j - begin - masked_tiles(spans)
        # rows that do not fill their block would count in the columns' sums
        unfilled = (i + 1) * BLOCK > rows
        if COLUMN_LOSSES:
            plain = tl.where(unfilled, 0, plain)
        for masked in tl.static_range(2):
            count = last_j - begin - plain if masked else plain
            # a second pipeline for the few tiles with a mask would take its own memory
            for k in tl.range(0, count, num_stages=1 if masked else None):
                if masked:
                    j = masked_tile(k, spans)
                    if COLUMN_LOSSES:
                        j = tl.where(unfilled, begin + k, j)
                else:
                    j = plain_tile(k, begin, spans)
                total, highest = _add_tile(
                    total,
                    highest,
                    r,
                    c,
                    a,
                    bias,
                    column_sums,
                    column_place,
                    ids,
                    limits,
                    diagonals,
                    i,
                    j,
                    rows,
                    columns,
                    D,
                    margin,
                    KIND,
                    SYMMETRIC,
                    COLUMN_LOSSES,
                    DIAGONALS,
                    PRECISION,
                    WHOLE,
                    EVEN,
                    BLOCK_D,
                    BLOCK,
                    POLYNOMIAL,
                    not masked,
                )
        if KIND != "logsumexp":
            total = tl.sum(total, 0 if COLUMN_LOSSES else 1)
        tl.debug_barrier()
        _add(row_sums, row_place + row, row < rows, total, highest, KIND)
        tl.debug_barrier()


@triton.jit
def _add_tile(
    total,
    highest,
    r,
    c,
    a,
    bias,
    column_sums,
    column_place,
    ids,
    limits,
    diagonals,
    i,
    j,
    rows,
    columns,
    D,
    margin,
    KIND: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    COLUMN_LOSSES: tl.constexpr,
    DIAGONALS: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """The rows' sums, and largest logits, with those of tile (i, j); it adds to the columns' too.

    total: of an lse the rows' sums so far; else sums of each place of a tile, added up at the end.
    a: the rows, if they are held whole. INSIDE: see `with_mask`.
    """
    # sums along a tile's rows are a few shuffles, and along its columns they go through memory: a
    # tile that adds up its columns is transposed
    TRANSPOSED: tl.constexpr = COLUMN_LOSSES and KIND != "logsumexp"
    row, column = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    if WHOLE:
        b = load_rows(c, column, columns, 0, D, BLOCK_D, INSIDE, EVEN)
        if TRANSPOSED:
            x = tl.dot(b, tl.trans(a), input_precision=PRECISION)
        else:
            x = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    elif TRANSPOSED:
        x = products(c, r, column, row, columns, rows, D, BLOCK_D, PRECISION, INSIDE, False, EVEN)
    else:
        x = products(r, c, row, column, rows, columns, D, BLOCK_D, PRECISION, False, INSIDE, EVEN)
    if bias is not None:
        x += tl.load(bias)
    if TRANSPOSED:
        x = with_mask(
            x,
            column,
            row,
            columns,
            rows,
            (ids[1], ids[0], ids[3], ids[2]),
            (limits[1], limits[0]),
            (-diagonals[0], -diagonals[1], -diagonals[2]),
            DIAGONALS,
            INSIDE,
        )
    else:
        x = with_mask(x, row, column, rows, columns, ids, limits, diagonals, DIAGONALS, INSIDE)
    if KIND == "logsumexp":
        now = tl.maximum(highest, tl.max(x, 1))
        mass_of_rows = tl.sum(exponential(x - now[:, None]), 1)
        total = total * exponential(highest - now) + mass_of_rows
        highest = now
        if COLUMN_LOSSES:
            peak = tl.maximum(tl.max(x, 0), EMPTY)
            mass = tl.sum(exponential(x - peak[None, :]), 0)
    else:
        summand = value(x, margin, KIND, POLYNOMIAL)
        total += summand
        if COLUMN_LOSSES:
            mass, peak = tl.sum(summand, 1), 0.0
    if COLUMN_LOSSES:
        if INSIDE:
            _add(column_sums, column_place + column, None, mass, peak, KIND)
        else:
            counted = column < columns
            if SYMMETRIC:
                # a tile on the diagonal has every pair twice, and counts in its rows
                counted &= column >= (i + 1) * BLOCK
            _add(column_sums, column_place + column, counted, mass, peak, KIND)
    return total, highest


@triton.jit
def _clear(sums, start, place, count, KIND: tl.constexpr):
    tl.store(sums[0] + start + place, tl.zeros(place.shape, tl.float32), mask=place < count)
    if KIND == "logsumexp":
        empty = tl.full(place.shape, EMPTY, tl.float32)
        tl.store(sums[1] + start + place, empty, mask=place < count)


@triton.jit
def _add(sums, place, mask, mass, peak, KIND: tl.constexpr):
    """Add to the program's partial sums; a logsumexp's come as mass * exp(peak).

    mask: which of them, or None for all.
    """
    if KIND == "logsumexp":
        before, highest = _load(sums[0] + place, mask, 0.0), _load(sums[1] + place, mask, EMPTY)
        now = tl.maximum(highest, peak)
        tl.store(sums[1] + place, now, mask=mask)
        before, mass = before * exponential(highest - now), mass * exponential(peak - now)
        tl.store(sums[0] + place, before + mass, mask=mask)
    else:
        # by the memory, whose answer no one waits for
        tl.atomic_add(sums[0] + place, mass, mask=mask, sem="relaxed", scope="cta")


@triton.jit
def _load(pointers, mask, other):
    return tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=other)
