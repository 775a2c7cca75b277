"""What is added up along the rows, and the columns, of a logit matrix while its tiles go by.

Shapes: x is a tile X[I, J] of the matrix (N, M); a total is (N,) for the rows, (M,) for the
columns, one and the same where the matrix is symmetric. An excluded pair has the logit -inf, at
which a pair's share of a total, and its slope, are zero.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

# no total of unshifted logits is below -40
LARGEST_SHIFT = 50.0


def empty_total(dtype: torch.dtype) -> float:
    """The finite stand-in for log 0, the logsumexp of a row without pairs."""
    return torch.finfo(dtype).min / 4


class Totals(ABC):
    """Row totals and, for a matrix whose columns have losses too, column totals.

    kind: the name by which other backends know these totals, and their margin.
    """

    kind: str
    margin = 0.0

    def __init__(self, rows: Tensor, columns: Tensor | None) -> None:
        self.rows = rows
        self.columns = columns

    @abstractmethod
    def add(self, x: Tensor, i: slice, j: slice, keep: bool) -> None:
        """Add a tile; with `keep`, leave in it what `weigh` needs, else anything."""

    @abstractmethod
    def again(self, x: Tensor) -> None:
        """Leave in the tile what `add` with `keep` left in it."""

    @abstractmethod
    def slopes(self, kept: Tensor, i: slice, out: Tensor) -> Tensor:
        """The gradient on the tile's logits for totals of the rows only, coefficients of 1."""

    @abstractmethod
    def weigh(self, kept: Tensor, i: slice, j: slice, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        """The gradient on the tile's logits, from all rows' and all columns' coefficients."""

    @abstractmethod
    def included(self, kept: Tensor) -> Tensor:
        """True at the tile's pairs that are not excluded."""

    def coefficients(self, grad: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:
        """The coefficients from the gradient on the totals, for logits of that dtype."""
        return grad

    def finish(self, rows: slice = slice(None)) -> None:  # noqa: B027 (sums need none)
        """Called once every tile of these rows was added; of all rows, if columns have totals."""

    def joined(self) -> Tensor:
        """The rows' totals followed by the columns', where those are others."""
        return self.rows if len(self._distinct()) == 1 else torch.cat(self._distinct())

    def _counts_columns(self, i: slice, j: slice) -> bool:
        return self.columns is not None and not (self.columns is self.rows and i == j)

    def _distinct(self) -> list[Tensor]:
        if self.columns is None or self.columns is self.rows:
            return [self.rows]
        return [self.rows, self.columns]


class Sums(Totals):
    """total_i = sum_j f(x_ij); the gradient on x_ij is f'(x_ij) (a_i + b_j)."""

    @abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """f of a tile, in x's memory or not."""

    @abstractmethod
    def slope(self, x: Tensor) -> None:
        """f' of a tile, in place of x or of what `value` left in x."""

    def add(self, x: Tensor, i: slice, j: slice, keep: bool) -> None:
        value = self.value(x)
        self.rows[i].add_(value.sum(1))
        if self.columns is not None and self._counts_columns(i, j):
            self.columns[j].add_(value.sum(0))
        if keep:
            self.slope(x)

    def again(self, x: Tensor) -> None:
        self.slope(x)

    def slopes(self, kept: Tensor, i: slice, out: Tensor) -> Tensor:
        return kept

    def weigh(self, kept: Tensor, i: slice, j: slice, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        return torch.add(a[i, None], b[j], out=out).mul_(kept)

    def included(self, kept: Tensor) -> Tensor:
        return kept != 0  # as no slope of the others is, of those sums that have positives


class LogSumExps(Sums):
    """total_i = log sum_j exp(x_ij), for logits so small that exp needs no shift.

    The gradient on x_ij is exp(x_ij) (a_i + b_j), a_i = g_i exp(-total_i) for a gradient g_i.
    """

    kind = "exp"

    def value(self, x: Tensor) -> Tensor:
        return x.exp_()

    def slope(self, x: Tensor) -> None:
        """exp is its own slope: `value` left it in x."""

    def again(self, x: Tensor) -> None:
        x.exp_()

    def finish(self, rows: slice = slice(None)) -> None:
        for total in self._distinct():
            part = total if rows == slice(None) else total[rows]
            part.log_().clamp_(min=empty_total(total.dtype))

    def coefficients(self, grad: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:
        # a row without pairs has the gradient 0, which must not meet an infinity
        return grad * (-total).clamp_(max=LARGEST_SHIFT).exp_()


class ShiftedLogSumExps(Totals):
    """total_i = log sum_j exp(x_ij), for logits of any size: exp is taken below a running maximum.

    The gradient on x_ij is g_i exp(x_ij - total_i) + g_j exp(x_ij - total_j), where a total is
    taken as t + rest, t in the logits' dtype, and a_i = g_i exp(-rest_i).
    """

    kind = "logsumexp"

    def __init__(self, rows: Tensor, columns: Tensor | None) -> None:
        super().__init__(rows, columns)
        self.largest = [
            torch.full_like(total, empty_total(total.dtype)) for total in self._distinct()
        ]

    def add(self, x: Tensor, i: slice, j: slice, keep: bool) -> None:
        self._add(x, self.rows[i], self.largest[0][i])
        if self.columns is not None and self._counts_columns(i, j):
            self._add(x.T, self.columns[j], self.largest[-1][j])

    @staticmethod
    def _add(x: Tensor, total: Tensor, largest: Tensor) -> None:
        now = torch.maximum(largest, x.amax(1))
        total *= (largest - now).exp_()
        total += (x - rounded(now[:, None], x.dtype)).exp_().sum(1)
        largest.copy_(now)

    def again(self, x: Tensor) -> None:
        """The logits are what `weigh` needs."""

    def finish(self, rows: slice = slice(None)) -> None:
        for total, largest in zip(self._distinct(), self.largest, strict=True):
            total[rows].log_().add_(largest[rows]).clamp_(min=empty_total(total.dtype))

    def coefficients(self, grad: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:
        rest = total - rounded(total, dtype)
        return grad * (-rest).clamp_(max=1).exp_()

    def slopes(self, kept: Tensor, i: slice, out: Tensor) -> Tensor:
        return torch.sub(kept, rounded(self.rows[i, None], kept.dtype), out=out).exp_()

    def weigh(self, kept: Tensor, i: slice, j: slice, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        assert self.columns is not None
        self.slopes(kept, i, out).mul_(a[i, None])
        out += (kept - rounded(self.columns[j], kept.dtype)).exp_().mul_(b[j])
        return out

    def included(self, kept: Tensor) -> Tensor:
        return kept != -torch.inf


def rounded(total: Tensor, dtype: torch.dtype) -> Tensor:
    """The totals in the logits' dtype."""
    # the total of a row without pairs is beyond any other dtype
    return total.clamp(min=empty_total(dtype)).to(dtype)
