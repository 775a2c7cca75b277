"""The order in which a program walks a row of tiles: first those without a mask, then the others.

A mask costs as much as the rest of a tile's arithmetic, and few tiles have one: those that a
diagonal crosses, the one that the columns do not fill, and in a symmetric matrix the one on the
diagonal. They are `spans` of tiles, in their order: (begin, end, begin, end, ...).
"""

import triton
import triton.language as tl

SPANS = tl.constexpr(5)


@triton.jit
def spans_of(
    first_row,
    first,
    last,
    columns,
    diagonals,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DIAGONALS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):
    """The spans of tiles with a mask among those from first to last, of the rows from first_row on.

    diagonals: in ascending order. SYMMETRIC: the tile `first_row // WIDTH` comes first if at all.
    """
    own, after_own = first, first
    if SYMMETRIC:
        own, after_own = _crossed(first_row, HEIGHT, first, last, columns, WIDTH)
    d0, after_0 = after_own, after_own
    if DIAGONALS > 0:
        d0, after_0 = _crossed(first_row + diagonals[0], HEIGHT, after_own, last, columns, WIDTH)
    d1, after_1 = after_0, after_0
    if DIAGONALS > 1:
        d1, after_1 = _crossed(first_row + diagonals[1], HEIGHT, after_0, last, columns, WIDTH)
    d2, after_2 = after_1, after_1
    if DIAGONALS > 2:
        d2, after_2 = _crossed(first_row + diagonals[2], HEIGHT, after_1, last, columns, WIDTH)
    full = columns // WIDTH
    border = tl.minimum(tl.maximum(full, after_2), last)
    after_border = tl.minimum(tl.maximum(tl.cdiv(columns, WIDTH), border), last)
    return own, after_own, d0, after_0, d1, after_1, d2, after_2, border, after_border


@triton.jit
def masked_tiles(spans):
    """How many tiles there are in the spans."""
    count = 0
    for k in tl.static_range(SPANS):
        count += spans[2 * k + 1] - spans[2 * k]
    return count


@triton.jit
def plain_tile(number, first, spans):
    """The tile of that number among those from `first` on that are in no span."""
    tile = first + number
    for k in tl.static_range(SPANS):
        tile += tl.where(tile >= spans[2 * k], spans[2 * k + 1] - spans[2 * k], 0)
    return tile


@triton.jit
def masked_tile(number, spans):
    """The tile of that number among those in the spans."""
    tile = number
    before = 0
    for k in tl.static_range(SPANS):
        tile = tl.where(number >= before, spans[2 * k] + number - before, tile)
        before += spans[2 * k + 1] - spans[2 * k]
    return tile


@triton.jit
def _crossed(start, length, first, last, columns, WIDTH: tl.constexpr):
    """The span, from first to last, of tiles that have columns from start on, so many."""
    begin = tl.maximum(tl.maximum(start, 0) // WIDTH, first)
    end = tl.minimum(tl.cdiv(tl.maximum(tl.minimum(start + length, columns), 0), WIDTH), last)
    # an empty one stands where the one before ends
    return tl.where(end > begin, begin, first), tl.where(end > begin, end, first)
