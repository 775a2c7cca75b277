"""MaxSim scores of queries and documents, and the gradient through them, tile by tile.

In the notation of `cosloss.ops.max_sim`. Both gradients are bags of rows with weights. A bag is
added up in one order, on every device: those of document tokens come from a stable sort of the
positions, and not from atomic additions.

Shapes: tokens of queries (B, Q, D) and documents (C, T, D); masks (B, Q) and (C, T), true where a
token counts, or None; scores (B, C); positions (C, B Q), of the document's token that is most
similar to a query's.
"""

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, max_pool2d_with_indices

from cosloss.kernels.scratch import empty, workspace

TILE = 1 << 18  # similarities per thread: they stay in a core's cache
BLOCK = 1 << 19  # numbers of the documents whose unit rows are there at once, or of their positions
WIDTH = 512  # tokens of the documents of a tile, unless one for each thread has more
ACCELERATED = 64  # times as much on an accelerator, where launches are the cost


def forward(
    unit_rows: ModuleType,
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """The scores, in at least float32, and the positions if they are to be kept.

    unit_rows: a backend's. dtype: of the products.
    """
    (b, q), (c, t) = queries.shape[:2], documents.shape[:2]
    u, _ = unit_tokens(unit_rows, kept(queries, query_mask), dtype)
    scores = u.new_empty(b, c, dtype=torch.promote_types(dtype, torch.float32))
    narrow = torch.int16 if t <= 1 << 15 else torch.int32
    positions = u.new_empty(c if keep else 0, b * q, dtype=narrow)
    for part in _blocks(queries, documents):
        mask = None if document_mask is None else document_mask[part]
        v, _ = unit_tokens(unit_rows, kept(documents[part], mask), dtype)
        best = scores.new_empty(part.stop - part.start, b * q)
        for i, j, x in _tiles(u, v.view(-1, t, v.shape[1])):
            if mask is not None:
                x.masked_fill_(~mask[i, :, None], -torch.inf)
            best[i, j], position = _first_maximum(x)
            if keep:
                positions[part][i, j] = position
        if mask is not None:
            best.masked_fill_(~mask.any(1, keepdim=True), 0)
        best = best.view(-1, b, q)
        if query_mask is not None:
            best.masked_fill_(~query_mask, 0)
        scores[:, part] = best.sum(2).T
    return scores, positions if keep else None


def backward(
    unit_rows: ModuleType,
    grad: Tensor,
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    positions: Tensor,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients on queries and documents, where needed, from that on the scores."""
    queries = kept(queries, query_mask)
    u, norm_u = unit_tokens(unit_rows, queries, None)
    grad_u = torch.zeros_like(u) if needs[0] else None
    grad_documents = empty(documents.shape, documents) if needs[1] else None
    for part in _blocks(queries, documents):
        mask = None if document_mask is None else document_mask[part]
        own = kept(documents[part], mask)
        v, norm_v = unit_tokens(unit_rows, own, None)
        weight = _weights(grad.T[part].to(u.dtype), queries.shape[1], query_mask, mask)
        first = torch.arange(0, v.shape[0], own.shape[1], device=v.device)
        token = positions[part] + first[:, None]
        if grad_u is not None:
            grad_u += _bags(token.T, v, weight.T)
        if grad_documents is not None:
            token, order = token.flatten().sort(stable=True)
            start = torch.searchsorted(token, torch.arange(v.shape[0], device=v.device))
            grad_v = _bags(order % u.shape[0], u, weight.flatten()[order], start)
            grad_documents[part] = _through(unit_rows, grad_v, own, norm_v, mask)
    if grad_u is None:
        return None, grad_documents
    return _through(unit_rows, grad_u, queries, norm_u, query_mask), grad_documents


def kept(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens, those that do not count as zeros, whatever they are."""
    return tokens if mask is None else tokens.masked_fill(~mask[..., None], 0)


def unit_tokens(
    unit_rows: ModuleType, tokens: Tensor, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """The tokens' unit rows, below one another, and their norms."""
    unit, norm, _ = unit_rows.forward([tokens.flatten(0, 1)], dtype=dtype)
    return unit, norm


def _through(
    unit_rows: ModuleType, grad: Tensor, tokens: Tensor, norm: Tensor, mask: Tensor | None
) -> Tensor:
    """The gradient on tokens from that on their unit rows."""
    (found,) = unit_rows.backward([grad], None, [tokens.flatten(0, 1)], norm, [True])
    # a NaN may have met a masked token
    return kept(found.view_as(tokens), mask).to(tokens.dtype)


def _weights(
    grad: Tensor, q: int, query_mask: Tensor | None, document_mask: Tensor | None
) -> Tensor:
    """The gradient (C, B) of documents' scores on each of the queries' maxima, (C, B Q)."""
    weight = grad.repeat_interleave(q, 1)
    if query_mask is not None:
        weight.masked_fill_(~query_mask.flatten(), 0)
    if document_mask is not None:
        weight.masked_fill_(~document_mask.any(1, keepdim=True), 0)
    return weight


def _bags(rows: Tensor, x: Tensor, weight: Tensor, starts: Tensor | None = None) -> Tensor:
    """Sums of weighted rows of x, those of a line, or from one start to the next."""
    rows, weight = rows.contiguous(), weight.contiguous()
    return embedding_bag(rows, x, starts, mode="sum", per_sample_weights=weight)


def _first_maximum(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest numbers of (C, T, R) along T, and the first place of each; NaN is above all."""
    if not x.is_cpu:
        return x.max(1)
    # torch's max looks at one number after the other there; its pooling, at many rows at once
    pixels = x.unsqueeze(2).permute(0, 3, 1, 2)
    best, position = max_pool2d_with_indices(pixels, (x.shape[1], 1))
    return best.flatten(1), position.flatten(1)


def _tiles(u: Tensor, v: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Documents i of v, rows j of u, and their similarities (C, T, R), in memory of all tiles."""
    c, t, d = v.shape
    threads = _threads(u)
    height = min(c, max(threads, WIDTH // t))
    width = min(u.shape[0], max(1, TILE * threads // (height * t)))
    memory = workspace.scratch("max_sim", (height * t * width,), u)
    for first in range(0, c, height):
        i = slice(first, min(first + height, c))
        left = v[i].view(-1, d)
        for start in range(0, u.shape[0], width):
            j = slice(start, min(start + width, u.shape[0]))
            x = memory[: left.shape[0] * (j.stop - j.start)].view(left.shape[0], -1)
            yield i, j, torch.mm(left, u[j].T, out=x).view(-1, t, j.stop - j.start)


def _blocks(queries: Tensor, documents: Tensor) -> Iterator[slice]:
    """Documents whose unit rows and positions are there at once."""
    c, numbers = documents.shape[0], documents[0].numel()
    largest = max(numbers, queries.shape[:2].numel())
    count = max(_threads(queries), BLOCK * (1 if queries.is_cpu else ACCELERATED) // largest)
    return (slice(start, min(start + count, c)) for start in range(0, c, count))


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.is_cpu else ACCELERATED
