"""InfoNCE: a query finds its key among the batch's keys, or among a queue of negatives."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cosloss.arguments import check_device, check_flags
from cosloss.criteria import CrossEntropy
from cosloss.functional._checks import (
    as_number,
    check_floating,
    check_pairs,
    check_temperature,
)
from cosloss.functional._in_batch import Options, largest_logit, loss_of_pairs, reduced_loss
from cosloss.problem import Mask, Problem


def info_nce_loss(
    query: Float[Tensor, "n d"],
    key: Float[Tensor, "n d"],
    temperature: float | Tensor = 0.07,
    negatives: Float[Tensor, "k d"] | None = None,
    symmetric: bool = False,
    reduction: str = "mean",
    *,
    ignore: Int[Tensor, " n"] | None = None,
    weight: Float[Tensor, " n"] | None = None,
    gather_distributed: bool = False,
) -> Float[Tensor, "..."]:
    """InfoNCE, the cross entropy of a query's own key among the keys.

    l_i = -S_ii / temperature + log sum_j exp(S_ij / temperature)

    with S_ij the cosine similarity of query i and key j. With `negatives`, the sum is over query
    i's own key and those negatives. Memory is O(N D).

    Args:
        query: (N, D), floating point; rows need not be normalised.
        key: (N, D), row i the positive of query i.
        temperature: positive; a number or a tensor of one, which may require a gradient.
        negatives: (K, D), K >= 1: the negatives of every query, in place of the other keys.
        symmetric: average with the loss of finding the query of a key (CLIP).
        reduction: "none" gives (N,); "sum" and "mean" are over those.
        ignore: (N,), one group id per pair; pairs of the same group are not negatives.
        weight: (N,), multiplies each loss before the reduction; "mean" divides by N.
        gather_distributed: take negatives from all processes of the default group, whose batches
            may differ in size. The loss is the joined batch's in every process, and after DDP's
            averaging so is every gradient. Needs reduction "mean" or "sum".

    Returns:
        The loss, a scalar unless reduction is "none"; float32 under autocast. A zero row has
        similarity 0 with every row, and gradient 0. A query without negatives has loss 0. A NaN or
        an infinity makes the loss of every row that meets it NaN.

    Raises:
        TypeError: an input is not a real floating-point tensor, or an option of another kind.
        ValueError: rows have no columns, shapes do not match, tensors are on two devices,
            the batch or `negatives` is empty, `negatives` comes with symmetric, ignore or
            gather_distributed, temperature is not positive and finite, or reduction is invalid.

    Example:
        >>> query, key = torch.eye(2), torch.eye(2)
        >>> info_nce_loss(query, key, temperature=1.0)
        tensor(0.3133)

    Source: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018,
    eq. 4; negatives: He et al., "Momentum Contrast", 2020, eq. 1; symmetric: Radford et al.,
    "Learning Transferable Visual Models From Natural Language Supervision", 2021, figure 3.
    """
    options = Options(reduction, ignore, weight, gather_distributed)
    check_pairs(query=query, key=key)
    check_temperature(temperature, query)
    check_flags(symmetric=symmetric)
    n = query.shape[0]
    options.check(query)
    criterion = CrossEntropy(largest_logit(temperature))
    if negatives is not None:
        _check_negatives(negatives, query, symmetric or gather_distributed, ignore)
        dtype = torch.promote_types(query.dtype, key.dtype)
        rows = query.to(dtype), key.to(dtype), negatives.to(dtype)
        problem = Problem(criterion, Mask(), column_losses=False)
        return reduced_loss(rows, problem, options, as_number(temperature, dtype))
    loss = loss_of_pairs(
        query,
        key,
        criterion,
        options,
        temperature,
        column_losses=symmetric,
        self_similarity=False,
    )
    if symmetric and reduction == "none":
        return loss.view(2, n).mean(0)
    return loss / 2 if symmetric and reduction == "sum" else loss


def _check_negatives(negatives: Tensor, query: Tensor, wider: bool, ignore: Tensor | None) -> None:
    check_floating(negatives=negatives)
    if negatives.ndim != 2 or negatives.shape[1] != query.shape[1] or negatives.shape[0] == 0:
        raise ValueError(
            f"negatives must have shape (K, {query.shape[1]}) with K >= 1; "
            f"got {tuple(negatives.shape)}"
        )
    check_device("query", query, "negatives", negatives)
    if wider or ignore is not None:
        raise ValueError(
            "symmetric, ignore and gather_distributed are about the batch's own keys: "
            "leave out negatives"
        )
