"""The cosine embedding loss of a whole batch of positive pairs."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cosloss.criteria import CosineEmbedding
from cosloss.distributed import Gather
from cosloss.functional._checks import check_margin, check_negative_weight, check_views
from cosloss.functional._in_batch import Options, item_mask, reduced_loss
from cosloss.modes import differentiates_itself
from cosloss.problem import Mask, Problem


def in_batch_cosine_embedding_loss(
    z1: Float[Tensor, "n d"],
    z2: Float[Tensor, "n d"],
    margin: float = 0.0,
    reduction: str = "mean",
    *,
    negative_weight: float = 1.0,
    ignore: Int[Tensor, " n"] | None = None,
    weight: Float[Tensor, " n"] | None = None,
    gather_distributed: Gather = False,
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
            averaging so is every gradient. "ring" passes the rows on from process to process, in
            the backward pass again, and no process holds all. Needs reduction "mean" or "sum".

    Returns:
        The loss, a scalar unless reduction is "none"; float32 under autocast. A zero row has
        similarity 0 with every row, and gradient 0. A row without negatives has only its positive's
        part. A NaN or an infinity makes every loss NaN.

    Raises:
        TypeError: an input is not a real floating-point tensor, or an option of another kind.
        ValueError: rows have no columns, shapes do not match, tensors are on two devices,
            the batch is empty, margin, reduction or negative_weight is
            invalid.

    Example:
        >>> z = torch.eye(2)
        >>> in_batch_cosine_embedding_loss(z, z, margin=-0.5)
        tensor(0.5000)

    Source: torch.nn.functional.cosine_embedding_loss, over all pairs of a batch.
    """
    options = Options(reduction, ignore, weight, gather_distributed)
    check_margin(margin)
    check_negative_weight(negative_weight)
    check_views(z1, z2)
    options.check(z1)
    dtype = torch.promote_types(z1.dtype, z2.dtype)
    z1, z2 = z1.to(dtype), z2.to(dtype)
    peers = options.peers(z1)
    mask = item_mask(z1, 2, ignore, peers)
    criterion = CosineEmbedding(margin, _negatives(z1.shape[0], mask) / negative_weight)
    problem = Problem(criterion, mask, column_losses=True, self_similarity=True)
    return reduced_loss((z1, z2, None), problem, options, temperature=1.0, peers=peers)


def _negatives(items: int, mask: Mask) -> int | Tensor:
    """Each row's number of negatives, at least 1."""
    if mask.groups is None:
        return max(2 * items - 2, 1)
    own, every = mask.groups
    if differentiates_itself(own):
        same = (own[:, None] == every).sum(1)
    else:
        ids, sizes = every.unique(return_counts=True)
        same = sizes[torch.searchsorted(ids, own)]
    return (every.shape[0] - same).clamp_min(1)
