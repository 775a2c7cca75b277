"""SigLIP's pairwise sigmoid loss; x is a logit, similarity / temperature + bias.

loss = softplus(-positive) + total, total = sum over the row's negatives of softplus(x).
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from cosloss.kernels.eager.tile_loss import TileLoss
from cosloss.kernels.eager.totals import Sums


class SigmoidContrast(TileLoss):
    """Every pair a binary classification of its own: same item or not."""

    linear = True

    def totals(self, rows: Tensor, columns: Tensor | None) -> Sums:
        return _Softplus(rows, columns)

    def dense_total(self, x: Tensor, dim: int) -> Tensor:
        return softplus(x, threshold=40.0).sum(dim)

    def rows(self, total: Tensor, positive: Tensor) -> Tensor:
        return softplus(-positive, threshold=40.0) + total

    def row_slopes(self, total: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(total), -torch.sigmoid(-positive)


class _Softplus(Sums):
    """Sums of log(1 + exp(x))."""

    kind = "softplus"

    def value(self, x: Tensor) -> Tensor:
        # beyond the threshold softplus is its argument, up to exp(-40)
        return softplus(x, threshold=40.0)

    def slope(self, x: Tensor) -> None:
        x.sigmoid_()
