"""The statistics of rows and columns while tiles go by, and the loss's gradient on them.

Shapes: statistics (N,) of the rows and (M,) of the columns; a vector over the losses is (N,), or
(N + M,) where columns that are not the rows have losses too, rows first. Of K prefixes, each is
(K, N), (K, M) or (K, N + M).
"""

from collections.abc import Callable, Sequence
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from cosloss.criteria import empty_lse
from cosloss.problem import ALL, Problem

# no lse of unshifted logits is below -40
LARGEST_SHIFT = 50.0


# on r, c and bias; of prefixes besides, each row's and each column's sum of d_logit (x - bias)
Gradients = tuple[Tensor | None, ...]


class Stats:
    """Accumulators over zeros, for the rows, and for the columns where these have losses.

    columns: `rows` where the columns are the rows, and None where they have no losses.
    row_max, column_max: the largest logits so far, below which "logsumexp" adds up exp; else None.
    """

    def __init__(
        self, problem: Problem, r: Tensor, c: Tensor | None, prefixes: int | None = None
    ) -> None:
        self._kind = problem.criterion.kind
        several = () if prefixes is None else (prefixes,)
        # in float64: an lse that is off by e scales its row's whole gradient by 1 + e
        self.rows = torch.zeros(*several, r.shape[0], dtype=torch.float64, device=r.device)
        self.columns: Tensor | None = self.rows
        if c is not None:
            self.columns = None
            if problem.column_losses:
                self.columns = self.rows.new_zeros(*several, c.shape[0])
        self.row_max: Tensor | None = None
        self.column_max: Tensor | None = None
        if self._kind == "logsumexp":
            lowest = empty_lse(torch.float64)
            self.row_max = self.column_max = torch.full_like(self.rows, lowest)
            if self.columns is not None and self.columns is not self.rows:
                self.column_max = torch.full_like(self.columns, lowest)

    def of_prefix(self, number: int) -> "Stats":
        """A view of one prefix's."""
        own = copy(self)
        own.rows = self.rows[number]
        own.columns, own.row_max, own.column_max = (
            None if x is None else x[number] for x in (self.columns, self.row_max, self.column_max)
        )
        if self.columns is self.rows:
            own.columns = own.rows
        return own

    def finish(self, rows: slice = ALL) -> Tensor:
        """Every loss's statistic, or these rows', once all their tiles were added."""
        if "exp" in self._kind:
            self._take_logarithm(self.rows, self.row_max, rows)
            if self.columns is not None and self.columns is not self.rows:
                self._take_logarithm(self.columns, self.column_max, ALL)
        if self.columns is None or self.columns is self.rows:
            return self.rows[..., rows]
        return torch.cat([self.rows, self.columns], -1)

    @staticmethod
    def _take_logarithm(sums: Tensor, largest: Tensor | None, part: slice) -> None:
        lse = sums[..., part].log_()
        if largest is not None:
            lse += largest[..., part]
        lse.clamp_(min=empty_lse(lse.dtype))


def merged(problem: Problem, parts: Sequence[Tensor]) -> Tensor:
    """Every loss's statistic, from those of parts of its pairs."""
    every = torch.stack([*parts])
    return every.logsumexp(0) if "exp" in problem.criterion.kind else every.sum(0)


class LossGrads(NamedTuple):
    """The gradient of the loss on the statistics, in the form that gives the one on a logit.

    d_logit_ij = f'(x_ij) (d_rows_i + d_columns_j), where f is exp for "exp", or for "logsumexp"

    d_logit_ij = d_rows_i exp(x_ij - row_shift_i) + d_columns_j exp(x_ij - column_shift_j),

    and at a positive pair of several, d_row_pos_i + d_column_pos_j more. What is None is 0.
    """

    d_rows: Tensor
    d_columns: Tensor | None
    row_shift: Tensor | None
    column_shift: Tensor | None
    d_row_pos: Tensor | None
    d_column_pos: Tensor | None

    def of_prefix(self, number: int) -> "LossGrads":
        """A view of one prefix's."""
        return self._each(lambda x: x[number])

    def contiguous(self) -> "LossGrads":
        """The same, each one in memory of its own."""
        return self._each(Tensor.contiguous)

    def _each(self, of: Callable[[Tensor], Tensor]) -> "LossGrads":
        d_rows, *rest = self
        return LossGrads(of(d_rows), *(None if x is None else of(x) for x in rest))


def loss_grads(
    problem: Problem,
    d_stat: Tensor,
    stat: Tensor,
    d_pos_logit: Tensor | None,
    r: Tensor,
    c: Tensor | None,
    dtype: torch.dtype,
) -> LossGrads:
    """The gradient d_stat on statistics, of all losses or some rows', for logits of that dtype.

    d_pos_logit: like the statistics, the gradient on the logit of each of a row's positives.
    """
    wide = torch.promote_types(dtype, torch.float32)
    shift: tuple[Tensor | None, Tensor | None] = (None, None)
    positives: tuple[Tensor | None, Tensor | None] = (None, None)
    if problem.criterion.kind == "exp":
        # a row without pairs has d_stat = 0, which must not meet an infinity
        d_stat = d_stat * (-stat).clamp_(max=LARGEST_SHIFT).exp_()
    elif problem.criterion.kind == "logsumexp":
        # the lse as a shift in the logits' dtype and the rest; that of no pairs is beyond the dtype
        rounded = stat.clamp(min=empty_lse(dtype)).to(dtype)
        d_stat = d_stat * (rounded - stat).clamp_(max=1).exp_()
        shift = problem.split(rounded, r, c)
    if d_pos_logit is not None:
        positives = problem.split(d_pos_logit.to(wide), r, c)
    return LossGrads(*problem.split(d_stat.to(wide), r, c), *shift, *positives)
