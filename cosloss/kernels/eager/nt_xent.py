"""NT-Xent. Shapes: z (2N, D), rows i and i + N a positive pair; loss (2N,)."""

import torch
from torch import Tensor

from cosloss.kernels.eager.rows import through_unit_rows, unit_rows


def forward(z: Tensor, temperature: float) -> Tensor:
    """Per-row loss lse_i - S_i,pos(i) / temperature, S_ii left out of lse_i."""
    u, _ = unit_rows(z)
    logits = _logits(u, temperature)
    return logits.logsumexp(1) - logits.gather(1, _positive(z)).squeeze(1)


def backward(grad: Tensor, z: Tensor, temperature: float) -> Tensor:
    """Gradient on z from the gradient on the per-row loss."""
    u, reciprocal_norm = unit_rows(z)
    weight = _logits(u, temperature).softmax(1) * grad[:, None]
    grad_u = (weight + weight.T) @ u
    positive = _positive(z).squeeze(1)
    grad_u = grad_u - (grad + grad[positive])[:, None] * u[positive]
    return through_unit_rows(grad_u / temperature, u, reciprocal_norm)


def _logits(u: Tensor, temperature: float) -> Tensor:
    row = torch.arange(u.shape[0], device=u.device)
    return (u @ u.T / temperature).masked_fill(row == row[:, None], -torch.inf)


def _positive(z: Tensor) -> Tensor:
    rows = z.shape[0]
    return ((torch.arange(rows, device=z.device) + rows // 2) % rows)[:, None]
