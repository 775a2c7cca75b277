"""The engine of the in-batch losses: totals of a logit matrix, and the gradient, tile by tile.

Shapes: rows R (N, D); columns C (M, D), or None where they are the rows; logits X = R C^T + bias,
(N, M); totals (N,) in float64, or (N + M,) where the columns have a loss of their own, rows first.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cosloss.kernels.eager.memory import empty
from cosloss.kernels.eager.tile_loss import TileLoss
from cosloss.kernels.eager.tiles import Excluded, Tile, bands, tiles, triangle
from cosloss.kernels.eager.totals import Totals
from cosloss.kernels.eager.workspace import workspace

# a logit matrix up to this size is kept from the forward to the backward pass
KEPT_BYTES = 256 * 2**20

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Matrix:
    """A logit matrix's loss, its excluded pairs, and the dtype of its products.

    two_way: every column has a loss as well as every row; always so for a symmetric matrix.
    totals_as: what another backend makes of the loss's totals.
    """

    loss: TileLoss
    excluded: Excluded
    two_way: bool
    dtype: torch.dtype
    totals_as: Callable[[Totals], Totals] = lambda totals: totals

    def totals(self, rows: Tensor, columns: Tensor | None) -> Totals:
        """The accumulator that tiles are added to, over zeros for the rows and the columns."""
        return self.totals_as(self.loss.totals(rows, columns))

    def with_totals_as(self, totals_as: Callable[[Totals], Totals]) -> "Matrix":
        """The same matrix with another backend's totals."""
        return Matrix(self.loss, self.excluded, self.two_way, self.dtype, totals_as)


def forward(
    r: Tensor, c: Tensor | None, bias: Tensor | None, matrix: Matrix, keep: bool
) -> tuple[Tensor, object]:
    """The totals, and a ticket for the tiles kept: None if not asked for, or too large."""
    walk = _Walk(r, c, bias, matrix)
    ticket = walk.keep_tiles() if keep else None
    totals = matrix.totals(*walk.new_totals())
    for i, j, memory in walk:
        totals.add(walk.logits(i, j, memory), i, j, keep)
    totals.finish()
    return totals.joined(), ticket


def forward_and_backward(
    weight: Tensor | float,
    positive: Tensor,
    r: Tensor,
    c: Tensor | None,
    bias: Tensor | None,
    matrix: Matrix,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Gradients]:
    """The totals and, in the same walk, the gradients of sum_i weight_i loss_i, where needed.

    For a loss that is linear in its totals, or whose columns have none: the slope of a row's loss
    is then known as soon as its tiles are. No tile is computed twice or kept.
    """
    walk = _Walk(r, c, bias, matrix)
    totals = matrix.totals(*walk.new_totals())
    sums = _Sums(walk, totals, r, c, bias, needs)
    if matrix.loss.linear:
        total = totals.joined()
        slopes, _ = matrix.loss.row_slopes(total, positive)
        sums.take(totals.coefficients(weight * slopes, total, matrix.dtype))
        for i, j, memory in walk:
            totals.add(walk.logits(i, j, memory), i, j, keep=True)
            sums.add(memory, i, j)
        totals.finish()
        return totals.joined(), sums.finish()
    weights = torch.as_tensor(weight, dtype=totals.rows.dtype, device=r.device).expand_as(positive)
    for band in walk.bands():
        for i, j, memory in band:
            totals.add(walk.logits(i, j, memory), i, j, keep=True)
        rows = band[0][0]
        totals.finish(rows)
        slopes, _ = matrix.loss.row_slopes(totals.rows[rows], positive[rows])
        sums.take(
            totals.coefficients(weights[rows] * slopes, totals.rows[rows], matrix.dtype), rows
        )
        for i, j, memory in band:
            sums.add(memory, i, j)
    return totals.rows, sums.finish()


