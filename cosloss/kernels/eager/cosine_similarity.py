"""Row-wise cosine similarity over the last dimension. Shapes: x1, x2 (..., D); similarity (...)."""

import torch
from torch import Tensor


def _norm(x: Tensor) -> Tensor:
    # sqrt has an infinite derivative at 0, so the zero row is moved off it
    squared = x.square().sum(-1, keepdim=True)
    zero = squared == 0
    return torch.where(zero, 0, torch.where(zero, 1, squared).sqrt())


def forward(x1: Tensor, x2: Tensor, eps: float) -> Tensor:
    """<x1, x2> / (max(|x1|, eps) max(|x2|, eps))."""
    return (x1 / _norm(x1).clamp_min(eps) * (x2 / _norm(x2).clamp_min(eps))).sum(-1)


def backward(
    grad: Tensor, x1: Tensor, x2: Tensor, eps: float, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients on x1 and x2 from the gradient on the similarity, each only where `needs` asks."""
    norm1, norm2 = _norm(x1), _norm(x2)
    u1, u2 = x1 / norm1.clamp_min(eps), x2 / norm2.clamp_min(eps)
    similarity = (u1 * u2).sum(-1, keepdim=True)
    grad = grad.unsqueeze(-1)
    grad1 = grad2 = None
    if needs[0]:
        grad1 = _one_side(grad, u1, u2, similarity, norm1, eps)
    if needs[1]:
        grad2 = _one_side(grad, u2, u1, similarity, norm2, eps)
    return grad1, grad2


def _one_side(
    grad: Tensor, u: Tensor, other: Tensor, similarity: Tensor, norm: Tensor, eps: float
) -> Tensor:
    # below eps the norm is the constant eps, and the projection term is absent
    projection = torch.where(norm > eps, similarity, 0) * u
    return torch.where(norm == 0, 0, grad * (other - projection) / norm.clamp_min(eps))
