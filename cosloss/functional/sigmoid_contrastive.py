"""The pairwise sigmoid loss: every pair of the batch classified on its own."""

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from cosloss.criteria import SigmoidContrast
from cosloss.distributed import Gather
from cosloss.functional._checks import check_scalar, check_temperature, check_views
from cosloss.functional._in_batch import Options, loss_of_pairs


def sigmoid_contrastive_loss(
    z1: Float[Tensor, "n d"],
    z2: Float[Tensor, "n d"],
    temperature: float | Tensor,
    bias: float | Tensor,
    reduction: str = "mean",
    *,
    ignore: Int[Tensor, " n"] | None = None,
    weight: Float[Tensor, " n"] | None = None,
    gather_distributed: Gather = False,
    dims: Sequence[int] | None = None,
    dim_weights: Sequence[float] | None = None,
) -> Float[Tensor, "..."]:
    """SigLIP's loss: for every pair of rows, is it the same item or not.

    l_i = -sum_j log sigmoid(y_ij (S_ij / temperature + bias)),    y_ij = 1 if i = j, else -1,

    with S_ij the cosine similarity of row i of z1 and row j of z2. Memory is O(N D).

    Args:
        z1: (N, D), floating point; rows need not be normalised.
        z2: (N, D), row i the other view of row i of z1.
        temperature: positive; a number or a tensor of one, which may require a gradient.
        bias: a number or a tensor of one, which may require a gradient.
        reduction: "none" gives (N,), one sum for each row of z1; "sum" and "mean" are over those.
        ignore: (N,), one group id per item; items of the same group are not negatives.
        weight: (N,), multiplies each loss before the reduction; "mean" divides by N.
        gather_distributed: take negatives from all processes of the default group, whose batches
            may differ in size. The loss is the joined batch's in every process, and after DDP's
            averaging so is every gradient. "ring" passes the rows on from process to process, in
            the backward pass again, and no process holds all. Needs reduction "mean" or "sum".
        dims: sum the losses of the embeddings' first columns, so many at a time, each normalised by
            itself (Matryoshka); at most D.
        dim_weights: what each of those losses is multiplied by; 1 by default.

    Returns:
        The loss, a scalar unless reduction is "none"; float32 under autocast. A zero row has
        similarity 0 with every row, and gradient 0. A NaN or an infinity makes the loss of every
        row that meets it NaN.

    Raises:
        TypeError: an input is not a real floating-point tensor, or an option of another kind.
        ValueError: rows have no columns, shapes do not match, tensors are on two devices,
            the batch is empty, temperature is not positive and finite, bias is
            no tensor of one number, or reduction is invalid.

    Example:
        >>> import torch
        >>> z = torch.eye(2)
        >>> sigmoid_contrastive_loss(z, z, temperature=0.1, bias=-10.0)
        tensor(0.6932)

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023, eq. 1, algorithm 1
    (whose t is 1 / temperature);
    dims: Kusupati et al., "Matryoshka Representation Learning", 2022, eq. 1.
    """
    options = Options(reduction, ignore, weight, gather_distributed, dims, dim_weights)
    check_views(z1, z2)
    check_temperature(temperature, z1)
    check_scalar("bias", bias, z1)
    options.check(z1)
    return loss_of_pairs(
        z1,
        z2,
        SigmoidContrast(),
        options,
        temperature,
        bias,
        column_losses=False,
        self_similarity=False,
    )
