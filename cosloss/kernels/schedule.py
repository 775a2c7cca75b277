"""The order of work on the tiles of a logit matrix, for every backend that goes tile by tile.

A tile is needed twice: for its rows' and columns' statistics, and, once the loss's gradient on
these is known, for its share of the gradients. It is known

- from the start, if the loss is linear in the statistics: one pass over the tiles does all;
- after the rows' own tiles, if the columns have no losses: a band of rows' tiles is kept at a time;
- after all tiles otherwise: they are kept, or computed again if there are too many.

Of K prefixes (`cosloss.kernels.prefixes`) a tile is K tiles, and a vector over the losses (K, ...).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cosloss.kernels.prefixes import Prefixes
from cosloss.kernels.stats import Gradients, LossGrads, Stats, loss_grads
from cosloss.problem import ALL, Problem

Needs = tuple[bool, bool, bool]  # whether r's, c's and bias's gradient is asked for


class TileLoop(ABC):
    """Abstract: one problem in a backend; its statistics and gradients, accumulated tile by tile.

    Shapes: rows R (N, D); columns C (M, D), or None where they are the rows.

    dtype: of a tile's logits.
    """

    def __init__(
        self,
        r: Tensor,
        c: Tensor | None,
        problem: Problem,
        dtype: torch.dtype,
        prefixes: Prefixes | None = None,
    ) -> None:
        self.problem = problem
        self.stats = Stats(problem, r, c, None if prefixes is None else len(prefixes.ends))
        self._sides, self._dtype = (r, c), dtype

    @abstractmethod
    def keep_tiles(self) -> None:
        """Give every tile memory of its own, if all of them fit."""

    @abstractmethod
    def bands(self) -> Iterator[slice]:
        """Rows whose tiles are kept together, until the next are."""

    @abstractmethod
    def run(
        self, rows: slice = ALL, *, accumulate: bool = False, grads: LossGrads | None = None
    ) -> None:
        """Go over these rows' tiles: add them to the statistics, and their share to the gradients.

        A tile's logits are computed if it is to be accumulated, or was not kept.
        grads: of all losses, or of these rows'.
        """

    @abstractmethod
    def gradients(self) -> Gradients:
        """The gradients on r, c and bias, each where needed, and of prefixes the sums along."""

    def forward(self) -> Tensor:
        """Every loss's statistic."""
        self.run(accumulate=True)
        return self.stats.finish()

    def forward_backward(
        self, weights: Tensor | float, positive: Tensor
    ) -> tuple[Tensor, Tensor, Gradients]:
        """The statistics, and the gradients of sum_i weights_i loss_i: on positive, and others."""
        loss_grad, stats = self.problem.criterion.loss_grad, self.stats
        if self.problem.criterion.linear:
            d_stat, d_positive = loss_grad(stats.finish(), positive)
            self.run(accumulate=True, grads=self._loss_grads(weights * d_stat, d_stat))
            return stats.finish(), weights * d_positive, self.gradients()
        if self.problem.column_losses:
            self.keep_tiles()
            self.run(accumulate=True)
            stat = stats.finish()
            d_stat, d_positive = loss_grad(stat, positive)
            d_positive = weights * d_positive
            d_pos_logit = self.problem.d_pos_logit(d_positive)
            self.run(grads=self._loss_grads(weights * d_stat, stat, d_pos_logit))
            return stat, d_positive, self.gradients()
        weights = torch.as_tensor(weights, dtype=stats.rows.dtype, device=stats.rows.device)
        weights, parts = weights.expand_as(positive), []
        for rows in self.bands():
            self.run(rows, accumulate=True)
            stat = stats.finish(rows)
            d_stat, d_positive = loss_grad(stat, positive[..., rows])
            parts.append(d_positive)
            self.run(rows, grads=self._loss_grads(weights[..., rows] * d_stat, stat))
        return stats.rows, weights * torch.cat(parts, -1), self.gradients()

    def backward(self, d_stat: Tensor, stat: Tensor, d_pos_logit: Tensor | None) -> Gradients:
        """The gradients from those on the statistics and on each of several positives."""
        self.run(grads=self._loss_grads(d_stat, stat, d_pos_logit))
        return self.gradients()

    def _loss_grads(
        self, d_stat: Tensor, stat: Tensor, d_pos_logit: Tensor | None = None
    ) -> LossGrads:
        return loss_grads(self.problem, d_stat, stat, d_pos_logit, *self._sides, self._dtype)


def functions_of(
    loop: Callable[
        [Tensor, Tensor | None, Tensor | None, Problem, Needs, Prefixes | None], TileLoop
    ],
) -> tuple[Callable[..., Tensor], Callable[..., Any], Callable[..., Gradients]]:
    """A backend's forward, forward_backward and backward, over its tile loop.

    Statistics are (N,) in float64, or (N + M,) where columns have losses of their own, rows first;
    `needs` says which gradients are asked for, on r, c and bias. With `prefixes` a vector over the
    losses is (K, N) or (K, N + M).
    """

    def forward(
        r: Tensor,
        c: Tensor | None,
        bias: Tensor | None,
        problem: Problem,
        prefixes: Prefixes | None = None,
    ) -> Tensor:
        """Every loss's statistic."""
        return loop(r, c, bias, problem, (False, False, False), prefixes).forward()

    def forward_backward(
        r: Tensor,
        c: Tensor | None,
        bias: Tensor | None,
        problem: Problem,
        *,
        weights: Tensor | float,
        positive: Tensor,
        needs: Needs,
        prefixes: Prefixes | None = None,
    ) -> tuple[Tensor, Tensor, Gradients]:
        """The statistics, and sum_i weights_i loss_i's gradients: on positive, and where needed."""
        return loop(r, c, bias, problem, needs, prefixes).forward_backward(weights, positive)

    def backward(
        r: Tensor,
        c: Tensor | None,
        bias: Tensor | None,
        problem: Problem,
        *,
        d_stat: Tensor,
        stat: Tensor,
        needs: Needs,
        d_pos_logit: Tensor | None = None,
        prefixes: Prefixes | None = None,
    ) -> Gradients:
        """The gradients that are needed, from those on the statistics and on several positives.

        d_pos_logit: like the statistics, the gradient on the logit of each of a row's positives.
        """
        return loop(r, c, bias, problem, needs, prefixes).backward(d_stat, stat, d_pos_logit)

    return forward, forward_backward, backward
