"""MaxSim, ColBERT's late interaction, and the contrastive loss on its scores."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from cosloss.arguments import check_device, check_flags, check_tensor, described
from cosloss.criteria import CrossEntropy, empty_lse
from cosloss.distributed import NOT_PLAIN, Peers
from cosloss.functional._checks import (
    as_number,
    check_floating,
    check_rows,
    check_temperature,
    refuse_tracing,
)
from cosloss.functional._in_batch import Options, item_mask, warn_without_negatives
from cosloss.modes import differentiates_itself
from cosloss.ops.max_sim import max_sim as of_tokens


def max_sim(
    query_tokens: Float[Tensor, "b q d"],
    document_tokens: Float[Tensor, "c t d"],
    query_mask: Bool[Tensor, "b q"] | None = None,
    document_mask: Bool[Tensor, "c t"] | None = None,
) -> Float[Tensor, "b c"]:
    """MaxSim, the late interaction of every query's tokens with every document's.

    s_bc = sum_q max_t S_bqct

    with S_bqct the cosine similarity of query b's token q and document c's token t. The gradient of
    s_bc goes, for each q, to the token t that is most similar; to the first of them if several
    are equally so. The (B, Q, C, T) similarities are never in memory at once.

    Args:
        query_tokens: (B, Q, D), floating point; rows need not be normalised.
        document_tokens: (C, T, D).
        query_mask: (B, Q), boolean, true where a token counts; None counts all.
        document_mask: (C, T), likewise.

    Returns:
        The scores (B, C), each in [-Q, Q], in at least float32, in which they are added up. What a
        masked token holds changes nothing, and its gradient is 0. A query or a document
        without a token that counts has score 0, and gradient 0. A zero token has similarity 0 with
        every token, and gradient 0. A NaN or an infinity makes the scores that meet it NaN.

    Raises:
        TypeError: an input is not a real floating-point tensor, or a mask not a boolean one.
        ValueError: shapes do not match, tensors are on two devices, or there is no query, no
            document, no token or no column.

    Example:
        >>> query = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
        >>> max_sim(query, torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[0.0, 5.0], [3.0, 4.0]]]))
        tensor([[1.8000, 1.6000]])

    Source: Khattab and Zaharia, "ColBERT: Efficient and Effective Passage Search via Contextualized
    Late Interaction over BERT", 2020, eq. 3.
    """
    _check_tokens(query_tokens, document_tokens)
    _check_mask("query_mask", query_mask, query_tokens)
    _check_mask("document_mask", document_mask, document_tokens)
    refuse_tracing()
    dtype = torch.promote_types(query_tokens.dtype, document_tokens.dtype)
    masks = query_mask, document_mask
    return of_tokens(query_tokens.to(dtype), document_tokens.to(dtype), masks)


def max_sim_loss(
    query_tokens: Float[Tensor, "b q d"],
    document_tokens: Float[Tensor, "c t d"],
    query_mask: Bool[Tensor, "b q"] | None = None,
    document_mask: Bool[Tensor, "c t"] | None = None,
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    *,
    symmetric: bool = False,
    ignore: Int[Tensor, " b"] | None = None,
    weight: Float[Tensor, " b"] | None = None,
    gather_distributed: bool = False,
) -> Float[Tensor, "..."]:
    """The cross entropy of a query's own document among all documents, by their MaxSim scores.

    l_i = -s_ii / temperature + log sum_j exp(s_ij / temperature)

    with s = `max_sim(query_tokens, document_tokens, query_mask, document_mask)`. Documents beyond
    the queries' own are hard negatives of every query.

    Args:
        query_tokens: (B, Q, D), floating point; rows need not be normalised.
        document_tokens: (C, T, D), C >= B: document i the positive of query i, then hard negatives.
        query_mask: (B, Q), boolean, true where a token counts; None counts all.
        document_mask: (C, T), likewise.
        temperature: positive; a number or a tensor of one, which may require a gradient.
        reduction: "none" gives (B,); "sum" and "mean" are over those.
        symmetric: average with the loss of finding the query of a document, for the first B.
        ignore: (B,), one group id per pair; pairs of the same group are not negatives.
        weight: (B,), multiplies each loss before the reduction; "mean" divides by B.
        gather_distributed: take documents from all processes of the default group, whose batches
            may differ in size, and in their numbers of tokens; C / B is a whole number, the same in
            all. The loss is the joined batch's in every process, and after DDP's averaging so is
            every gradient, which travels back in the backward pass. Needs reduction "mean" or
            "sum".

    Returns:
        The loss, a scalar unless reduction is "none"; float32 under autocast. Its scores are as
        `max_sim` gives them, in at least float32. The default temperature is ColBERT's, a sum of
        cosines as it is: with Q tokens it is 1 / Q of the mean similarity's temperature. A query
        without negatives has loss 0.

    Raises:
        TypeError: an input is not a real floating-point tensor, a mask not a boolean one, or an
            option of another kind.
        ValueError: shapes do not match, tensors are on two devices, there is no query, no token or
            no column, fewer documents than queries, temperature is not positive and finite,
            reduction is invalid, or documents cannot be gathered.

    Example:
        >>> tokens = torch.eye(2)[:, None]
        >>> max_sim_loss(tokens, tokens)
        tensor(0.3133)

    Source: Santhanam et al., "ColBERTv2: Effective and Efficient Retrieval via Lightweight Late
    Interaction", 2022, section 3.2: the in-batch negatives; Khattab and Zaharia, "ColBERT", 2020.
    """
    options = Options(reduction, ignore, weight, gather_distributed)
    check_flags(gather_distributed=gather_distributed)
    _check_tokens(query_tokens, document_tokens)
    n, documents = query_tokens.shape[0], document_tokens.shape[0]
    if documents < n:
        raise ValueError(
            f"document_tokens must have shape (C, T, D) with C >= {n}, a document for each query "
            f"first; got {tuple(document_tokens.shape)}"
        )
    check_temperature(temperature, query_tokens)
    check_flags(symmetric=symmetric)
    options.check(query_tokens)
    _check_mask("query_mask", query_mask, query_tokens)
    _check_mask("document_mask", document_mask, document_tokens)
    dtype = torch.promote_types(query_tokens.dtype, document_tokens.dtype)
    temperature = as_number(temperature, dtype)
    if gather_distributed and documents % n != 0:
        raise ValueError(
            f"document_tokens must have as many hard negatives for each of {n} queries, with "
            f"gather_distributed; got {documents - n}"
        )
    per_item = documents // n - 1 if gather_distributed else None
    peers = options.peers(query_tokens, per_item, temperature=temperature)
    if documents == n:
        warn_without_negatives(n, ignore, peers)
    if peers is not None and differentiates_itself(query_tokens, document_tokens):
        raise RuntimeError(NOT_PLAIN)
    refuse_tracing()
    queries = _Texts(query_tokens.to(dtype), query_mask)
    given = _Texts(document_tokens.to(dtype), document_mask)
    mask = item_mask(query_tokens, 1, ignore, peers)
    own, items = (slice(0, n), n) if peers is None else (peers.own, sum(peers.batch_sizes))
    logits = queries.scores(given if peers is None else given.joined(peers)) / temperature
    of_items = mask.dense(logits[:, :items])  # everyone's own documents come first
    loss = _cross_entropy(logits, pad(of_items, (0, logits.shape[1] - items)), own)
    if symmetric:
        if peers is None:
            back = logits[:, :n].T
        else:
            back = queries.joined(peers).scores(given.first(n)).T / temperature
        loss = (loss + _cross_entropy(back, of_items, own)) / 2
    return options.reduced(loss, dtype, peers)


class _Texts(NamedTuple):
    """Tokens (N, T, D), and which of them count, (N, T) or None for all."""

    tokens: Tensor
    mask: Tensor | None

    def first(self, count: int) -> "_Texts":
        """The first of them."""
        return _Texts(self.tokens[:count], None if self.mask is None else self.mask[:count])

    def scores(self, documents: "_Texts") -> Tensor:
        """MaxSim of each of these with each document."""
        return of_tokens(self.tokens, documents.tokens, (self.mask, documents.mask))

    def joined(self, peers: Peers) -> "_Texts":
        """Everyone's, k for each item: all items' first, all items' second, and so on.

        Those with fewer tokens than another process's are filled up with tokens that do not count.
        """
        n = peers.batch_sizes[peers.rank]
        mask = self.mask
        if mask is None:
            mask = self.tokens.new_ones(self.tokens.shape[:2], dtype=torch.bool)
        counts = self.tokens.new_full((n, 1), self.tokens.shape[1], dtype=torch.float64)
        missing = int(peers.gather(counts).max()) - self.tokens.shape[1]
        by_item = pad(self.tokens, (0, 0, 0, missing)).unflatten(0, (-1, n)).transpose(0, 1)
        of_mask = pad(mask, (0, missing)).unflatten(0, (-1, n)).transpose(0, 1)
        tokens = peers.join(by_item.contiguous())
        masks = peers.gather(of_mask.to(torch.uint8).contiguous()).bool()
        return _Texts(tokens.transpose(0, 1).flatten(0, 1), masks.transpose(0, 1).flatten(0, 1))


def _cross_entropy(logits: Tensor, mask: Tensor, own: slice) -> Tensor:
    """Each row's loss, its positive in the columns `own`, its negatives where there is no mask."""
    criterion = CrossEntropy()
    negatives = logits.masked_fill(mask, empty_lse(logits.dtype))
    return criterion.loss(criterion.dense_stat(negatives, 1), logits[:, own].diagonal())


