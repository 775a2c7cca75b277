"""The tile loop of a logit matrix, in torch operations.

Shapes: rows R (N, D); columns C (M, D), or None where they are the rows; logits X = R C^T + bias,
(N, M), in R's dtype.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from cosloss.kernels import tiles
from cosloss.kernels.eager.accumulators import ACCUMULATORS
from cosloss.kernels.prefixes import Prefixes
from cosloss.kernels.schedule import Needs, TileLoop
from cosloss.kernels.scratch import empty, workspace
from cosloss.kernels.stats import Gradients, LossGrads
from cosloss.problem import ALL, Problem


class EagerLoop(TileLoop):
    """The tiles in their order, each in memory of its own if they are kept.

    With column losses a tile becomes its d_logits W. Otherwise W = diag(d_rows) f', and the
    products take f' as it is stashed:

        grad_R = diag(d_rows) (f' C),    grad_C = f'^T (diag(d_rows) R).
    """

    def __init__(
        self,
        r: Tensor,
        c: Tensor | None,
        bias: Tensor | None,
        problem: Problem,
        needs: Needs,
        prefixes: Prefixes | None = None,
    ) -> None:
        super().__init__(r, c, problem, r.dtype, prefixes)
        self.symmetric, self.bias = c is None, bias
        self.r, self.c = r, r if c is None else c
        n, m = self.r.shape[0], self.c.shape[0]
        self._tiles = tiles.triangle(n, r.device) if self.symmetric else tiles.tiles(n, m, r.device)
        self._depth = 1 if prefixes is None else len(prefixes.ends)
        self._accumulator = ACCUMULATORS[problem.criterion.kind](self.stats, problem.criterion)
        self._kept: Tensor | None = None
        self._scratch: Tensor | None = None
        wide = torch.promote_types(r.dtype, torch.float32)
        self.grad_r = torch.zeros_like(r, dtype=wide) if needs[0] else None
        self.grad_c = torch.zeros_like(c, dtype=wide) if c is not None and needs[1] else None
        self.grad_bias = torch.zeros_like(bias) if bias is not None and needs[2] else None

    def keep_tiles(self) -> None:
        self._kept = tiles.kept_tiles(sum(map(self._elements, self._tiles)), self.r)

    def bands(self) -> Iterator[slice]:
        every = tiles.bands(self.r.shape[0], self.c.shape[0], self.r.device, self._depth)
        largest = max(sum(map(self._elements, band)) for band in every)
        self._kept = workspace.scratch("band", (largest,), self.r)
        for self._tiles in every:
            yield self._tiles[0][0]

    def run(
        self, rows: slice = ALL, *, accumulate: bool = False, grads: LossGrads | None = None
    ) -> None:
        factor, first = self.r[rows], rows.start or 0
        if grads is not None and grads.d_columns is None and self.grad_c is not None:
            factor = (factor * grads.d_rows[:, None]).to(factor.dtype)
        for i, j, tile in self._placed():
            if accumulate or self._kept is None:
                self._logits(tile, i, j)
            if accumulate:
                stash = grads is not None or self._kept is not None
                self._accumulator.add(tile, i, j, stash)
            elif self._kept is None:
                self._accumulator.stash(tile)
            if grads is not None:
                self._add_gradients(tile, grads, factor, i, j, first)
        if grads is not None and grads.d_columns is None and self.grad_r is not None:
            self.grad_r[rows] *= grads.d_rows[:, None]

    def gradients(self) -> Gradients:
        return self.grad_r, self.grad_c, self.grad_bias

    def _placed(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """The tiles with their memory: one after the other, or all in the same; (K, I, J) of K."""
        memory, start = self._kept, 0
        if memory is None:
            memory = empty((self._largest(),), self.r)
        for i, j in self._tiles:
            size, several = self._elements((i, j)), () if self._depth == 1 else (self._depth,)
            shape = *several, i.stop - i.start, j.stop - j.start
            yield i, j, memory[start : start + size].view(shape)
            start += 0 if self._kept is None else size

    def _logits(self, tile: Tensor, i: slice, j: slice) -> None:
        torch.mm(self.r[i], self.c[j].T, out=tile)
        if self.bias is not None:
            tile += self.bias
        self.problem.mask.fill(tile, i, j, -torch.inf)

    def _add_gradients(
        self, stash: Tensor, grads: LossGrads, factor: Tensor, i: slice, j: slice, first: int
    ) -> None:
        """Add a tile's share; factor and grads begin with the row `first`."""
        if self._scratch is None:
            self._scratch = empty((self._largest(),), self.r)
        scratch = self._scratch[: stash.numel()].view(stash.shape)
        own = slice(i.start - first, i.stop - first)
        d_logits = self._accumulator.d_logits(stash, grads, own, j, out=scratch)
        if grads.d_row_pos is not None and self.problem.positives is not None:
            assert grads.d_column_pos is not None
            pairs = self.problem.positives.tile(i, j) & self._accumulator.included(stash)
            d_logits += torch.where(pairs, grads.d_row_pos[own, None] + grads.d_column_pos[j], 0)
        if self.grad_r is not None:
            add_product(self.grad_r[i], d_logits, self.c[j])
            if self.symmetric and i != j:
                add_product(self.grad_r[j], d_logits.T, self.r[i])
        if self.grad_c is not None:
            add_product(self.grad_c[j], d_logits.T, factor[own])
        if self.grad_bias is not None:
            sums = d_logits.sum(1, dtype=self.grad_bias.dtype)
            self.grad_bias += (sums * grads.d_rows[own] if grads.d_columns is None else sums).sum()

    def _largest(self) -> int:
        return max(map(self._elements, self._tiles), default=0)

    def _elements(self, tile: tiles.Tile) -> int:
        i, j = tile
        return self._depth * (i.stop - i.start) * (j.stop - j.start)


def add_product(target: Tensor, a: Tensor, b: Tensor) -> None:
    """target += a b, added up in target's dtype."""
    if target.dtype == a.dtype:
        target.addmm_(a, b)
    else:
        target += a @ b
