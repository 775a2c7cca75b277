"""Modules of the in-batch contrastive losses."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cosloss import functional, reference
from cosloss.losses._temperature import TemperatureLoss


class NTXentLoss(TemperatureLoss):
    """NT-Xent, SimCLR's loss: see `cosloss.functional.nt_xent_loss`.

    Example:
        >>> import torch
        >>> NTXentLoss(temperature=0.5)(torch.eye(2), torch.eye(2))
        tensor(0.2395)
    """

    def __init__(
        self,
        temperature: float = 0.5,
        reduction: str = "mean",
        *,
        decoupled: bool = False,
        learnable_temperature: bool = False,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__(temperature, learnable_temperature, gather_distributed)
        self.reduction = reduction
        self.decoupled = decoupled

    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        *,
        ignore: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        return functional.nt_xent_loss(
            z1,
            z2,
            **self._arguments(),
            ignore=ignore,
            weight=weight,
            gather_distributed=self.gather_distributed,
        )

    def reference(self) -> Callable[..., Tensor]:
        """This module's twin in plain autograd torch operations, on one process."""
        return partial(reference.nt_xent_loss, **self._arguments())

    def _arguments(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "reduction": self.reduction,
            "decoupled": self.decoupled,
        }

    def extra_repr(self) -> str:
        decoupled = ", decoupled=True" if self.decoupled else ""
        return f"{super().extra_repr()}, reduction={self.reduction!r}{decoupled}"


class InfoNCELoss(TemperatureLoss):
    """InfoNCE, the loss of CLIP and MoCo: see `cosloss.functional.info_nce_loss`.

    Example:
        >>> import torch
        >>> InfoNCELoss(temperature=1.0, symmetric=True)(torch.eye(2), torch.eye(2))
        tensor(0.3133)
    """

    def __init__(
        self,
        temperature: float = 0.07,
        symmetric: bool = False,
        reduction: str = "mean",
        *,
        learnable_temperature: bool = False,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__(temperature, learnable_temperature, gather_distributed)
        self.symmetric = symmetric
        self.reduction = reduction

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None = None,
        *,
        ignore: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        return functional.info_nce_loss(
            query,
            key,
            negatives=negatives,
            **self._arguments(),
            ignore=ignore,
            weight=weight,
            gather_distributed=self.gather_distributed,
        )

    def reference(self) -> Callable[..., Tensor]:
        """This module's twin in plain autograd torch operations, on one process."""
        arguments = self._arguments()

        def twin(
            query: Tensor, key: Tensor, negatives: Tensor | None = None, **more: Any
        ) -> Tensor:
            return reference.info_nce_loss(query, key, negatives=negatives, **more, **arguments)

        return twin

    def _arguments(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "symmetric": self.symmetric,
            "reduction": self.reduction,
        }

    def extra_repr(self) -> str:
        symmetric = ", symmetric=True" if self.symmetric else ""
        return f"{super().extra_repr()}{symmetric}, reduction={self.reduction!r}"


class SupConLoss(TemperatureLoss):
    """Supervised contrastive loss: see `cosloss.functional.sup_con_loss`.

    `rows_without_positive` holds, as a tensor, how many rows the latest batch left out.

    Example:
        >>> import torch
        >>> loss = SupConLoss(temperature=1.0)
        >>> loss(torch.eye(3), torch.tensor([0, 0, 1])), loss.rows_without_positive
        (tensor(0.6931), tensor(1))
    """

    rows_without_positive: Tensor

    def __init__(
        self,
        temperature: float = 0.1,
        reduction: str = "mean",
        *,
        learnable_temperature: bool = False,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__(temperature, learnable_temperature, gather_distributed)
        self.reduction = reduction
        self.register_buffer("rows_without_positive", torch.tensor(0), persistent=False)

    def forward(
        self,
        z: Tensor,
        labels: Tensor,
        *,
        ignore: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        loss = functional.sup_con_loss(
            z,
            labels,
            **self._arguments(),
            ignore=ignore,
            weight=weight,
            gather_distributed=self.gather_distributed,
        )
        self.rows_without_positive = functional.rows_without_positive(labels)
        return loss

    def reference(self) -> Callable[..., Tensor]:
        """This module's twin in plain autograd torch operations, on one process."""
        return partial(reference.sup_con_loss, **self._arguments())

    def _arguments(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "reduction": self.reduction}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, reduction={self.reduction!r}"


class SigmoidContrastiveLoss(TemperatureLoss):
    """SigLIP's pairwise sigmoid loss: see `cosloss.functional.sigmoid_contrastive_loss`.

    Temperature and bias are learnable from the paper's initial values, unless told otherwise.

    Example:
        >>> import torch
        >>> loss = SigmoidContrastiveLoss()
        >>> loss(torch.eye(2), torch.eye(2)).detach()
        tensor(0.6932)
    """

    def __init__(
        self,
        temperature: float = 0.1,
        bias: float = -10.0,
        reduction: str = "mean",
        *,
        learnable_temperature: bool = True,
        learnable_bias: bool = True,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__(temperature, learnable_temperature, gather_distributed)
        self.reduction = reduction
        self.bias = nn.Parameter(torch.tensor(bias)) if learnable_bias else bias

    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        *,
        ignore: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        return functional.sigmoid_contrastive_loss(
            z1,
            z2,
            **self._arguments(),
            ignore=ignore,
            weight=weight,
            gather_distributed=self.gather_distributed,
        )

    def reference(self) -> Callable[..., Tensor]:
        """This module's twin in plain autograd torch operations, on one process."""
        return partial(reference.sigmoid_contrastive_loss, **self._arguments())

    def _arguments(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "bias": self.bias, "reduction": self.reduction}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias={float(self.bias):.4g}, reduction={self.reduction!r}"
