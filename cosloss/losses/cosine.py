"""Modules of cosine similarity and the cosine embedding loss."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cosloss import functional, reference
from cosloss.distributed import Gather
from cosloss.functional._checks import (
    check_gather,
    check_margin,
    check_negative_weight,
    check_pairs,
    check_reduction,
)
from cosloss.functional.cosine import check_dim, check_eps
from cosloss.losses._base import Loss


class CosineSimilarity(Loss):
    """Cosine similarity along `dim`: see `cosloss.functional.cosine_similarity`.

    Args:
        dim: dimension of the broadcast shape along which the vectors lie.
        eps: each norm is clamped to at least eps >= 0.

    Shape:
        x1, x2: floating point, of shapes that broadcast; an integer one is promoted.
        Output: the broadcast shape without `dim`, in the promoted dtype.

    Raises:
        TypeError: dim is no integer, eps no number, or an input no tensor.
        RuntimeError: (a ValueError too) eps is negative, or shapes, dtypes or devices do not fit.
        IndexError: dim is out of range.

    Example:
        >>> import torch
        >>> CosineSimilarity()(torch.ones(1, 4), torch.ones(1, 4))
        tensor([1.])
    """

    function = "cosine_similarity"
    hyperparameters = ("dim", "eps")

    def __init__(self, dim: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        self._refuse_inputs(dim)
        check_dim(dim)
        check_eps(eps)
        self.dim = dim
        self.eps = eps

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return functional.cosine_similarity(x1, x2, self.dim, self.eps)


class CosineEmbeddingLoss(Loss):
    """Cosine embedding loss: see `cosloss.functional.cosine_embedding_loss`.

    `loss(input1, input2, target)` is torch's. `loss(z1, z2)` is the in-batch form of contrastive
    training, see `cosloss.functional.in_batch_cosine_embedding_loss`: `negative_weight` is of that
    form alone, and with `gather_distributed` its negatives come from all processes.

    Args:
        margin: similarity up to which a negative costs nothing, in [-1, 1].
        reduction: "none" gives a loss per pair, or (2N,) in-batch; "mean" and "sum" one number.
        negative_weight: of the in-batch form's negatives; positive.
        gather_distributed: take the in-batch form's negatives from all processes; "ring" does so in
            memory that does not grow with them.

    Shape:
        input1: (N, D), floating point; with a target also (D,) or (..., D).
        input2: the same; with a target a shape that broadcasts with input1's.
        target (optional): 1 or -1 for each pair, (N,), or what broadcasts to that.
        weight (optional, with a target): (N,), multiplies each pair's loss.
        Output: one number, or as reduction says.

    Raises:
        TypeError: an argument is of another kind, or an input no floating-point tensor.
        ValueError: an argument is out of range, a target is not 1 or -1, or shapes or devices do
            not match.

    Example:
        >>> import torch
        >>> loss = CosineEmbeddingLoss(margin=0.2)
        >>> loss(torch.eye(4), torch.eye(4))
        tensor(0.)
    """

    function = "cosine_embedding_loss"
    hyperparameters = ("margin", "reduction")

    def __init__(
        self,
        margin: float = 0.0,
        reduction: str = "mean",
        *,
        negative_weight: float = 1.0,
        gather_distributed: Gather = False,
    ) -> None:
        super().__init__()
        self._refuse_inputs(margin)
        check_margin(margin)
        check_reduction(reduction)
        check_negative_weight(negative_weight)
        check_gather(gather_distributed)
        self.margin = margin
        self.reduction = reduction
        self.negative_weight = negative_weight
        self.gather_distributed = gather_distributed

    def forward(
        self,
        input1: Tensor,
        input2: Tensor,
        target: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        if target is None and weight is None:
            check_pairs(input1=input1, input2=input2)
            return functional.in_batch_cosine_embedding_loss(
                input1,
                input2,
                self.margin,
                self.reduction,
                negative_weight=self.negative_weight,
                gather_distributed=self.gather_distributed,
            )
        if self.negative_weight != 1:
            raise ValueError(
                "negative_weight is of the form without a target: with one, give each pair's weight"
            )
        return functional.cosine_embedding_loss(
            input1, input2, target, self.margin, self.reduction, weight
        )

    def reference(self) -> Callable[..., Tensor]:
        """This module's twin in plain autograd torch operations."""
        own = self._arguments()

        def twin(z1: Tensor, z2: Tensor, target: Tensor | None = None, **more: Any) -> Tensor:
            if target is not None:
                return reference.cosine_embedding_loss(z1, z2, target, **own, **more)
            in_batch = reference.in_batch_cosine_embedding_loss
            return in_batch(z1, z2, **own, negative_weight=self.negative_weight, **more)

        return twin

    def extra_repr(self) -> str:
        weight = "" if self.negative_weight == 1 else f", negative_weight={self.negative_weight}"
        how = self.gather_distributed
        return super().extra_repr() + weight + (f", gather_distributed={how!r}" if how else "")
