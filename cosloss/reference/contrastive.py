"""Twins of the in-batch contrastive losses: the whole similarity matrix, under autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from cosloss.reference._rows import over_prefixes, reduce, unit_rows


@over_prefixes("z1", "z2")
def nt_xent_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.5,
    reduction: str = "mean",
    *,
    decoupled: bool = False,
    ignore: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """NT-Xent (Chen et al., 2020, Algorithm 1): cross entropy of row i's positive among 2N - 1."""
    n = z1.shape[0]
    u = unit_rows(torch.cat([z1, z2]))
    logits = u @ u.T / temperature
    row = torch.arange(2 * n, device=z1.device)
    positive = (row + n) % (2 * n)
    own = logits[row, positive]
    negative = other_items(n, ignore, z1.device).tile(2, 2)
    if decoupled:
        total = _finite_logsumexp(logits, negative)
        loss = torch.where(negative.any(1), total - own, 0)
    else:
        allowed = negative.clone()
        allowed[row, positive] = True
        loss = _finite_logsumexp(logits, allowed) - own
    return reduce(weighted(loss, weight), reduction)


@over_prefixes("query", "key", "negatives", "hard_negatives")
def info_nce_loss(
    query: Tensor,
    key: Tensor,
    temperature: float | Tensor = 0.07,
    negatives: Tensor | None = None,
    symmetric: bool = False,
    reduction: str = "mean",
    *,
    hard_negatives: Tensor | None = None,
    key_bias: Tensor | None = None,
    query_bias: Tensor | None = None,
    directions: Sequence[str] = ("query_to_key",),
    hardness: float = 0.0,
    hardness_on: str = "all",
    false_negative_margin: float | None = None,
    guide: Sequence[Tensor] | None = None,
    ignore: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """InfoNCE: cross entropy of query i's own key among the keys, or among it and `negatives`.

    hard_negatives are among the keys then, but no query's. key_bias is a logit's of each of those,
    and query_bias of each query's, in the losses of the keys.
    directions, hardness, false_negative_margin and guide: see `_softmax_terms`.
    """
    q, k = unit_rows(query), unit_rows(key)
    n = query.shape[0]
    if directions != ("query_to_key",) or hardness > 0 or false_negative_margin is not None:
        given = hard_negatives if negatives is None else negatives
        hard = None if given is None else unit_rows(given.flatten(0, -2)).view_as(given)
        others = other_items(n, ignore, query.device)

        of_guide = None
        if guide is not None:
            flat = [unit_rows(x.detach().flatten(0, -2)) for x in guide]
            of_guide = flat[0], flat[1], flat[2] if len(flat) == 3 else None

        def one_way(
            q: Tensor,
            k: Tensor,
            hard: Tensor | None,
            among_keys: Tensor,
            guide: tuple[Tensor, Tensor, Tensor | None] | None,
        ) -> Tensor:
            terms = _softmax_terms(
                q,
                k,
                hard,
                among_keys,
                temperature,
                directions,
                hardness,
                hardness_on,
                false_negative_margin,
                guide,
            )
            return terms.logsumexp(1) - terms[:, 0]

        loss = one_way(q, k, hard, others & (negatives is None), of_guide)
        if symmetric:
            back = None if of_guide is None else (of_guide[1], of_guide[0], None)
            loss = (loss + one_way(k, q, None, others, back)) / 2
        return reduce(weighted(loss, weight), reduction)
    if negatives is not None:
        own = (q * k).sum(1, keepdim=True)
        logits = torch.cat([own, q @ unit_rows(negatives).T], 1) / temperature
        loss = logits.logsumexp(1) - logits[:, 0]
        return reduce(weighted(loss, weight), reduction)
    target = torch.arange(n, device=query.device)
    allowed = other_items(n, ignore, query.device)
    allowed[target, target] = True
    logits = (q @ k.T / temperature).masked_fill(~allowed, -torch.inf)
    among = logits
    if hard_negatives is not None:
        hard = unit_rows(hard_negatives.flatten(0, -2))
        among = torch.cat([logits, q @ hard.T / temperature], 1)
    if key_bias is not None:
        among = among + key_bias
    loss = cross_entropy(among, target, reduction="none")
    if symmetric:
        among = logits.T if query_bias is None else logits.T + query_bias
        loss = (loss + cross_entropy(among, target, reduction="none")) / 2
    return reduce(weighted(loss, weight), reduction)


def _softmax_terms(
    q: Tensor,
    k: Tensor,
    hard: Tensor | None,
    others: Tensor,
    temperature: float | Tensor,
    directions: Sequence[str],
    hardness: float,
    hardness_on: str,
    margin: float | None,
    guide: tuple[Tensor, Tensor, Tensor | None] | None,
) -> Tensor:
    """Each query's logits in one softmax, its own key's first; -inf at what is no negative.

    hard: (N, K, D), each query's own, or (M, D), every query's. others: (N, N), the pairs of other
    items. hardness times the similarity, without its gradient, is added to the logits of queries
    with other items' keys and hard negatives ("in_batch"), with own hard ones ("hard"), or "all".
    margin: negatives more similar than S_ii less that are left out (GIST). guide: unit rows of
    another model, of queries, keys and hard negatives in one row each, whose S it compares then.
    """
    n = q.shape[0]
    own = (q * k).sum(1, keepdim=True)
    item = torch.eye(n, dtype=torch.bool, device=q.device)
    keys, allowed, mine, others_hard = k, others, item, others
    g_q, g_k, g_hard = guide or (q, k, None if hard is None else hard.flatten(0, -2))
    g_keys = g_k if g_hard is None else torch.cat([g_k, g_hard])
    limit = None if margin is None else (g_q * g_k).sum(1, keepdim=True) - margin
    if limit is not None:
        own = own + 0 * limit.detach()  # NaN where the guide's pair is
    if hard is not None:
        per_item = hard.shape[1] if hard.ndim == 3 else 0
        keys = torch.cat([k, hard.flatten(0, -2)])
        of_hard = item.repeat_interleave(per_item, 1) if per_item else item.new_ones(n, len(hard))
        allowed = torch.cat([others, torch.ones_like(of_hard)], 1)
        mine = torch.cat([item, of_hard], 1)
        others_hard = torch.cat([others, ~of_hard if per_item else of_hard], 1)
    s = q @ keys.T
    on = {"all": torch.ones_like(mine), "hard": mine, "in_batch": ~mine}[hardness_on]
    x = s / temperature + on * (hardness * s.detach())
    compared = [(g_q @ g_keys.T, x, allowed)]
    for name, a, b, g_a, g_b, pairs in (
        ("key_to_query", k, q, g_k, g_q, others),
        ("query_to_query", q, q, g_q, g_q, others),
        ("key_to_key", k, keys, g_k, g_keys, others_hard),
    ):
        if name in directions:
            compared.append((g_a @ g_b.T, a @ b.T / temperature, pairs))
    terms = [own / temperature] * (2 if "key_to_query" in directions else 1)
    for s, x, pairs in compared:
        if limit is not None:
            pairs = pairs & ~(s > limit)
        terms.append(x.masked_fill(~pairs, -torch.inf))
    return torch.cat(terms, 1)


@over_prefixes("z")
def sup_con_loss(
    z: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    *,
    ignore: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """SupCon's L_out (Khosla et al., 2020, eq. 2), over the rows that have a positive."""
    u = unit_rows(z)
    logits = u @ u.T / temperature
    itself = torch.eye(z.shape[0], dtype=torch.bool, device=z.device)
    positive = (labels == labels[:, None]) & ~itself
    count = positive.sum(1)
    negative = (labels != labels[:, None]) & other_items(z.shape[0], ignore, z.device)
    log_probability = logits - _finite_logsumexp(logits, positive | negative)[:, None]
    loss = -(log_probability * positive).sum(1) / count.clamp_min(1)
    loss = weighted(loss, weight)
    if reduction == "mean":
        return loss.sum() / (count > 0).sum().clamp_min(1)
    return reduce(loss, reduction)


@over_prefixes("z1", "z2")
def sigmoid_contrastive_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor,
    bias: float | Tensor,
    reduction: str = "mean",
    *,
    ignore: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """SigLIP's loss (Zhai et al., 2023, algorithm 1): a binary classification of every pair."""
    n = z1.shape[0]
    logits = unit_rows(z1) @ unit_rows(z2).T / temperature + bias
    own = torch.eye(n, dtype=torch.bool, device=z1.device)
    pairs = -logsigmoid(torch.where(own, logits, -logits))
    counted = own | other_items(n, ignore, z1.device)
    return reduce(weighted((pairs * counted).sum(1), weight), reduction)


def other_items(n: int, ignore: Tensor | None, device: torch.device) -> Tensor:
    """True where two of n items are each other's negatives, (n, n)."""
    groups = torch.arange(n, device=device) if ignore is None else ignore
    return groups != groups[:, None]


def _finite_logsumexp(logits: Tensor, allowed: Tensor) -> Tensor:
    # a row with nothing allowed must not make a NaN: its own logits stand in, and are cut off
    some = allowed | ~allowed.any(1, keepdim=True)
    return logits.masked_fill(~some, -torch.inf).logsumexp(1)


def weighted(loss: Tensor, weight: Tensor | None) -> Tensor:
    return loss if weight is None else loss * weight.repeat(loss.shape[0] // weight.shape[0])
