"""The tiles of a logit matrix X = R C^T, and the pairs left out of it.

Shapes: rows R (N, D), columns C (M, D); a tile is X[I, J] for two slices I and J.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

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


class Excluded(Protocol):
    """The pairs (row, column) that take no part."""

    def fill(self, tile: Tensor, i: slice, j: slice, value: float) -> None:
        """Write `value` at the tile's excluded pairs, in place."""

    def mask(self, x: Tensor) -> Tensor:
        """True at the excluded pairs of the whole matrix x."""


@dataclass(frozen=True)
class Diagonals:
    """Excludes column - row = offset for each of the offsets."""

    offsets: tuple[int, ...]

    def fill(self, tile: Tensor, i: slice, j: slice, value: float) -> None:
        for offset in self.offsets:
            local = i.start + offset - j.start
            if -tile.shape[0] < local < tile.shape[1]:
                tile.diagonal(local).fill_(value)

    def mask(self, x: Tensor) -> Tensor:
        row, column = (torch.arange(size, device=x.device) for size in x.shape)
        distance = column - row[:, None]
        mask = torch.zeros_like(distance, dtype=torch.bool)
        for offset in self.offsets:
            mask = mask | (distance == offset)
        return mask


@dataclass(frozen=True)
class SameGroup:
    """Excludes every pair whose row and column carry the same group id."""

    row_groups: Tensor
    column_groups: Tensor

    def fill(self, tile: Tensor, i: slice, j: slice, value: float) -> None:
        tile.masked_fill_(self.row_groups[i, None] == self.column_groups[j], value)

    def mask(self, x: Tensor) -> Tensor:
        return self.row_groups[:, None] == self.column_groups


@dataclass(frozen=True)
class SameGroupOtherClass:
    """Excludes every row itself, and the pairs of one group whose classes differ."""

    groups: Tensor
    classes: Tensor

    def fill(self, tile: Tensor, i: slice, j: slice, value: float) -> None:
        same_group = self.groups[i, None] == self.groups[j]
        tile.masked_fill_(same_group & (self.classes[i, None] != self.classes[j]), value)
        Diagonals((0,)).fill(tile, i, j, value)

    def mask(self, x: Tensor) -> Tensor:
        same_group = self.groups[:, None] == self.groups
        other_class = self.classes[:, None] != self.classes
        return same_group & other_class | Diagonals((0,)).mask(x)
