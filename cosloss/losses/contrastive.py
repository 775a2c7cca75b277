"""Modules of the in-batch contrastive losses."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from cosloss import functional, reference


class NTXentLoss(nn.Module):
    """NT-Xent, SimCLR's loss: see `cosloss.functional.nt_xent_loss`.

    Example:
        >>> import torch
        >>> NTXentLoss(temperature=0.5)(torch.eye(2), torch.eye(2))
        tensor(0.2395)
    """

    def __init__(self, temperature: float = 0.5, reduction: str = "mean") -> None:
        super().__init__()
        self.temperature = temperature
        self.reduction = reduction

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return functional.nt_xent_loss(z1, z2, self.temperature, self.reduction)

    def reference(self) -> Callable[..., Tensor]:
        """This module's twin in plain autograd torch operations."""
        return partial(
            reference.nt_xent_loss, temperature=self.temperature, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}"
