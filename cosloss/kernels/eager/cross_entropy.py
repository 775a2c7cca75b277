"""The rows of NT-Xent, InfoNCE, their decoupled form and SupCon; total is a logsumexp.

NT-Xent and InfoNCE, total over the negatives:

    loss = -positive + log(exp(positive) + exp(total)) = softplus(total - positive).

Decoupled, the positive is left out of the logarithm, and in SupCon the total has it already:

    loss = total - positive.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from cosloss.kernels.eager.tile_loss import LogSumExpLoss
from cosloss.kernels.eager.totals import empty_total


class CrossEntropy(LogSumExpLoss):
    """A positive against itself and the negatives; without negatives the loss is 0."""

    def rows(self, total: Tensor, positive: Tensor) -> Tensor:
        # torch's softplus is its argument beyond the threshold: off by exp(-40) at most
        return softplus(total - positive, threshold=40.0)

    def row_slopes(self, total: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        slope = torch.sigmoid(total - positive)
        return slope, -slope


class Contrast(LogSumExpLoss):
    """A positive against the total alone; without a pair in the total the loss is 0."""

    def rows(self, total: Tensor, positive: Tensor) -> Tensor:
        return (total - positive).masked_fill(_without_pairs(total), 0)

    def row_slopes(self, total: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        slope = (~_without_pairs(total)).to(total.dtype)
        return slope, -slope


def _without_pairs(total: Tensor) -> Tensor:
    return total < empty_total(total.dtype) / 2
