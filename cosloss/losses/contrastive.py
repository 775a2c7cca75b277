"""Modules of the in-batch contrastive losses."""

from collections.abc import Callable
from typing import Any, Unpack

from torch import Tensor

from cosloss import functional, reference
from cosloss.arguments import check_flags
from cosloss.losses._base import ContrastiveLoss, Options, checked_number
from cosloss.modes import differentiates_itself


class NTXentLoss(ContrastiveLoss):
    """NT-Xent, SimCLR's loss: see `cosloss.functional.nt_xent_loss`.

    Example:
        >>> import torch
        >>> NTXentLoss(temperature=0.5)(torch.eye(2), torch.eye(2))
        tensor(0.2395)
    """

    function = "nt_xent_loss"
    hyperparameters = ("temperature", "reduction", "decoupled")

    def __init__(
        self,
        temperature: float = 0.5,
        reduction: str = "mean",
        *,
        decoupled: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(temperature, reduction, **options)
        check_flags(decoupled=decoupled)
        self.decoupled = decoupled


class InfoNCELoss(ContrastiveLoss):
    """InfoNCE, the loss of CLIP and MoCo: see `cosloss.functional.info_nce_loss`.

    Example:
        >>> import torch
        >>> InfoNCELoss(temperature=1.0, symmetric=True)(torch.eye(2), torch.eye(2))
        tensor(0.3133)
    """

    function = "info_nce_loss"
    hyperparameters = ("temperature", "reduction", "symmetric")

    def __init__(
        self,
        temperature: float = 0.07,
        reduction: str = "mean",
        *,
        symmetric: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(temperature, reduction, **options)
        check_flags(symmetric=symmetric)
        self.symmetric = symmetric

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None = None,
        *,
        ignore: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        return self._loss(query, key, negatives=negatives, ignore=ignore, weight=weight)

    def reference(self) -> Callable[..., Tensor]:
        """This module's twin in plain autograd torch operations, on one process."""
        arguments = self._arguments()

        def twin(
            query: Tensor, key: Tensor, negatives: Tensor | None = None, **more: Any
        ) -> Tensor:
            return reference.info_nce_loss(query, key, negatives=negatives, **more, **arguments)

        return twin


class SupConLoss(ContrastiveLoss):
    """Supervised contrastive loss: see `cosloss.functional.sup_con_loss`.

    `rows_without_positive` holds, as a tensor, how many rows the latest batch left out; None before
    the first, and unchanged by a batch whose labels cannot be read (torch.compile, torch.export,
    torch.func, meta tensors).

    Example:
        >>> import torch
        >>> loss = SupConLoss(temperature=1.0)
        >>> loss(torch.eye(3), torch.tensor([0, 0, 1])), loss.rows_without_positive
        (tensor(0.6931), tensor(1))
    """

    function = "sup_con_loss"
    hyperparameters = ("temperature", "reduction")

    rows_without_positive: Tensor | None

    def __init__(
        self,
        temperature: float = 0.1,
        reduction: str = "mean",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(temperature, reduction, **options)
        self.rows_without_positive = None

    def forward(
        self,
        z: Tensor,
        labels: Tensor,
        *,
        ignore: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        loss = self._loss(z, labels, ignore=ignore, weight=weight)
        if not differentiates_itself(labels):
            self.rows_without_positive = functional.rows_without_positive(labels)
        return loss


class SigmoidContrastiveLoss(ContrastiveLoss):
    """SigLIP's pairwise sigmoid loss: see `cosloss.functional.sigmoid_contrastive_loss`.

    Temperature and bias are learnable from the paper's initial values, unless told otherwise.

    Example:
        >>> import torch
        >>> loss = SigmoidContrastiveLoss()
        >>> loss(torch.eye(2), torch.eye(2)).detach()
        tensor(0.6932)
    """

    function = "sigmoid_contrastive_loss"
    hyperparameters = ("temperature", "bias", "reduction")

    bias: Any  # a number, or a parameter

    def __init__(
        self,
        temperature: float = 0.1,
        bias: float = -10.0,
        reduction: str = "mean",
        *,
        learnable_bias: bool = True,
        **options: Unpack[Options],
    ) -> None:
        options.setdefault("learnable_temperature", True)
        super().__init__(temperature, reduction, **options)
        check_flags(learnable_bias=learnable_bias)
        number = checked_number("bias", bias)
        if learnable_bias:
            self._learn("bias", bias=number)
        self.bias = number
