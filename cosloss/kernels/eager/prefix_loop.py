"""The tile loop of nested prefixes, which share their products, in torch operations.

Notation of `cosloss.kernels.prefixes`; shapes as in `cosloss.kernels.eager.tile_loop`.
"""

import torch
from torch import Tensor

from cosloss.kernels.eager.accumulators import ACCUMULATORS
from cosloss.kernels.eager.tile_loop import EagerLoop, add_product
from cosloss.kernels.prefixes import Prefixes
from cosloss.kernels.schedule import Needs
from cosloss.kernels.stats import Gradients, LossGrads
from cosloss.problem import ALL, Problem


class PrefixLoop(EagerLoop):
    """The tiles in their order, each the logits of every prefix, (K, I, J).

    The gradients go from the longest prefix to the shortest, and besides them each row's and each
    column's sum of d_logit (x - bias).
    """

    def __init__(
        self,
        r: Tensor,
        c: Tensor | None,
        bias: Tensor | None,
        problem: Problem,
        needs: Needs,
        prefixes: Prefixes,
    ) -> None:
        super().__init__(r, c, bias, problem, needs, prefixes)
        self.prefixes = prefixes
        self._row_links, self._column_links = (
            x.to(r.dtype) for x in (prefixes.row_links, prefixes.column_links)
        )
        accumulator = ACCUMULATORS[problem.criterion.kind]
        self._accumulators = [
            accumulator(self.stats.of_prefix(k), problem.criterion) for k in range(self._depth)
        ]
        self.along_r = torch.zeros_like(prefixes.row_links, dtype=torch.float64)
        self.along_c = self.along_r
        if not self.symmetric:
            self.along_c = torch.zeros_like(prefixes.column_links, dtype=torch.float64)

    def run(
        self, rows: slice = ALL, *, accumulate: bool = False, grads: LossGrads | None = None
    ) -> None:
        for i, j, tile in self._placed():
            if accumulate or self._kept is None:
                self._logits_of_prefixes(tile, i, j)
            if accumulate:
                for x, accumulator in zip(tile, self._accumulators, strict=True):
                    accumulator.add(x.clone(), i, j, stash=False)
            if grads is not None:
                self._add_gradients_of_prefixes(tile, grads, i, j, rows.start or 0)

    def gradients(self) -> Gradients:
        return *super().gradients(), self.along_r, self.along_c

    def _logits_of_prefixes(self, tile: Tensor, i: slice, j: slice) -> None:
        for k, segment in enumerate(self.prefixes.segments):
            torch.mm(self.r[i, segment], self.c[j, segment].T, out=tile[k])
            if k > 0:
                tile[k] += self._linked(k, i, j, tile[k - 1])
        if self.bias is not None:
            tile += self.bias
        for x in tile:
            self.problem.mask.fill(x, i, j, -torch.inf)

    def _linked(self, k: int, i: slice, j: slice, x: Tensor) -> Tensor:
        """links_k x of a tile."""
        return x * self._row_links[k, i, None] * self._column_links[k, j]

    def _add_gradients_of_prefixes(
        self, tile: Tensor, grads: LossGrads, i: slice, j: slice, first: int
    ) -> None:
        """Add a tile's share; grads begin with the row `first`."""
        own = slice(i.start - first, i.stop - first)
        below = i != j or not self.symmetric
        g: Tensor | None = None
        for k, segment in reversed([*enumerate(self.prefixes.segments)]):
            d_logits = self._d_logits(tile[k].clone(), k, grads.of_prefix(k), own, i, j)
            if self.grad_bias is not None:
                self.grad_bias += d_logits.sum(dtype=self.grad_bias.dtype)
            logits = tile[k] if self.bias is None else tile[k] - self.bias
            along = d_logits * logits.masked_fill(tile[k] == -torch.inf, 0)
            self.along_r[k, i] += along.sum(1)
            if below:
                self.along_c[k, j] += along.sum(0)
            g = d_logits if g is None else d_logits + self._linked(k + 1, i, j, g)
            if self.grad_r is not None:
                add_product(self.grad_r[i, segment], g, self.c[j, segment])
            of_columns = self.grad_r if self.symmetric else self.grad_c
            if of_columns is not None and below:
                add_product(of_columns[j, segment], g.T, self.r[i, segment])

    def _d_logits(
        self, x: Tensor, k: int, grads: LossGrads, own: slice, i: slice, j: slice
    ) -> Tensor:
        """The gradient on prefix k's logits x; x is overwritten."""
        accumulator = self._accumulators[k]
        accumulator.stash(x)
        d_logits = accumulator.d_logits(x, grads, own, j, out=torch.empty_like(x))
        if grads.d_columns is None:
            d_logits = d_logits * grads.d_rows[own, None]
        if grads.d_row_pos is not None and self.problem.positives is not None:
            assert grads.d_column_pos is not None
            pairs = self.problem.positives.tile(i, j) & accumulator.included(x)
            d_logits += torch.where(pairs, grads.d_row_pos[own, None] + grads.d_column_pos[j], 0)
        return d_logits
