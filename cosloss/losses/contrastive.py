"""Modules of the in-batch contrastive losses."""

from collections.abc import Callable, Sequence
from typing import Any, Unpack

from torch import Tensor

from cosloss import functional, reference
from cosloss.arguments import check_flags
from cosloss.functional._softmax import ONE_WAY, Softmax
from cosloss.losses._base import ContrastiveLoss, Options, checked_number
from cosloss.modes import differentiates_itself


class NTXentLoss(ContrastiveLoss):
    """NT-Xent, SimCLR's loss: see `cosloss.functional.nt_xent_loss`.

    Args:
        temperature: positive; a number.
        reduction: "none" gives (2N,), z1's rows first; "mean" and "sum" one number.
        decoupled: leave the positive out of the sum (DCL).
        learnable_temperature: learn the temperature's logarithm, `log_temperature`; False
            by default.
        gather_distributed: take negatives from all processes of the default group; "ring" does so
            in memory that does not grow with them.
        dims: sum the losses of the embeddings' first columns, so many at a time (Matryoshka).
        dim_weights: what each of those losses is multiplied by; 1 by default.
        scalar_parameters: give learnt scalars shape (); False gives (1,), as FSDP needs.
        device: of learnt scalars.
        dtype: of learnt scalars, floating point.

    Shape:
        z1: (N, D), floating point; rows need not be normalised.
        z2: (N, D), row i a second view of row i of z1.
        ignore (optional, by name): (N,), one integer group id per item; items of the same group
            are not negatives.
        weight (optional, by name): (N,), multiplies the item's losses before the reduction.
        Output: one number, or as reduction says; float32 under autocast.

    Raises:
        TypeError: an argument is of another kind, or an input no floating-point tensor.
        ValueError: an argument is out of range, or shapes or devices do not match.

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

    Args:
        temperature: positive; a number.
        reduction: "none" gives (N,); "mean" and "sum" one number.
        symmetric: average with the loss of finding the query of a key (CLIP).
        directions: what a query's softmax compares, "query_to_key" and of "key_to_query",
            "query_to_query", "key_to_key" (GTE has all).
        hardness: times its similarity, a constant to the gradient, is added to a negative's logit.
        hardness_on: "all" negatives, or the "in_batch" or the "hard" ones.
        false_negative_margin: negatives more similar than the pair less this are left out (GIST).
        learnable_temperature: learn the temperature's logarithm, `log_temperature`; False
            by default.
        gather_distributed: take negatives from all processes of the default group; "ring" does so
            in memory that does not grow with them.
        dims: sum the losses of the embeddings' first columns, so many at a time (Matryoshka).
        dim_weights: what each of those losses is multiplied by; 1 by default.
        scalar_parameters: give learnt scalars shape (); False gives (1,), as FSDP needs.
        device: of learnt scalars.
        dtype: of learnt scalars, floating point.

    Shape:
        query: (N, D), floating point; rows need not be normalised.
        key: (N, D), row i the positive of query i.
        negatives (optional): (K, D), every query's negatives, in place of the other keys.
        hard_negatives (optional, by name): (N, K, D) or (M, D), every query's negatives beside the
            other keys.
        key_bias (optional, by name): (N,), on each key's logits; then the hard negatives'.
        query_bias (optional, by name): (N,), on each query's logits in the losses of the keys.
        guide (optional, by name): another model's embeddings of queries and keys, (N, G) each, then
            of the negatives that are given: false_negative_margin is of their similarities.
        ignore (optional, by name): (N,), one integer group id per item; items of the same group
            are not negatives.
        weight (optional, by name): (N,), multiplies the item's losses before the reduction.
        Output: one number, or as reduction says; float32 under autocast.

    Raises:
        TypeError: an argument is of another kind, or an input no floating-point tensor.
        ValueError: an argument is out of range, or shapes or devices do not match.

    Example:
        >>> import torch
        >>> InfoNCELoss(temperature=1.0, symmetric=True)(torch.eye(2), torch.eye(2))
        tensor(0.3133)
    """

    function = "info_nce_loss"
    hyperparameters = (
        "temperature",
        "reduction",
        "symmetric",
        "directions",
        "hardness",
        "hardness_on",
        "false_negative_margin",
    )

    def __init__(
        self,
        temperature: float = 0.07,
        reduction: str = "mean",
        *,
        symmetric: bool = False,
        directions: Sequence[str] = ONE_WAY,
        hardness: float = 0.0,
        hardness_on: str = "all",
        false_negative_margin: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(temperature, reduction, **options)
        check_flags(symmetric=symmetric)
        Softmax(directions, hardness, hardness_on, false_negative_margin).check(symmetric)
        self.symmetric, self.directions = symmetric, tuple(directions)
        self.hardness, self.hardness_on = hardness, hardness_on
        self.false_negative_margin = false_negative_margin

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None = None,
        *,
        hard_negatives: Tensor | None = None,
        key_bias: Tensor | None = None,
        query_bias: Tensor | None = None,
        guide: Sequence[Tensor] | None = None,
        ignore: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        return self._loss(
            query,
            key,
            negatives=negatives,
            hard_negatives=hard_negatives,
            key_bias=key_bias,
            query_bias=query_bias,
            guide=guide,
            ignore=ignore,
            weight=weight,
        )

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

    Args:
        temperature: positive; a number.
        reduction: "none" gives (N,); "mean" and "sum" one number, over the rows that have a
            positive.
        learnable_temperature: learn the temperature's logarithm, `log_temperature`; False
            by default.
        gather_distributed: take negatives from all processes of the default group; "ring" does so
            in memory that does not grow with them.
        dims: sum the losses of the embeddings' first columns, so many at a time (Matryoshka).
        dim_weights: what each of those losses is multiplied by; 1 by default.
        scalar_parameters: give learnt scalars shape (); False gives (1,), as FSDP needs.
        device: of learnt scalars.
        dtype: of learnt scalars, floating point.

    Shape:
        z: (N, D), floating point; rows need not be normalised. Views are rows of their own.
        labels: (N,), the class of each row.
        ignore (optional, by name): (N,), one integer group id per item; items of the same group
            are not negatives.
        weight (optional, by name): (N,), multiplies the item's losses before the reduction.
        Output: one number, or as reduction says; float32 under autocast.

    Raises:
        TypeError: an argument is of another kind, or an input no floating-point tensor.
        ValueError: an argument is out of range, or shapes or devices do not match.

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

    Args:
        temperature: positive; a number.
        bias: a number.
        reduction: "none" gives (N,); "mean" and "sum" one number.
        learnable_bias: learn the bias.
        learnable_temperature: learn the temperature's logarithm, `log_temperature`; True by
            default.
        gather_distributed: take negatives from all processes of the default group; "ring" does so
            in memory that does not grow with them.
        dims: sum the losses of the embeddings' first columns, so many at a time (Matryoshka).
        dim_weights: what each of those losses is multiplied by; 1 by default.
        scalar_parameters: give learnt scalars shape (); False gives (1,), as FSDP needs.
        device: of learnt scalars.
        dtype: of learnt scalars, floating point.

    Shape:
        z1: (N, D), floating point; rows need not be normalised.
        z2: (N, D), row i the other view of row i of z1.
        ignore (optional, by name): (N,), one integer group id per item; items of the same group
            are not negatives.
        weight (optional, by name): (N,), multiplies the item's losses before the reduction.
        Output: one number, or as reduction says; float32 under autocast.

    Raises:
        TypeError: an argument is of another kind, or an input no floating-point tensor.
        ValueError: an argument is out of range, or shapes or devices do not match.

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
