"""What the engine asks of a loss: how tiles of logits turn into losses, and into weights."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from cosloss.kernels.eager.totals import LogSumExps, ShiftedLogSumExps, Totals

# exp(40), exp(-40) and sums of them over any batch are normal numbers in float32 and bfloat16
LARGEST_UNSHIFTED_LOGIT = 40.0


class TileLoss(ABC):
    """loss_i = rows(total_i, positive_i), the total taken over row i of a logit matrix.

    linear: whether `rows` is linear in the total, so that its slope is known before the total is.
    """

    linear = False

    @abstractmethod
    def totals(self, rows: Tensor, columns: Tensor | None) -> Totals:
        """The accumulator that tiles are added to, over zeros for the rows and the columns."""

    @abstractmethod
    def dense_total(self, x: Tensor, dim: int) -> Tensor:
        """The total along `dim` of the whole matrix, differentiable.

        Excluded pairs have a logit that is finite and lower than any other can be.
        """

    @abstractmethod
    def rows(self, total: Tensor, positive: Tensor) -> Tensor:
        """Each row's loss from its total and its positive's logit, differentiable."""

    @abstractmethod
    def row_slopes(self, total: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        """The derivatives of `rows` with respect to its two arguments."""


class LogSumExpLoss(TileLoss):
    """A loss whose total is the logsumexp of a row's logits.

    largest_logit: what no logit's magnitude exceeds; infinity if that is not known.
    """

    def __init__(self, largest_logit: float = torch.inf) -> None:
        self.largest_logit = largest_logit

    def totals(self, rows: Tensor, columns: Tensor | None) -> Totals:
        if self.largest_logit <= LARGEST_UNSHIFTED_LOGIT:
            return LogSumExps(rows, columns)
        return ShiftedLogSumExps(rows, columns)

    def dense_total(self, x: Tensor, dim: int) -> Tensor:
        return x.logsumexp(dim)
