"""In-batch contrastive losses: called as loss(z1, z2), row i of each a view of the same item."""

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from cosloss.arguments import check_flags
from cosloss.criteria import CrossEntropy, DecoupledCrossEntropy
from cosloss.distributed import Gather
from cosloss.functional._checks import check_temperature, check_views
from cosloss.functional._in_batch import Options, largest_logit, loss_of_pairs


def nt_xent_loss(
    z1: Float[Tensor, "n d"],
    z2: Float[Tensor, "n d"],
    temperature: float | Tensor = 0.5,
    reduction: str = "mean",
    *,
    decoupled: bool = False,
    ignore: Int[Tensor, " n"] | None = None,
    weight: Float[Tensor, " n"] | None = None,
    gather_distributed: Gather = False,
    dims: Sequence[int] | None = None,
    dim_weights: Sequence[float] | None = None,
) -> Float[Tensor, "..."]:
    """NT-Xent, the normalised temperature-scaled cross entropy of SimCLR.

    l_i = -S_i,pos(i) / temperature + log sum_{j != i} exp(S_ij / temperature)

    over the 2N rows of z1 and z2, S their cosine similarities. Memory is O(N D).

    Args:
        z1: (N, D), floating point; rows need not be normalised.
        z2: (N, D), row i a second view of row i of z1.
        temperature: positive; a number or a tensor of one, which may require a gradient.
        reduction: "none" gives (2N,), z1's rows first; "sum" and "mean" are over those.
        decoupled: leave the positive out of the sum (DCL).
        ignore: (N,), one group id per item; items of the same group are not negatives.
        weight: (N,), multiplies both rows' losses before the reduction; "mean" divides by 2N.
        gather_distributed: take negatives from all processes of the default group, whose batches
            may differ in size. The loss is the joined batch's in every process, and after DDP's
            averaging so is every gradient. "ring" passes the rows on from process to process, in
            the backward pass again, and no process holds all. Needs reduction "mean" or "sum".
        dims: sum the losses of the embeddings' first columns, so many at a time, each normalised by
            itself (Matryoshka); at most D.
        dim_weights: what each of those losses is multiplied by; 1 by default.

    Returns:
        The loss, a scalar unless reduction is "none"; float32 under autocast. A zero row has
        similarity 0 with every row, and gradient 0. A row without negatives has loss 0. A NaN or an
        infinity makes every loss NaN.

    Raises:
        TypeError: an input is not a real floating-point tensor, or an option of another kind.
        ValueError: rows have no columns, shapes do not match, tensors are on two devices,
            the batch is empty, temperature is not positive and finite, or
            reduction is invalid.

    Example:
        >>> import torch
        >>> z = torch.eye(2)
        >>> nt_xent_loss(z, z, temperature=1.0)
        tensor(0.5514)

    Source: Chen et al., "A Simple Framework for Contrastive Learning", 2020, Algorithm 1;
    decoupled: Yeh et al., "Decoupled Contrastive Learning", 2022, eq. 6; dims: Kusupati et al.,
    "Matryoshka Representation Learning", 2022, eq. 1.
    """
    options = Options(reduction, ignore, weight, gather_distributed, dims, dim_weights)
    check_views(z1, z2)
    check_temperature(temperature, z1)
    check_flags(decoupled=decoupled)
    options.check(z1)
    criterion = DecoupledCrossEntropy if decoupled else CrossEntropy
    return loss_of_pairs(
        z1,
        z2,
        criterion(largest_logit(temperature)),
        options,
        temperature,
        column_losses=True,
        self_similarity=True,
    )
