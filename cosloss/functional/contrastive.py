"""In-batch contrastive losses: called as loss(z1, z2), row i of each a view of the same item."""

import torch  # noqa: F401  (the doctest's)
from jaxtyping import Float
from torch import Tensor

from cosloss.functional._checks import check_reduction, check_views, joined, reduce
from cosloss.ops import NTXent


def nt_xent_loss(
    z1: Float[Tensor, "n d"],
    z2: Float[Tensor, "n d"],
    temperature: float = 0.5,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    """NT-Xent, the normalised temperature-scaled cross entropy of SimCLR.

    l_i = -S_i,pos(i) / temperature + log sum_{j != i} exp(S_ij / temperature)

    over the 2N rows of z1 and z2, S their cosine similarities.

    Args:
        z1: (N, D), floating point; rows need not be normalised.
        z2: (N, D), row i a second view of row i of z1.
        temperature: positive.
        reduction: "none" gives (2N,), z1's rows first; "sum" and "mean" are over those.

    Returns:
        The loss, a scalar unless reduction is "none". A zero row has similarity 0 with every row,
        and gradient 0. With N = 1 there is no negative, and the loss is 0.

    Raises:
        TypeError: an input is not a real floating-point tensor.
        ValueError: shapes do not match, the batch is empty, temperature is not positive, or
            reduction is invalid.

    Example:
        >>> z = torch.eye(2)
        >>> nt_xent_loss(z, z, temperature=1.0)
        tensor(0.5514)

    Source: Chen et al., "A Simple Framework for Contrastive Learning", 2020, Algorithm 1.
    """
    check_reduction(reduction)
    check_views(z1, z2)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive; got {temperature}")
    return reduce(NTXent.apply(joined(z1, z2), temperature), reduction)
