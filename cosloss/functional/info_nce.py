"""InfoNCE: a query finds its key among the batch's keys, or among a queue of negatives."""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cosloss.arguments import check_flags
from cosloss.criteria import CrossEntropy
from cosloss.distributed import Gather
from cosloss.functional._checks import as_number, check_pairs, check_temperature
from cosloss.functional._dims import weighted_dims
from cosloss.functional._in_batch import (
    Options,
    item_mask,
    largest_logit,
    loss_of_pairs,
    reduced_loss,
)
from cosloss.functional._negatives import (
    check_guide,
    check_hard_negatives,
    check_key_bias,
    check_negatives,
    check_query_bias,
    check_softmax,
)
from cosloss.functional._softmax import ONE_WAY, Softmax, softmax_loss
from cosloss.ops.unit_rows import unit_rows
from cosloss.problem import Mask, Problem


def info_nce_loss(
    query: Float[Tensor, "n d"],
    key: Float[Tensor, "n d"],
    temperature: float | Tensor = 0.07,
    negatives: Float[Tensor, "k d"] | None = None,
    symmetric: bool = False,
    reduction: str = "mean",
    *,
    hard_negatives: Float[Tensor, "n k d"] | Float[Tensor, "m d"] | None = None,
    key_bias: Float[Tensor, " columns"] | None = None,
    query_bias: Float[Tensor, " n"] | None = None,
    directions: Sequence[str] = ONE_WAY,
    hardness: float = 0.0,
    hardness_on: str = "all",
    false_negative_margin: float | None = None,
    guide: Sequence[Tensor] | None = None,
    ignore: Int[Tensor, " n"] | None = None,
    weight: Float[Tensor, " n"] | None = None,
    gather_distributed: Gather = False,
    dims: Sequence[int] | None = None,
    dim_weights: Sequence[float] | None = None,
) -> Float[Tensor, "..."]:
    """InfoNCE, the cross entropy of a query's own key among the keys.

    l_i = -S_ii / temperature + log sum_j exp(S_ij / temperature)

    with S_ij the cosine similarity of query i and key j. With `negatives`, the sum is over query
    i's own key and those negatives; with `hard_negatives`, over all keys and those. With `key_bias`
    b_j is added to the logits S_ij / temperature of key j. Memory is O(N D).

    With directions A of pairs (a, b), and the x_ii of those that have it counted once for each,

    l_i = -x_ii + log sum_{(a, b) in A} exp(x_ab + hardness stop(S_ab)),    x = S / temperature.

    Args:
        query: (N, D), floating point; rows need not be normalised.
        key: (N, D), row i the positive of query i.
        temperature: positive; a number or a tensor of one, which may require a gradient.
        negatives: (K, D), K >= 1: the negatives of every query, in place of the other keys.
        symmetric: average with the loss of finding the query of a key (CLIP).
        reduction: "none" gives (N,); "sum" and "mean" are over those.
        hard_negatives: (N, K, D), K >= 1 for each query, or (M, D); negatives of every query,
            beside the other keys. If symmetric, the losses of the keys are without them. With
            gather_distributed (N, K, D), and everyone's are every query's negatives.
        key_bias: (N,), finite, on the logits of each key; with hard negatives (N + M,) or
            (N + N K,), and theirs follow in the order of `hard_negatives.flatten(0, -2)`. It may
            require a gradient. To correct for keys that are drawn by their frequency it is minus
            the logarithm of that. The losses of the keys, if symmetric, do not change with it.
        query_bias: (N,), the same on the logits of each query in the losses of the keys, where
            alone it does not cancel: needs symmetric.
        directions: the similarities in the softmax of pair i, as sentence-transformers and GTE have
            them: "query_to_key", of query i with all keys and hard negatives, and of "key_to_query"
            (key i with all queries), "query_to_query" and "key_to_key" (with the hard negatives of
            other items) any; those of i itself only once.
        hardness: >= 0, the weight of a negative's similarity, added to its logit without a
            gradient; in "query_to_key".
        hardness_on: "all" negatives, the "in_batch" ones (other items' keys and hard negatives), or
            the "hard" ones (the query's own; of (M, D) and `negatives`, all).
        false_negative_margin: m, leave out negatives with a similarity above S_ii - m, in every
            direction; -2 <= m <= 2, and at 0 those that are more similar than the pair.
        guide: another model's embeddings, whose similarities false_negative_margin compares in
            place of these: (N, G) of the queries, (N, G) of the keys, and where there are hard
            negatives or `negatives`, theirs, of the same leading shape. They get no gradient; where
            a pair's are NaN, so is its loss.
        ignore: (N,), one group id per pair; pairs of the same group are not negatives.
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
        similarity 0 with every row, and gradient 0. A query without negatives has loss 0. A NaN or
        an infinity makes the loss of every row that meets it NaN.

    Raises:
        TypeError: an input is not a real floating-point tensor, or an option of another kind.
        ValueError: rows have no columns, shapes do not match, tensors are on two devices,
            the batch or the negatives are empty, `negatives` comes with hard_negatives, key_bias,
            symmetric, ignore or gather_distributed, query_bias comes without symmetric,
            temperature is not positive and finite,
            reduction is invalid, directions come with symmetric, negatives or key_bias, a guide
            comes without false_negative_margin, or other options do not go together.

    Example:
        >>> query, key = torch.eye(2), torch.eye(2)
        >>> info_nce_loss(query, key, temperature=1.0)
        tensor(0.3133)

    Source: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018,
    eq. 4; negatives: He et al., "Momentum Contrast", 2020, eq. 1; symmetric: Radford et al.,
    "Learning Transferable Visual Models From Natural Language Supervision", 2021, figure 3;
    hard_negatives: Karpukhin et al., "Dense Passage Retrieval", 2020, section 3.2; key_bias: Yi et
    al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations", 2019;
    directions: Li et al., "Towards General Text Embeddings with Multi-stage Contrastive Learning",
    2023, section 3.3; hardness: Lan et al., "LLaVE", 2025, eq. 5; false_negative_margin, guide:
    Solatorio, "GISTEmbed", 2024; dims: Kusupati et al., "Matryoshka Representation Learning", 2022,
    eq. 1.
    """
    options = Options(reduction, ignore, weight, gather_distributed, dims, dim_weights)
    check_pairs(query=query, key=key)
    check_temperature(temperature, query)
    check_flags(symmetric=symmetric)
    n = query.shape[0]
    options.check(query)
    softmax = Softmax(directions, hardness, hardness_on, false_negative_margin)
    softmax.check(symmetric)
    given = hard_negatives if negatives is None else negatives
    of_guide = None
    if guide is not None:
        of_guide = check_guide(guide, query, given, false_negative_margin)
    if query_bias is not None:
        check_query_bias(query_bias, query, symmetric)
    if not softmax.plain:
        biases = {"key_bias": key_bias, "query_bias": query_bias}
        hard = check_softmax(softmax, query, negatives, hard_negatives, biases, symmetric, options)
        of_softmax = partial(
            softmax_loss, temperature=temperature, softmax=softmax, options=options
        )
        losses = []
        for dim, factor in weighted_dims(dims or query.shape[1:], dim_weights):
            q, k = query[:, :dim], key[:, :dim]
            of_queries = hard if hard is None else hard[..., :dim]
            loss = of_softmax(q, k, of_queries, in_batch_keys=negatives is None, guide=of_guide)
            if symmetric:
                swapped = None if of_guide is None else of_guide.swapped()
                of_keys = of_softmax(k, q, None, in_batch_keys=True, guide=swapped)
                loss = (loss + of_keys) / 2
            losses.append(factor * loss)
        return torch.stack(losses).sum(0)
    if negatives is not None:
        for name, other in (("hard_negatives", hard_negatives), ("key_bias", key_bias)):
            if other is not None:
                raise ValueError(
                    f"negatives take the place of the other keys, which {name} needs; got both"
                )
        check_negatives(negatives, query, symmetric or bool(gather_distributed), ignore)
        dtype = torch.promote_types(query.dtype, key.dtype)
        rows = query.to(dtype), key.to(dtype), negatives.to(dtype)
        problem = Problem(CrossEntropy(largest_logit(temperature)), Mask(), column_losses=False)
        return reduced_loss(rows, problem, options, as_number(temperature, dtype))
    if hard_negatives is not None:
        check_hard_negatives(hard_negatives, query, bool(gather_distributed))
    criterion = CrossEntropy(largest_logit(temperature))
    if key_bias is not None:
        check_key_bias(key_bias, query, hard_negatives)
    if key_bias is not None or query_bias is not None:
        criterion = CrossEntropy(torch.inf)  # no bound on all processes' biases is known
    if symmetric and (hard_negatives is not None or query_bias is not None):
        # two losses, whose gradients go through one normalisation: each could leave the range
        dtype = torch.promote_types(query.dtype, key.dtype)
        query, key = unit_rows(query.to(dtype)), unit_rows(key.to(dtype))
    of_pairs = partial(
        loss_of_pairs,
        criterion=criterion,
        options=options,
        temperature=temperature,
        self_similarity=False,
    )
    if hard_negatives is not None:
        loss = _with_hard_negatives(
            query, key, hard_negatives, key_bias, criterion, options, temperature
        )
        if not symmetric:
            return loss
        of_keys = of_pairs(key, query, column_losses=False, column_bias=query_bias, others=True)
        return (loss + of_keys) / 2
    if query_bias is not None:
        loss = of_pairs(query, key, column_losses=False, column_bias=key_bias)
        return (loss + of_pairs(key, query, column_losses=False, column_bias=query_bias)) / 2
    loss = of_pairs(query, key, column_losses=symmetric, column_bias=key_bias)
    if symmetric and reduction == "none":
        return loss.view(2, n).mean(0)
    return loss / 2 if symmetric and reduction == "sum" else loss


