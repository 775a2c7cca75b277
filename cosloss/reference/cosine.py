"""Twins of cosine similarity, row-wise and pairwise, and of the cosine embedding loss."""

import torch
from torch import Tensor

from cosloss.reference._rows import reduce, unit_rows


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """Cosine similarity along `dim`; each norm is clamped to at least `eps`, under autograd."""
    x1, x2 = torch.broadcast_tensors(x1, x2)
    return (_clamped_unit(x1, dim, eps) * _clamped_unit(x2, dim, eps)).sum(dim)


def pairwise_cosine_similarity(x1: Tensor, x2: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """Cosine similarity of every row of x1 with every row of x2 (of x1, if there is no x2)."""
    u1 = _clamped_unit(x1, -1, eps)
    u2 = u1 if x2 is None else _clamped_unit(x2, -1, eps)
    return u1 @ u2.mT


def cosine_embedding_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor | None = None,
    margin: float = 0.0,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """1 - similarity where target is 1, max(0, similarity - margin) where it is -1.

    Without a target, the in-batch form over the 2N rows of both inputs.
    """
    if target is None:
        return in_batch_cosine_embedding_loss(input1, input2, margin, reduction)
    similarity = cosine_similarity(input1, input2, dim=-1)
    loss = torch.where(target == 1, 1 - similarity, torch.relu(similarity - margin))
    return reduce(loss if weight is None else weight * loss, reduction)


def _clamped_unit(x: Tensor, dim: int, eps: float) -> Tensor:
    # vector_norm squares: dividing by the largest entry first keeps every scale in range
    largest = x.detach().abs().amax(dim, keepdim=True)
    largest = torch.where(largest > 0, largest, 1)
    scaled = x / largest
    norm = torch.linalg.vector_norm(scaled, dim=dim, keepdim=True)
    unit = scaled / torch.where(norm == 0, 1, norm)
    clamped = torch.where(norm * largest > eps, unit, x / (eps or 1))
    return torch.where(norm == 0, 0, clamped)


def in_batch_cosine_embedding_loss(
    z1: Tensor,
    z2: Tensor,
    margin: float = 0.0,
    reduction: str = "mean",
    *,
    negative_weight: float = 1.0,
    ignore: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """1 - similarity of row i's positive, and the weighted mean over its negatives of the hinge."""
    n = z1.shape[0]
    u = unit_rows(torch.cat([z1, z2]))
    similarity = u @ u.T
    row = torch.arange(2 * n, device=z1.device)
    groups = torch.arange(n, device=z1.device) if ignore is None else ignore
    negative = (groups != groups[:, None]).tile(2, 2)
    hinge = torch.relu(similarity - margin) * negative
    loss = 1 - similarity[row, (row + n) % (2 * n)]
    loss = loss + negative_weight * hinge.sum(1) / negative.sum(1).clamp_min(1)
    return reduce(loss if weight is None else loss * weight.repeat(2), reduction)
