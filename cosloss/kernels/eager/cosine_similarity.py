"""Row-wise cosine similarity over the last dimension, at any scale and dtype, differentiable twice.

Shapes: x1, x2 (..., D); similarity (...).
"""

import torch
from torch import Tensor

from cosloss.kernels.eager.clamped_rows import ClampedRows, clamped_rows, through_clamped_rows


def forward(x1: Tensor, x2: Tensor, eps: float) -> Tensor:
    """<x1, x2> / (max(|x1|, eps) max(|x2|, eps)), in [-1, 1]; of a row with itself, exactly 1."""
    rows1, rows2 = clamped_rows(x1, eps), clamped_rows(x2, eps)
    similarity = (rows1.unit * rows2.unit).sum(-1)
    # the unit rows' own rounding is divided out, and what is left is clamped, without a derivative
    squared = _squared_length(rows1) * _squared_length(rows2)
    exact = (similarity / squared.sqrt()).clamp(-1, 1)
    return (similarity + (exact - similarity).detach()).to(x1.dtype)


def distance_forward(x1: Tensor, x2: Tensor, eps: float) -> Tensor:
    """1 - similarity, accurate relative to itself where the similarity is near 1."""
    # 1 - <u, v> = (|u - v|^2 + (1 - |u|^2) + (1 - |v|^2)) / 2; the last two are 0 unless clamped
    rows1, rows2 = clamped_rows(x1, eps), clamped_rows(x2, eps)
    between = (rows1.unit - rows2.unit).square().sum(-1)
    return ((between + _shortfall(rows1) + _shortfall(rows2)) / 2).to(x1.dtype)


def backward(
    grad: Tensor, x1: Tensor, x2: Tensor, eps: float, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients on x1 and x2 from the gradient on the similarity, each only where `needs` asks."""
    rows1, rows2 = clamped_rows(x1, eps), clamped_rows(x2, eps)
    grad = grad.double().unsqueeze(-1)
    grad1 = grad2 = None
    if needs[0]:
        grad1 = through_clamped_rows(grad * rows2.unit, rows1).to(x1.dtype)
    if needs[1]:
        grad2 = through_clamped_rows(grad * rows1.unit, rows2).to(x2.dtype)
    return grad1, grad2


def _squared_length(rows: ClampedRows) -> Tensor:
    return torch.where(rows.clamped.squeeze(-1), 1, rows.unit.square().sum(-1))


def _shortfall(rows: ClampedRows) -> Tensor:
    return torch.where(rows.clamped.squeeze(-1), 1 - rows.unit.square().sum(-1), 0)
