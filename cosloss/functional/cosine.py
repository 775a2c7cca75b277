"""Cosine similarity and the cosine embedding loss."""

import torch
from jaxtyping import Float
from torch import Tensor

from cosloss.functional._checks import (
    check_floating,
    check_reduction,
    check_views,
    joined,
    reduce,
)
from cosloss.ops import CosineSimilarity, InBatchCosineEmbedding


def cosine_similarity(
    x1: Float[Tensor, "..."], x2: Float[Tensor, "..."], dim: int = 1, eps: float = 1e-8
) -> Float[Tensor, "..."]:
    """Cosine similarity of x1 and x2 along `dim`, with torch's signature and an analytic gradient.

    S = <x1, x2> / (max(|x1|, eps) max(|x2|, eps))

    Args:
        x1: floating-point tensor.
        x2: floating-point tensor whose shape broadcasts with x1's.
        dim: dimension along which the vectors lie.
        eps: each norm is clamped to at least eps; the gradient is that of the clamped function.

    Returns:
        The similarities, in the broadcast shape without `dim`. A zero row has similarity 0 and
        gradient 0.

    Raises:
        TypeError: an input is not a real floating-point tensor.
        ValueError: eps is negative.

    Example:
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> cosine_similarity(x, torch.tensor([[1.0, 0.0]]))
        tensor([0.6000])

    Source: torch.nn.functional.cosine_similarity.
    """
    check_floating(x1=x1, x2=x2)
    if eps < 0:
        raise ValueError(f"eps must not be negative; got {eps}")
    x1, x2 = torch.broadcast_tensors(x1, x2)
    return CosineSimilarity.apply(x1.movedim(dim, -1), x2.movedim(dim, -1), eps)


def cosine_embedding_loss(
    input1: Float[Tensor, "*n d"],
    input2: Float[Tensor, "*n d"],
    target: Tensor | None = None,
    margin: float = 0.0,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    """Cosine embedding loss of labelled pairs, or of a whole batch of positive pairs.

    With a target y:    l = 1 - S where y = 1, and max(0, S - margin) where y = -1.
    Without a target:   l_i = 1 - S_i,pos(i) + mean_j max(0, S_ij - margin), for each of the 2N rows
    of both inputs; rows i of input1 and input2 are positives, all other rows are negatives.

    Args:
        input1: (N, D) or (D,), floating point.
        input2: the same shape.
        target: (N,) or (), every entry 1 or -1; None for the in-batch form, which needs (N, D).
        margin: similarity up to which a negative costs nothing, in [-1, 1].
        reduction: "none" gives (N,), or (2N,) in-batch; "sum" and "mean" are over those. The
            in-batch mean is the positives' mean plus the negatives' mean, whatever N is; with
            N = 1 there is no negative, and that part is 0.

    Returns:
        The loss, a scalar unless reduction is "none".

    Raises:
        TypeError: an input is not a real floating-point tensor.
        ValueError: shapes do not match, a target is not 1 or -1, margin or reduction is invalid,
            or the batch is empty.

    Example:
        >>> x = torch.tensor([[1.0, 0.0]])
        >>> cosine_embedding_loss(x, torch.tensor([[0.0, 2.0]]), torch.tensor([1]))
        tensor(1.)

    Source: torch.nn.functional.cosine_embedding_loss.
    """
    check_reduction(reduction)
    if not -1 <= margin <= 1:
        raise ValueError(f"margin must be in [-1, 1]; got {margin}")
    if target is None:
        check_views(input1, input2)
        return reduce(InBatchCosineEmbedding.apply(joined(input1, input2), margin), reduction)

    check_floating(input1=input1, input2=input2)
    if input1.shape != input2.shape or target.shape != input1.shape[:-1]:
        raise ValueError(
            "input1 and input2 must have shape (N, D) and target (N,), or (D,) and (); "
            f"got {tuple(input1.shape)}, {tuple(input2.shape)} and {tuple(target.shape)}"
        )
    if target.numel() == 0:
        raise ValueError("the batch is empty")
    if not ((target == 1) | (target == -1)).all():
        raise ValueError("every target must be 1 or -1")
    similarity = CosineSimilarity.apply(input1, input2, 1e-8)
    loss = torch.where(target == 1, 1 - similarity, torch.relu(similarity - margin))
    return reduce(loss, reduction)