def _check_tokens(query_tokens: Tensor, document_tokens: Tensor) -> None:
    given = {"query_tokens": query_tokens, "document_tokens": document_tokens}
    check_floating(**given)
    check_rows(**{name: x for name, x in given.items() if x.ndim == 3})
    shapes = [tuple(x.shape) for x in given.values()]
    if any(len(shape) != 3 for shape in shapes) or shapes[0][2] != shapes[1][2]:
        raise ValueError(
            "query_tokens and document_tokens must have shapes (B, Q, D) and (C, T, D); "
            f"got {shapes[0]} and {shapes[1]}"
        )
    if 0 in shapes[0] or 0 in shapes[1]:
        raise ValueError(
            "query_tokens and document_tokens must have at least one token each; got shapes "
            f"{shapes[0]} and {shapes[1]}"
        )
    check_device("query_tokens", query_tokens, "document_tokens", document_tokens)


def _check_mask(name: str, mask: Tensor | None, tokens: Tensor) -> None:
    if mask is None:
        return
    check_tensor(**{name: mask})
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{name} must be boolean, true where a token counts; got {described(mask)}: "
            f"use {name}.bool()"
        )
    if mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"{name} must say of each token whether it counts, shape {tuple(tokens.shape[:2])}; "
            f"got {tuple(mask.shape)}"
        )
    check_device("the tokens", tokens, name, mask)
