"""The cosine embedding loss of a whole batch of positive pairs."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cosloss.criteria import CosineEmbedding
from cosloss.functional._checks import (
    check_groups,
    check_margin,
    check_negative_weight,
    check_reduction,
    check_views,
    check_weight,
    joined,
)
from cosloss.functional._in_batch import excluded, gathered_batch, loss_of_rows
from cosloss.modes import differentiates_itself
from cosloss.ops import unit_rows
from cosloss.ops.gathered import Everyone


def in_batch_cosine_embedding_loss(
    z1: Float[Tensor, "n d"],
    z2: Float[Tensor, "n d"],
    margin: float = 0.0,
    reduction: str = "mean",
    *,
    negative_weight: float = 1.0,
    ignore: Int[Tensor, " n"] | None = None,
    weight: Float[Tensor, " n"] | None = None,
    gather_distributed: bool = False,
) -> Float[Tensor, "..."]:
    """Cosine embedding loss in which every row has one positive and all other rows as negatives.

    l_i = 1 - S_i,pos(i) + negative_weight mean_j max(0, S_ij - margin)

    over the 2N rows of z1 and z2, S their cosine similarities, j over row i's negatives. Memory is
    O(N D).

    Args:
        z1: (N, D), floating point; rows need not be normalised.
        z2: (N, D), row i a second view of row i of z1.
        margin: similarity up to which a negative costs nothing, in [-1, 1].
        reduction: "none" gives (2N,), z1's rows first; "sum" and "mean" are over those.
        negative_weight: positive.
        ignore: (N,), one group id per item; items of the same group are not negatives.
        weight: (N,), multiplies both rows' losses before the reduction; "mean" divides by 2N.
        gather_distributed: take negatives from all processes of the default group, whose batches
            may differ in size. The loss is the joined batch's in every process, and after DDP's
            averaging so is every gradient. Needs reduction "mean" or "sum".

    Returns:
        The loss, a scalar unless reduction is "none"; float32 under autocast. A zero row has
        similarity 0 with every row, and gradient 0. A row without negatives has only its positive's
        part. A NaN or an infinity makes every loss NaN.

    Raises:
        TypeError: an input is not a real floating-point tensor.
        ValueError: rows have no columns, or shapes do not match,
            the batch is empty, margin, reduction or negative_weight is
            invalid.

    Example:
        >>> z = torch.eye(2)
        >>> in_batch_cosine_embedding_loss(z, z, margin=-0.5)
        tensor(0.5000)

    Source: torch.nn.functional.cosine_embedding_loss, over all pairs of a batch.
    """
    check_reduction(reduction)
    check_margin(margin)
    check_negative_weight(negative_weight)
    check_views(z1, z2)
    n = z1.shape[0]
    check_groups(ignore, n)
    check_weight(weight, n)
    z = joined(z1, z2)
    u = unit_rows(z)
    everyone = None
    if gather_distributed:
        everyone = gathered_batch(u, None, ignore, views=2, reduction=reduction)
    return loss_of_rows(
        u,
        None,
        _distance(*u.view(2, n, -1).unbind()).repeat(2),
        CosineEmbedding(margin, _negatives(n, ignore, everyone) / negative_weight),
        excluded((0, n, -n), ignore, copies=2),
        two_way=True,
        dtype=z.dtype,
        reduction=reduction,
        weight=weight,
        everyone=everyone,
    )


def _distance(u1: Tensor, u2: Tensor) -> Tensor:
    """1 - <u1, u2> of unit or zero rows, with a small relative error where it is small."""
    # |u1 - u2|^2 / 2 is that for two unit rows; a zero row's square lacks its half
    halves = sum((u.detach() == 0).all(1).to(u.dtype) / 2 for u in (u1, u2))
    return (u1 - u2).square().sum(1) / 2 + halves


def _negatives(n: int, ignore: Tensor | None, everyone: Everyone | None) -> int | Tensor:
    """Each row's number of negatives, at least 1."""
    if everyone is not None:
        if ignore is None:
            return 2 * sum(everyone.peers.items) - 2
        ids, sizes = everyone.groups.unique(return_counts=True)
        same = sizes[torch.searchsorted(ids, everyone.own_groups)]
        return (everyone.groups.shape[0] - same).clamp_min(1)
    if ignore is None:
        return max(2 * n - 2, 1)
    if differentiates_itself(ignore):
        same = (ignore == ignore[:, None]).sum(1)
    else:
        _, group, sizes = ignore.unique(return_inverse=True, return_counts=True)
        same = sizes[group]
    return (2 * (n - same)).clamp_min(1).repeat(2)
