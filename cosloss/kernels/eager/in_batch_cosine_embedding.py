"""In-batch cosine embedding loss. Shapes: z (2N, D), rows i and i + N a positive; loss (2N,)."""

import torch
from torch import Tensor

from cosloss.kernels.eager.rows import through_unit_rows, unit_rows


def forward(z: Tensor, margin: float) -> Tensor:
    """Per-row loss 1 - S_i,pos(i) + mean over the row's negatives of max(0, S_ij - margin)."""
    u, _ = unit_rows(z)
    similarity = u @ u.T
    hinge = torch.relu(similarity - margin) * _negative(z)
    return 1 - similarity.gather(1, _positive(z)).squeeze(1) + hinge.sum(1) / _negatives(z)


def backward(grad: Tensor, z: Tensor, margin: float) -> Tensor:
    """Gradient on z from the gradient on the per-row loss."""
    u, reciprocal_norm = unit_rows(z)
    active = (u @ u.T > margin) & _negative(z)
    weight = active * (grad[:, None] / _negatives(z))
    positive = _positive(z).squeeze(1)
    grad_u = (weight + weight.T) @ u - (grad + grad[positive])[:, None] * u[positive]
    return through_unit_rows(grad_u, u, reciprocal_norm)


def _positive(z: Tensor) -> Tensor:
    rows = z.shape[0]
    return ((torch.arange(rows, device=z.device) + rows // 2) % rows)[:, None]


def _negative(z: Tensor) -> Tensor:
    row = torch.arange(z.shape[0], device=z.device)
    return (row != row[:, None]) & (row != _positive(z))


def _negatives(z: Tensor) -> int:
    return max(z.shape[0] - 2, 1)
