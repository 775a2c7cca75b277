"""The in-batch cosine embedding loss; a logit is a similarity.

loss = distance + total / M, total = sum over the row's M negatives of max(0, S - margin).

The positive comes as its distance 1 - S, which is accurate where S is near 1.
"""

import torch
from torch import Tensor

from cosloss.kernels.eager.tile_loss import TileLoss
from cosloss.kernels.eager.totals import Sums


class CosineEmbedding(TileLoss):
    """Positives pulled to similarity 1, negatives pushed below the margin.

    negatives: M, a number or one per row; their number over their weight.
    """

    linear = True

    def __init__(self, margin: float, negatives: float | Tensor) -> None:
        self.margin = margin
        self.negatives = negatives

    def totals(self, rows: Tensor, columns: Tensor | None) -> Sums:
        return _Hinges(self.margin, rows, columns)

    def dense_total(self, x: Tensor, dim: int) -> Tensor:
        return torch.relu(x - self.margin).sum(dim)

    def rows(self, total: Tensor, positive: Tensor) -> Tensor:
        return positive + total / self.negatives

    def row_slopes(self, total: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(total) / self.negatives, torch.ones_like(positive)


class _Hinges(Sums):
    """Sums of max(0, x - margin)."""

    kind = "hinge"

    def __init__(self, margin: float, rows: Tensor, columns: Tensor | None) -> None:
        super().__init__(rows, columns)
        self.margin = margin

    def value(self, x: Tensor) -> Tensor:
        return x.sub_(self.margin).relu_()

    def slope(self, x: Tensor) -> None:
        x.sign_()

    def again(self, x: Tensor) -> None:
        self.value(x).sign_()
