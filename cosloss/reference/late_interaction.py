"""Twins of late interaction: the tensor of all token similarities, under autograd."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cosloss.reference._rows import reduce, unit_rows
from cosloss.reference.contrastive import other_items, weighted


def max_sim(
    query_tokens: Tensor,
    document_tokens: Tensor,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
) -> Tensor:
    """ColBERT's late interaction (Khattab and Zaharia, 2020, eq. 3): every token with every token.

    Masked tokens are made zeros first, so that what stands there is met by nobody.
    """
    tokens = []
    for x, mask in ((query_tokens, query_mask), (document_tokens, document_mask)):
        kept = x if mask is None else torch.where(mask[..., None], x, 0)
        tokens.append(unit_rows(kept.flatten(0, 1)).view_as(x))
    similarity = torch.einsum("bqd,ctd->bcqt", *tokens)
    if document_mask is not None:
        similarity = torch.where(document_mask[:, None], similarity, -torch.inf)
    best = similarity.max(dim=3).values
    if document_mask is not None:
        best = torch.where(document_mask.any(1)[:, None], best, 0)
    if query_mask is not None:
        best = torch.where(query_mask[:, None], best, 0)
    return best.sum(2)


def max_sim_loss(
    query_tokens: Tensor,
    document_tokens: Tensor,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    *,
    symmetric: bool = False,
    ignore: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Cross entropy of query i's own document i among all, their MaxSim scores the logits."""
    logits = max_sim(query_tokens, document_tokens, query_mask, document_mask) / temperature
    n, documents = logits.shape
    target = torch.arange(n, device=logits.device)
    allowed = other_items(n, ignore, logits.device)
    allowed[target, target] = True
    hard = allowed.new_ones(n, documents - n)
    among = logits.masked_fill(~torch.cat([allowed, hard], 1), -torch.inf)
    loss = cross_entropy(among, target, reduction="none")
    if symmetric:
        loss = (loss + cross_entropy(among[:, :n].T, target, reduction="none")) / 2
    return reduce(weighted(loss, weight), reduction)
