"""Module of late interaction, whose items are several rows each: their tokens."""

import torch
from torch import Tensor

from cosloss import functional
from cosloss.arguments import check_flags
from cosloss.losses._base import ContrastiveLoss


class MaxSimLoss(ContrastiveLoss):
    """ColBERT's in-batch loss of MaxSim scores: see `cosloss.functional.max_sim_loss`.

    Args:
        temperature: positive; a number, by which sums of cosines over a query's tokens are divided.
        reduction: "none" gives (B,); "mean" and "sum" one number.
        symmetric: average with the loss of finding the query of a document.
        learnable_temperature: learn the temperature's logarithm, `log_temperature`; False
            by default.
        gather_distributed: take documents from all processes of the default group; True or False.
        scalar_parameters: give learnt scalars shape (); False gives (1,), as FSDP needs.
        device: of learnt scalars.
        dtype: of learnt scalars, floating point.

    Shape:
        query_tokens: (B, Q, D), floating point; rows need not be normalised.
        document_tokens: (C, T, D), C >= B, document i the positive of query i, then hard negatives.
        query_mask (optional): (B, Q), boolean, true where a token counts.
        document_mask (optional): (C, T), likewise.
        ignore (optional, by name): (B,), one integer group id per item; items of the same group
            are not negatives.
        weight (optional, by name): (B,), multiplies the item's losses before the reduction.
        Output: one number, or as reduction says; float32 under autocast.

    Raises:
        TypeError: an argument is of another kind, an input no floating-point tensor, or a mask no
            boolean one.
        ValueError: an argument is out of range, or shapes or devices do not match.

    Example:
        >>> tokens = torch.eye(2)[:, None]
        >>> MaxSimLoss()(tokens, tokens)
        tensor(0.3133)
    """

    function = "max_sim_loss"
    hyperparameters = ("temperature", "reduction", "symmetric")

    def __init__(
        self,
        temperature: float = 1.0,
        reduction: str = "mean",
        *,
        symmetric: bool = False,
        learnable_temperature: bool = False,
        gather_distributed: bool = False,
        scalar_parameters: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_flags(symmetric=symmetric, gather_distributed=gather_distributed)
        super().__init__(
            temperature,
            reduction,
            learnable_temperature=learnable_temperature,
            gather_distributed=gather_distributed,
            scalar_parameters=scalar_parameters,
            device=device,
            dtype=dtype,
        )
        self.symmetric = symmetric

    def forward(
        self,
        query_tokens: Tensor,
        document_tokens: Tensor,
        query_mask: Tensor | None = None,
        document_mask: Tensor | None = None,
        *,
        ignore: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        return functional.max_sim_loss(
            query_tokens,
            document_tokens,
            query_mask,
            document_mask,
            **self._arguments(),
            ignore=ignore,
            weight=weight,
            gather_distributed=bool(self.gather_distributed),
        )
