"""The forward kernels of the in-batch losses: every row's total, and every column's.

A program walks a stretch of tiles, row block by row block, and adds its rows' and its columns' sums
to a line of its own in `partial`, (programs, totals): nothing is atomic, so that two runs give the
same bits. A second kernel adds up the lines. Of a symmetric matrix only the tiles on and above the
diagonal are walked; row block i, with T - i of them, and row block T - 1 - i, with i + 1, make one
line of a rectangle of ceil(T / 2) x (T + 1) tiles, which is dealt out evenly.
"""

import triton
import triton.language as tl

from cosloss.kernels.triton.tile import EMPTY, load_rows, products, value, without_excluded


@triton.jit
def in_batch_fwd_kernel(
    r,
    c,
    bias,
    partial,
    largest,
    ids,
    offsets,
    rows,
    columns,
    D,
    totals,
    margin,
    KIND: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    TWO_WAY: tl.constexpr,
    DIAGONALS: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    partial += tl.program_id(0).to(tl.int64) * totals
    if KIND == "logsumexp":
        largest += tl.program_id(0).to(tl.int64) * totals
    for start in range(0, totals, BLOCK):
        _clear(partial, largest, start + tl.arange(0, BLOCK), totals, KIND)
    tl.debug_barrier()

    row_blocks, column_blocks = tl.cdiv(rows, BLOCK), tl.cdiv(columns, BLOCK)
    lines, width, halves = row_blocks, column_blocks, 1
    if SYMMETRIC:
        lines, width, halves = (row_blocks + 1) // 2, row_blocks + 1, 2
    share = tl.cdiv(lines * width, tl.num_programs(0))
    first = tl.program_id(0) * share
    last = tl.minimum(first + share, lines * width)
    for k in range(first // width * halves, tl.cdiv(last, width) * halves):
        i, start, count, first_j = k, k * width, width, 0
        if SYMMETRIC:
            line = k // 2
            i = tl.where(k % 2 == 0, line, row_blocks - 1 - line)
            start = line * width + tl.where(k % 2 == 0, 0, row_blocks - line)
            # the middle line of an odd number has one row block only
            count = tl.where((k % 2 == 1) & (i == line), 0, row_blocks - i)
            first_j = i
        begin = tl.maximum(first, start) - start
        end = tl.minimum(last, start + count) - start
        if begin < end:
            row = i * BLOCK + tl.arange(0, BLOCK)
            total = tl.zeros((BLOCK,), tl.float32)
            highest = tl.full((BLOCK,), EMPTY, tl.float32)
            if WHOLE:
                a = load_rows(r, row, rows, 0, D, BLOCK_D)
            for t in range(begin, end):
                j = first_j + t
                column = j * BLOCK + tl.arange(0, BLOCK)
                if WHOLE:
                    b = load_rows(c, column, columns, 0, D, BLOCK_D)
                    x = tl.dot(a, tl.trans(b), input_precision=PRECISION)
                else:
                    x = products(r, c, row, column, rows, columns, D, BLOCK_D, PRECISION)
                if bias is not None:
                    x += tl.load(bias)
                x = without_excluded(x, row, column, rows, columns, ids, offsets, DIAGONALS)
                if KIND == "logsumexp":
                    now = tl.maximum(highest, tl.max(x, 1))
                    total = total * tl.exp(highest - now) + tl.sum(tl.exp(x - now[:, None]), 1)
                    highest = now
                    if TWO_WAY:
                        peak = tl.maximum(tl.max(x, 0), EMPTY)
                        mass = tl.sum(tl.exp(x - peak[None, :]), 0)
                else:
                    summand = value(x, margin, KIND)
                    total += tl.sum(summand, 1)
                    if TWO_WAY:
                        mass, peak = tl.sum(summand, 0), 0.0
                if TWO_WAY:
                    place, counted = rows + column, column < columns
                    if SYMMETRIC:
                        # a tile on the diagonal has every pair twice, and counts in its rows
                        place, counted = column, counted & (column >= (i + 1) * BLOCK)
                    _add(partial, largest, place, counted, mass, peak, KIND)
            tl.debug_barrier()
            _add(partial, largest, row, row < rows, total, highest, KIND)
            tl.debug_barrier()


@triton.jit
def in_batch_totals_kernel(
    partial,
    largest,
    out,
    programs,
    totals,
    empty: tl.constexpr,
    KIND: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up the programs' lines in float64, and take the logarithm where there is one."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((LINES, BLOCK), tl.float64)
    highest = tl.full((LINES, BLOCK), EMPTY, tl.float32)
    if KIND == "logsumexp":
        for start in range(0, programs, LINES):
            pointers, mask = _lines(start, column, programs, totals, LINES)
            highest = tl.maximum(highest, tl.load(largest + pointers, mask=mask, other=EMPTY))
    peak = tl.max(highest, 0)
    for start in range(0, programs, LINES):
        pointers, mask = _lines(start, column, programs, totals, LINES)
        part = tl.load(partial + pointers, mask=mask, other=0).to(tl.float64)
        if KIND == "logsumexp":
            part_peak = tl.load(largest + pointers, mask=mask, other=EMPTY)
            part *= tl.exp(part_peak.to(tl.float64) - peak.to(tl.float64)[None, :])
        total += part
    result = tl.sum(total, 0)
    if KIND == "exp" or KIND == "logsumexp":
        result = tl.where(result == 0, empty, tl.log(result) + _shift(peak, KIND))
    tl.store(out + column, result, mask=column < totals)


@triton.jit
def _clear(partial, largest, place, totals, KIND: tl.constexpr):
    tl.store(partial + place, tl.zeros(place.shape, tl.float32), mask=place < totals)
    if KIND == "logsumexp":
        tl.store(largest + place, tl.full(place.shape, EMPTY, tl.float32), mask=place < totals)


@triton.jit
def _add(partial, largest, place, mask, mass, peak, KIND: tl.constexpr):
    """Add sums to the program's line; a logsumexp comes as mass * exp(peak)."""
    before = tl.load(partial + place, mask=mask, other=0)
    if KIND == "logsumexp":
        highest = tl.load(largest + place, mask=mask, other=EMPTY)
        now = tl.maximum(highest, peak)
        tl.store(largest + place, now, mask=mask)
        before, mass = before * tl.exp(highest - now), mass * tl.exp(peak - now)
    tl.store(partial + place, before + mass, mask=mask)


@triton.jit
def _lines(start, column, programs, totals, LINES: tl.constexpr):
    line = start + tl.arange(0, LINES)
    pointers = line.to(tl.int64)[:, None] * totals + column[None, :]
    return pointers, (line < programs)[:, None] & (column < totals)[None, :]


@triton.jit
def _shift(peak, KIND: tl.constexpr):
    return peak.to(tl.float64) if KIND == "logsumexp" else 0.0
