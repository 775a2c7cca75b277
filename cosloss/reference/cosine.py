"""Twins of cosine similarity and the cosine embedding loss, row-wise and in-batch."""

import torch
from torch import Tensor

from cosloss.reference._rows import reduce, unit_rows


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """Cosine similarity along `dim`; each norm is clamped to at least `eps`, under autograd."""
    norm1 = torch.linalg.vector_norm(x1, dim=dim, keepdim=True).clamp_min(eps)
    norm2 = torch.linalg.vector_norm(x2, dim=dim, keepdim=True).clamp_min(eps)
    return (x1 / norm1 * (x2 / norm2)).sum(dim)


def cosine_embedding_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor | None = None,
    margin: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """1 - similarity where target is 1, max(0, similarity - margin) where it is -1.

    Without a target, the in-batch form over the 2N rows of both inputs.
    """
    if target is None:
        return _in_batch(input1, input2, margin, reduction)
    similarity = cosine_similarity(input1, input2, dim=-1)
    loss = torch.where(target == 1, 1 - similarity, torch.relu(similarity - margin))
    return reduce(loss, reduction)


def _in_batch(z1: Tensor, z2: Tensor, margin: float, reduction: str) -> Tensor:
    n = z1.shape[0]
    u = unit_rows(torch.cat([z1, z2]))
    similarity = u @ u.T
    row = torch.arange(2 * n, device=z1.device)
    positive = (row + n) % (2 * n)
    negative = torch.ones_like(similarity, dtype=torch.bool)
    negative[row, row] = False
    negative[row, positive] = False
    hinge = torch.relu(similarity - margin) * negative
    loss = 1 - similarity[row, positive] + hinge.sum(1) / max(2 * n - 2, 1)
    return reduce(loss, reduction)
