"""The forward kernels of the in-batch losses: every row's statistic, and every column's.

Rows and columns are dealt out in chunks, and a program has the tiles of one chunk of rows and one
of columns. A row's partial sum goes to row_sums, (chunks of columns, rows), at the number of the
program's chunk of columns; a column's to column_sums, (chunks of rows, columns), at that of its
chunk of rows. So each of these numbers is one program's: nothing is atomic, and two runs give the
same bits. A second kernel adds up the partial sums.

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
):
    """row_sums, column_sums: pointers to partial sums and, for an lse, to the largest logits."""
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
        for p in range(plain):
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
                plain_tile(p, begin, spans),
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
                True,
            )
        for q in tl.range(0, last_j - begin - plain, num_stages=1):
            j = masked_tile(q, spans)
            if COLUMN_LOSSES:
                j = tl.where(unfilled, begin + q, j)
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
                False,
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
        summand = value(x, margin, KIND)
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
def in_batch_stats_kernel(
    sums,
    largest,
    out,
    positive,
    weights,
    weight,
    d_stat,
    shift,
    d_positive,
    losses,
    partials,
    count,
    empty: tl.constexpr,
    empty_shift: tl.constexpr,
    FORMULA: tl.constexpr,
    KIND: tl.constexpr,
    NUM_PARTIALS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up the partial sums in float64, and take the logarithm where there is one.

    weight: a number and what float32 has lost of it.

    With a FORMULA, a criterion's: not the statistic is written, but what the backward pass needs of
    it, d_stat and shift as in `cosloss.kernels.stats.LossGrads`, the gradient on the positive, and
    to losses the program's sum of weighted losses.
    """
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((NUM_PARTIALS, BLOCK), tl.float64)
    highest = tl.full((NUM_PARTIALS, BLOCK), EMPTY, tl.float32)
    if KIND == "logsumexp":
        for start in range(0, partials, NUM_PARTIALS):
            pointers, mask = _partials(start, column, partials, count, NUM_PARTIALS)
            highest = tl.maximum(highest, tl.load(largest + pointers, mask=mask, other=EMPTY))
    peak = tl.max(highest, 0)
    for start in range(0, partials, NUM_PARTIALS):
        pointers, mask = _partials(start, column, partials, count, NUM_PARTIALS)
        part = tl.load(sums + pointers, mask=mask, other=0).to(tl.float64)
        if KIND == "logsumexp":
            part_peak = tl.load(largest + pointers, mask=mask, other=EMPTY)
            part *= tl.exp(part_peak.to(tl.float64) - peak.to(tl.float64)[None, :])
        total += part
    result = tl.sum(total, 0)
    if KIND == "exp" or KIND == "logsumexp":
        result = tl.where(result == 0, empty, tl.log(result) + _shift(peak, KIND))
    inside = column < count
    if FORMULA is None:
        tl.store(out + column, result, mask=inside)
    else:
        if weights is not None:
            factor = tl.load(weights + column, mask=inside, other=0).to(tl.float64)
        else:
            factor = tl.full((BLOCK,), weight[0], tl.float64) + weight[1]
        own = tl.load(positive + column, mask=inside, other=0).to(tl.float64)
        loss, slope = _loss_of(result, own, empty, FORMULA)
        slope *= factor
        tl.store(d_positive + column, (-slope).to(tl.float32), mask=inside)
        if KIND == "logsumexp":
            rounded = tl.maximum(result, empty_shift).to(tl.float32)
            tl.store(shift + column, rounded, mask=inside)
            slope *= tl.exp(tl.minimum(rounded.to(tl.float64) - result, 1.0))
        else:
            # a row without pairs has the slope 0, which must not meet an infinity
            slope *= tl.exp(tl.minimum(-result, 50.0))
        tl.store(d_stat + column, slope.to(tl.float32), mask=inside)
        tl.store(losses + tl.program_id(0), tl.sum(tl.where(inside, factor * loss, 0.0), 0))


@triton.jit
def in_batch_total_kernel(losses, out, count, BLOCK: tl.constexpr):
    """Write the sum of so many losses, by one program."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        total += tl.load(losses + place, mask=place < count, other=0)
    tl.store(out, tl.sum(total, 0).to(tl.float32))


@triton.jit
def _loss_of(lse, positive, empty: tl.constexpr, FORMULA: tl.constexpr):
    """Each row's loss, and its slope in the lse, which is minus that in the positive."""
    difference = lse - positive
    if FORMULA == "cross_entropy":
        e = tl.exp(-tl.abs(difference))
        more = 1 + e
        # log(1 + e) to e's last digit: what 1 + e has lost of e is made good
        log1p = tl.where(more == 1, e, tl.log(more) * (e / (more - 1)))
        loss = tl.where(difference > 0, difference, 0.0) + log1p
        slope = tl.where(difference > 0, 1.0, e) / more
    else:
        tl.static_assert(FORMULA == "decoupled")
        without = lse < empty / 2
        loss = tl.where(without, 0.0, difference)
        slope = tl.where(without, 0.0, 1.0)
    return loss, slope


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
    before = _load(sums[0] + place, mask, 0.0)
    if KIND == "logsumexp":
        highest = _load(sums[1] + place, mask, EMPTY)
        now = tl.maximum(highest, peak)
        tl.store(sums[1] + place, now, mask=mask)
        before, mass = before * exponential(highest - now), mass * exponential(peak - now)
    tl.store(sums[0] + place, before + mass, mask=mask)


@triton.jit
def _load(pointers, mask, other):
    return tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=other)


@triton.jit
def _partials(start, column, partials, count, NUM_PARTIALS: tl.constexpr):
    """The places of NUM_PARTIALS partial sums of each column, and which of them there are."""
    partial = start + tl.arange(0, NUM_PARTIALS)
    pointers = partial.to(tl.int64)[:, None] * count + column[None, :]
    return pointers, (partial < partials)[:, None] & (column < count)[None, :]


@triton.jit
def _shift(peak, KIND: tl.constexpr):
    return peak.to(tl.float64) if KIND == "logsumexp" else 0.0
