"""The statistics of tiles by torch operations, and the gradient on their logits, by kind.

Shapes: x is a tile X[I, J] of the matrix (N, M). A masked pair has the logit -inf, where f and f'
are 0.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import softplus

from cosloss.criteria import THRESHOLD, Criterion, empty_lse
from cosloss.kernels.stats import LossGrads, Stats


class Accumulator(ABC):
    """Abstract: adds tiles to the statistics, and stashes in a tile what its gradient needs."""

    def __init__(self, stats: Stats, criterion: Criterion) -> None:
        self.stats = stats
        self.margin = criterion.margin

    @abstractmethod
    def add(self, x: Tensor, i: slice, j: slice, stash: bool) -> None:
        """Add a tile of logits; overwrite it with its stash, or with anything if none is needed."""

    @abstractmethod
    def stash(self, x: Tensor) -> None:
        """Overwrite a tile of logits with its stash: f'(x), or for "logsumexp" x itself."""

    @abstractmethod
    def d_logits(self, stash: Tensor, grads: LossGrads, i: slice, j: slice, out: Tensor) -> Tensor:
        """The gradient on a tile's logits, of rows `i` of `grads` and columns `j`.

        Without column losses, that for d_rows = 1: f' alone.
        """

    @abstractmethod
    def included(self, stash: Tensor) -> Tensor:
        """True at a tile's pairs that are not masked."""

    def _columns(self, i: slice, j: slice) -> Tensor | None:
        """The statistics that the tile's columns count in; on the diagonal its rows hold them."""
        columns = self.stats.columns
        if columns is None or (columns is self.stats.rows and i == j):
            return None
        return columns[j]


class SumAccumulator(Accumulator):
    """Abstract: stat_i = sum_j f(x_ij)."""

    @abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """f of a tile, in x's memory or not."""

    @abstractmethod
    def slope(self, x: Tensor) -> None:
        """f' of a tile, in place of x or of what `value` left in x."""

    def add(self, x: Tensor, i: slice, j: slice, stash: bool) -> None:
        value, columns = self.value(x), self._columns(i, j)
        self.stats.rows[i].add_(value.sum(1))
        if columns is not None:
            columns.add_(value.sum(0))
        if stash:
            self.slope(x)

    def stash(self, x: Tensor) -> None:
        self.slope(x)

    def d_logits(self, stash: Tensor, grads: LossGrads, i: slice, j: slice, out: Tensor) -> Tensor:
        if grads.d_columns is None:
            return stash
        return torch.add(grads.d_rows[i, None], grads.d_columns[j], out=out).mul_(stash)

    def included(self, stash: Tensor) -> Tensor:
        return stash != 0  # only an lse has positives, and exp(x) is 0 at masked pairs alone


class ExpSum(SumAccumulator):
    """f = exp, for logits so small that it needs no shift."""

    def value(self, x: Tensor) -> Tensor:
        return x.exp_()

    def slope(self, x: Tensor) -> None:
        """Nothing: exp is its own slope, and `value` left it in x."""

    def stash(self, x: Tensor) -> None:
        x.exp_()


class SoftplusSum(SumAccumulator):
    """f(x) = log(1 + exp(x))."""

    def value(self, x: Tensor) -> Tensor:
        return softplus(x, threshold=THRESHOLD)

    def slope(self, x: Tensor) -> None:
        x.sigmoid_()


class HingeSum(SumAccumulator):
    """f(x) = max(0, x - margin)."""

    def value(self, x: Tensor) -> Tensor:
        return x.sub_(self.margin).relu_()

    def slope(self, x: Tensor) -> None:
        x.sign_()

    def stash(self, x: Tensor) -> None:
        self.value(x).sign_()


class OnlineLogSumExp(Accumulator):
    """stat_i = log sum_j exp(x_ij), exp taken below a running maximum, for any logits."""

    def add(self, x: Tensor, i: slice, j: slice, stash: bool) -> None:
        stats, columns = self.stats, self._columns(i, j)
        assert stats.row_max is not None
        _add_below_maximum(x, stats.rows[i], stats.row_max[i])
        if columns is not None:
            assert stats.column_max is not None
            _add_below_maximum(x.T, columns, stats.column_max[j])

    def stash(self, x: Tensor) -> None:
        """Nothing: the logits are the stash."""

    def d_logits(self, stash: Tensor, grads: LossGrads, i: slice, j: slice, out: Tensor) -> Tensor:
        assert grads.row_shift is not None
        torch.sub(stash, grads.row_shift[i, None], out=out).exp_()
        if grads.d_columns is not None:
            assert grads.column_shift is not None
            out.mul_(grads.d_rows[i, None])
            out += (stash - grads.column_shift[j]).exp_().mul_(grads.d_columns[j])
        return out

    def included(self, stash: Tensor) -> Tensor:
        return stash != -torch.inf


ACCUMULATORS: dict[str, type[Accumulator]] = {
    "exp": ExpSum,
    "logsumexp": OnlineLogSumExp,
    "softplus": SoftplusSum,
    "hinge": HingeSum,
}


def _add_below_maximum(x: Tensor, sums: Tensor, largest: Tensor) -> None:
    now = torch.maximum(largest, x.amax(1))
    sums *= (largest - now).exp_()
    shift = now[:, None].clamp(min=empty_lse(x.dtype)).to(x.dtype)
    sums += (x - shift).exp_().sum(1)
    largest.copy_(now)
