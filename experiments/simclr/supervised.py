"""The supervised contrastive loss in SimCLR's place for a loss."""

from collections.abc import Callable

import torch
from torch import Tensor

from cosloss import SupConLoss


class TwoViewSupConLoss(SupConLoss):
    """SupConLoss over the rows of two views, each with its image's label.

    Example:
        >>> z = torch.eye(3)
        >>> TwoViewSupConLoss(temperature=1.0)(z, z, torch.tensor([0, 1, 2]))
        tensor(0.9048)
    """

    def forward(self, z1: Tensor, z2: Tensor, labels: Tensor) -> Tensor:
        return super().forward(torch.cat([z1, z2]), labels.repeat(2))

    def reference(self) -> Callable[..., Tensor]:
        """This module's twin in plain autograd torch operations, on one process."""
        twin = super().reference()
        return lambda z1, z2, labels: twin(torch.cat([z1, z2]), labels.repeat(2))