def backward(
    grad: Tensor,
    total: Tensor,
    r: Tensor,
    c: Tensor | None,
    bias: Tensor | None,
    matrix: Matrix,
    ticket: object,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients on r, c and bias, each only where `needs` asks, from the gradient on the totals."""
    walk = _Walk(r, c, bias, matrix)
    kept = walk.find_tiles(ticket)
    totals = matrix.totals(*walk.split(total))
    sums = _Sums(walk, totals, r, c, bias, needs)
    sums.take(totals.coefficients(grad, total, matrix.dtype))
    for i, j, memory in walk:
        if not kept:
            totals.again(walk.logits(i, j, memory))
        sums.add(memory, i, j)
    return sums.finish()


class _Sums:
    """The gradients on r, c and bias, summed up tile by tile.

    With a loss of every column too, W_ij has a share of both: the tile becomes W. Otherwise
    W_ij = a_i s_ij with s the tile's slopes, which the products take as they are:

        grad_R = diag(a) (s C),    grad_C = s^T (diag(a) R).
    """

    def __init__(
        self,
        walk: "_Walk",
        totals: Totals,
        r: Tensor,
        c: Tensor | None,
        bias: Tensor | None,
        needs: tuple[bool, bool, bool],
    ) -> None:
        self._walk, self._totals = walk, totals
        self._grad_r = torch.zeros_like(r) if needs[0] else None
        self._grad_c = torch.zeros_like(c) if c is not None and needs[1] else None
        self._grad_bias = torch.zeros_like(bias) if bias is not None and needs[2] else None
        self._one_way = totals.columns is None
        self._a, self._b = r.new_empty(r.shape[0]), totals.columns
        scales_r = self._one_way and self._grad_c is not None
        self._factor = torch.empty_like(walk.r) if scales_r else walk.r

    def take(self, coefficients: Tensor, rows: slice = slice(None)) -> None:
        """Know the coefficients of these rows; of all rows and columns, if columns have some."""
        a, b = self._walk.split(coefficients.to(self._a.dtype))
        if rows == slice(None):
            self._a = a
        else:
            self._a[rows] = a
        self._b = b
        if self._factor is not self._walk.r:
            self._factor[rows] = self._walk.r[rows] * a[:, None]

    def add(self, kept: Tensor, i: slice, j: slice) -> None:
        """Add what the tile [i, j] says, of which the totals kept what they need."""
        walk, scratch = self._walk, self._walk.scratch(kept)
        if self._b is None:
            weight = self._totals.slopes(kept, i, out=scratch)
        else:
            weight = self._totals.weigh(kept, i, j, self._a, self._b, out=scratch)
        if self._grad_r is not None:
            _add_product(self._grad_r[i], weight, walk.c[j])
            if walk.symmetric and i != j:
                _add_product(self._grad_r[j], weight.T, walk.r[i])
        if self._grad_c is not None:
            _add_product(self._grad_c[j], weight.T, self._factor[i])
        if self._grad_bias is not None:
            of_rows = weight.sum(1, dtype=self._grad_bias.dtype)
            self._grad_bias += (of_rows * self._a[i] if self._one_way else of_rows).sum()

    def finish(self) -> Gradients:
        """The gradients, once every tile was added."""
        if self._one_way and self._grad_r is not None:
            self._grad_r *= self._a[:, None]
        return self._grad_r, self._grad_c, self._grad_bias


class _Walk:
    """The tiles of one matrix in their order, each with its memory; operands in matrix.dtype."""

    def __init__(self, r: Tensor, c: Tensor | None, bias: Tensor | None, matrix: Matrix) -> None:
        self.symmetric = c is None
        self.two_way = matrix.two_way
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
        buffer = empty((height * self.c.shape[0],), self.r)
        return (list(_placed(band, buffer)) for band in every)

    def keep_tiles(self) -> object:
        """Give every tile memory of its own, if all of them fit; the ticket to find them again."""
        if self._elements * self.r.element_size() > KEPT_BYTES:
            workspace.release()
            return None
        self._kept, ticket = workspace.claim(self._elements, self.r)
        return ticket

    def find_tiles(self, ticket: object) -> bool:
        """Whether the tiles that a walk kept are there, for this walk to go over again."""
        if not workspace.holds(ticket):
            return False
        self._kept = workspace.held()
        return True

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

    def new_totals(self) -> tuple[Tensor, Tensor | None]:
        # one number per row: a rounded logsumexp would scale the whole row's weights
        rows = torch.zeros(self.r.shape[0], dtype=torch.float64, device=self.r.device)
        if self.symmetric:
            return rows, rows
        return rows, rows.new_zeros(self.c.shape[0]) if self.two_way else None

    def split(self, total: Tensor) -> tuple[Tensor, Tensor | None]:
        """The rows' and the columns' part of a vector over the losses."""
        if self.symmetric:
            return total, total
        rows = self.r.shape[0]
        return total[:rows], total[rows:] if self.two_way else None


def _placed(tiles: Iterable[Tile], buffer: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """The tiles with their memory, one after the other in the buffer."""
    start = 0
    for i, j in tiles:
        height, width = i.stop - i.start, j.stop - j.start
        yield i, j, buffer[start : start + height * width].view(height, width)
        start += height * width


def _add_product(target: Tensor, a: Tensor, b: Tensor) -> None:
    """target += a b, added up in target's dtype."""
    if target.dtype == a.dtype:
        target.addmm_(a, b)
    else:
        target += a @ b
