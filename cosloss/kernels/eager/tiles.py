"""The tiles of a logit matrix X = R C^T, and the pairs left out of it.

Shapes: rows R (N, D), columns C (M, D); a tile is X[I, J] for two slices I and J.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Tile = tuple[slice, slice]

LARGEST_SIDE = 1024  # two tiles of this size fit a CPU's last-level cache
BAND = 1 << 22  # elements: so does a band of tiles


def tiles(rows: int, columns: int, device: torch.device) -> list[Tile]:
    """The tiles of a whole matrix, row blocks first."""
    side = _largest_side(device)
    return list(_rectangle(slice(0, rows), slice(0, columns), side, side))


def bands(rows: int, columns: int, device: torch.device) -> list[list[Tile]]:
    """The tiles of a whole matrix, those of the same rows together, in about BAND elements."""
    side = _largest_side(device)
    height = min(max(BAND // columns, side // 4), side)
    blocks = (slice(start, min(start + height, rows)) for start in range(0, rows, height))
    return [list(_rectangle(i, slice(0, columns), height, side)) for i in blocks]


def triangle(rows: int, device: torch.device) -> list[Tile]:
    """The tiles of a symmetric matrix on and above its diagonal, halved towards the diagonal.

    Only the smallest tiles, on the diagonal, hold pairs twice.
    """
    side = _largest_side(device)

    def halves(block: slice) -> Iterator[Tile]:
        if block.stop - block.start <= side // 2:
            yield block, block
            return
        middle = (block.start + block.stop) // 2
        upper, lower = slice(block.start, middle), slice(middle, block.stop)
        yield from halves(upper)
        yield from _rectangle(upper, lower, side, side)
        yield from halves(lower)

    return list(halves(slice(0, rows)))


def _rectangle(rows: slice, columns: slice, height: int, width: int) -> Iterator[Tile]:
    for i in range(rows.start, rows.stop, height):
        for j in range(columns.start, columns.stop, width):
            yield slice(i, min(i + height, rows.stop)), slice(j, min(j + width, columns.stop))


def _largest_side(device: torch.device) -> int:
    # on an accelerator there is no such cache, and launches are what costs
    return LARGEST_SIDE if device.type == "cpu" else 4 * LARGEST_SIDE


@dataclass(frozen=True)
class Excluded:
    """The pairs (row, column) of a matrix that take no part.

    offsets: those with column - row = offset.
    groups: ids of the rows and of the columns; those of the same group.
    classes: ids of the rows and of the columns; of those, the ones whose classes differ.
    """

    offsets: tuple[int, ...] = ()
    groups: tuple[Tensor, Tensor] | None = None
    classes: tuple[Tensor, Tensor] | None = None

    @property
    def ids(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """The groups of rows and columns, then the classes; None where there are none."""
        return *(self.groups or (None, None)), *(self.classes or (None, None))

    def transposed(self) -> "Excluded":
        """The same pairs as (column, row)."""
        groups, classes = (pair and pair[::-1] for pair in (self.groups, self.classes))
        return Excluded(tuple(-offset for offset in self.offsets), groups, classes)

    def fill(self, tile: Tensor, i: slice, j: slice, value: float) -> None:
        """Write `value` at the tile's excluded pairs, in place."""
        if self.groups is not None:
            tile.masked_fill_(self._of_groups(i, j), value)
        for offset in self.offsets:
            local = i.start + offset - j.start
            if -tile.shape[0] < local < tile.shape[1]:
                tile.diagonal(local).fill_(value)

    def mask(self, x: Tensor) -> Tensor:
        """True at the excluded pairs of the whole matrix x."""
        row, column = (torch.arange(size, device=x.device) for size in x.shape)
        distance = column - row[:, None]
        mask = torch.zeros_like(distance, dtype=torch.bool)
        for offset in self.offsets:
            mask = mask | (distance == offset)
        return mask if self.groups is None else mask | self._of_groups(slice(None), slice(None))

    def _of_groups(self, i: slice, j: slice) -> Tensor:
        assert self.groups is not None
        mask = self.groups[0][i, None] == self.groups[1][j]
        if self.classes is not None:
            mask = mask & (self.classes[0][i, None] != self.classes[1][j])
        return mask


@dataclass(frozen=True)
class Positives:
    """The pairs that a row's positive logit is the mean of: of one class, and not excluded.

    rows, columns: ids of their classes.
    count: (N,), how many positives a row has, or 1 if it has none.
    """

    rows: Tensor
    columns: Tensor
    count: Tensor

    def mask(self, i: slice = slice(None), j: slice = slice(None)) -> Tensor:
        """True at the tile's pairs of one class."""
        return self.rows[i, None] == self.columns[j]
