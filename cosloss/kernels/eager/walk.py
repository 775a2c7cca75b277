"""The logit matrix of an in-batch loss, and the walk over its tiles.

Shapes: rows R (N, D); columns C (M, D), or None where they are the rows; logits X = R C^T + bias,
(N, M).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cosloss.kernels.eager.memory import empty
from cosloss.kernels.eager.tile_loss import TileLoss
from cosloss.kernels.eager.tiles import Excluded, Positives, Tile, bands, tiles, triangle
from cosloss.kernels.eager.totals import Totals
from cosloss.kernels.eager.workspace import workspace

# a logit matrix up to this size is kept until its tiles are weighed
KEPT_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Matrix:
    """A logit matrix's loss, its excluded pairs, and the dtype of its products.

    two_way: every column has a loss as well as every row; always so for a symmetric matrix.
    positives: where a row's positive logit is the mean of several of the matrix; only for a
        logsumexp, two-way. The gradient through them then goes tile by tile too: of rows close to
        each other, what pulls and what pushes all but cancels, pair by pair.
    """

    loss: TileLoss
    excluded: Excluded
    two_way: bool
    dtype: torch.dtype
    positives: Positives | None = None

    @property
    def ids(self) -> tuple[Tensor | None, ...]:
        """Every tensor that says which pairs are excluded or positive."""
        own = () if self.positives is None else (self.positives.rows, self.positives.columns)
        return *self.excluded.ids, *own

    def new_totals(self, r: Tensor, c: Tensor | None) -> Totals:
        """The accumulator that tiles are added to, over zeros for the rows and the columns."""
        # one number per row: a rounded logsumexp would scale the whole row's weights
        rows = torch.zeros(r.shape[0], dtype=torch.float64, device=r.device)
        if c is None:
            return self.loss.totals(rows, rows)
        return self.loss.totals(rows, rows.new_zeros(c.shape[0]) if self.two_way else None)

    def split(self, per_loss: Tensor, r: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The rows' and the columns' part of a vector over the losses."""
        if c is None:
            return per_loss, per_loss
        rows = r.shape[0]
        return per_loss[:rows], per_loss[rows:] if self.two_way else None

    def pulls(self, grad_positive: Tensor) -> Tensor | None:
        """The gradient on each of a row's positives, from the one on their mean, if several."""
        return None if self.positives is None else grad_positive / self.positives.count


class Walk:
    """The tiles of one matrix in their order, each with its memory; operands in matrix.dtype."""

    def __init__(self, r: Tensor, c: Tensor | None, bias: Tensor | None, matrix: Matrix) -> None:
        self.symmetric = c is None
        self.r = r.to(matrix.dtype)
        self.c = self.r if c is None else c.to(matrix.dtype)
        self._bias = bias
        self._excluded = matrix.excluded
        rows, columns = self.r.shape[0], self.c.shape[0]
        self._tiles = triangle(rows, r.device) if self.symmetric else tiles(rows, columns, r.device)
        sizes = [(i.stop - i.start) * (j.stop - j.start) for i, j in self._tiles]
        self._elements, self._largest = sum(sizes), max(sizes, default=0)
        self._kept: Tensor | None = None
        self._scratch: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor]]:
        if self._kept is not None:
            yield from _placed(self._tiles, self._kept)
        else:
            buffer = empty((self._largest,), self.r)
            for tile in self._tiles:
                yield from _placed([tile], buffer)

    def bands(self) -> Iterator[list[tuple[slice, slice, Tensor]]]:
        """The tiles of the same rows together, each with its memory until the next band."""
        every = bands(self.r.shape[0], self.c.shape[0], self.r.device)
        height = max(band[0][0].stop - band[0][0].start for band in every)
        buffer = workspace.scratch("band", (height * self.c.shape[0],), self.r)
        return (list(_placed(band, buffer)) for band in every)

    def keep_tiles(self) -> None:
        """Give every tile memory of its own, if all of them fit."""
        self._kept = kept_tiles(self._elements, self.r)

    @property
    def keeps(self) -> bool:
        """Whether a tile is still there when the next walk comes by."""
        return self._kept is not None

    def logits(self, i: slice, j: slice, memory: Tensor) -> Tensor:
        """The tile X[i, j], written into memory, with excluded pairs at -inf."""
        torch.mm(self.r[i], self.c[j].T, out=memory)
        if self._bias is not None:
            memory += self._bias
        self._excluded.fill(memory, i, j, -torch.inf)
        return memory

    def scratch(self, tile: Tensor) -> Tensor:
        """Memory of the tile's shape."""
        if self._scratch is None:
            self._scratch = empty((self._largest,), self.r)
        return self._scratch[: tile.numel()].view(tile.shape)


def kept_tiles(elements: int, like: Tensor) -> Tensor | None:
    """Memory for so many numbers of like's dtype; None where they are too many to be kept."""
    if elements * like.element_size() > KEPT_BYTES:
        workspace.release("tiles")
        return None
    return workspace.scratch("tiles", (elements,), like, largest=KEPT_BYTES)


def _placed(tiles: Iterable[Tile], buffer: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """The tiles with their memory, one after the other in the buffer."""
    start = 0
    for i, j in tiles:
        height, width = i.stop - i.start, j.stop - j.start
        yield i, j, buffer[start : start + height * width].view(height, width)
        start += height * width