def _with_hard_negatives(
    query: Tensor,
    key: Tensor,
    hard_negatives: Tensor,
    key_bias: Tensor | None,
    criterion: CrossEntropy,
    options: Options,
    temperature: float | Tensor,
) -> Tensor:
    """The loss of queries among the keys and hard negatives (N, K, D) or (M, D)."""
    n, dtype = query.shape[0], torch.promote_types(query.dtype, key.dtype)
    query, key, hard = query.to(dtype), key.to(dtype), hard_negatives.to(dtype)
    temperature = as_number(temperature, dtype)
    count = hard.shape[1] if options.gather_distributed else None
    peers = options.peers(query, count, temperature=temperature)
    if hard.ndim == 3:  # all items' first, then all items' second: as they are gathered
        if key_bias is not None:
            of_hard = key_bias[n:].view(hard.shape[:2]).T.flatten()
            key_bias = torch.cat([key_bias[:n], of_hard])
        hard = hard.transpose(0, 1).flatten(0, 1)
    mask, own_columns = item_mask(query, 1, options.ignore, peers), None
    if mask.groups is not None:
        own, everyones = (ids.long() for ids in mask.groups)
        other = everyones.max() + 1  # hard negatives are of no item's group

        def of_columns(ids: Tensor) -> Tensor:
            return torch.cat([ids, other.expand(ids.shape[0] * hard.shape[0] // own.shape[0])])

        each = [everyones] if peers is None else everyones.split(peers.batch_sizes)
        mask = Mask(groups=(own, torch.cat([of_columns(ids) for ids in each])))
        own_columns = Mask(groups=(everyones, of_columns(own)))
    problem = Problem(criterion, mask, False, negatives_beside=True, own_columns=own_columns)
    if key_bias is not None:
        key_bias = key_bias.to(torch.promote_types(dtype, torch.float32))
    return reduced_loss((query, key, hard), problem, options, temperature, key_bias, peers)
