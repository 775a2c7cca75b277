"""Cosine similarity of all pairs of rows. Shapes: x1 (..., N, D), x2 (..., M, D) or None for x1.

The products are in float32, or in float64 for float64 rows; the rows are normalised in float64.
"""

import torch
from torch import Tensor

from cosloss.kernels.eager.clamped_rows import ClampedRows, clamped_rows, through_clamped_rows


def forward(x1: Tensor, x2: Tensor | None, eps: float) -> Tensor:
    """Similarities (..., N, M) in [-1, 1]; without x2, symmetric with a unit diagonal."""
    rows1 = clamped_rows(x1, eps)
    unit1 = rows1.unit.to(_product_dtype(x1))
    unit2 = unit1 if x2 is None else clamped_rows(x2, eps).unit.to(unit1.dtype)
    product = unit1 @ unit2.mT
    exact = product.detach().clamp(-1, 1)
    if x2 is None:
        exact = _symmetric(exact, rows1)
    return (product + (exact - product).detach()).to(x1.dtype)


def backward(
    grad: Tensor, x1: Tensor, x2: Tensor | None, eps: float, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients on x1 and x2 from the gradient on the similarities, where `needs` asks."""
    dtype = _product_dtype(x1)
    grad = grad.to(dtype)
    rows1 = clamped_rows(x1, eps)
    if x2 is None:
        grad_unit = (grad + grad.mT) @ rows1.unit.to(dtype)
        return through_clamped_rows(grad_unit.double(), rows1).to(x1.dtype), None
    rows2 = clamped_rows(x2, eps)
    grad1 = grad2 = None
    if needs[0]:
        grad_unit = grad @ rows2.unit.to(dtype)
        grad1 = through_clamped_rows(grad_unit.double(), rows1).to(x1.dtype)
    if needs[1]:
        grad_unit = grad.mT @ rows1.unit.to(dtype)
        grad2 = through_clamped_rows(grad_unit.double(), rows2).to(x2.dtype)
    return grad1, grad2


def _product_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _symmetric(similarity: Tensor, rows: ClampedRows) -> Tensor:
    # a matrix product need not sum (i, j) and (j, i) in the same order
    row = torch.arange(similarity.shape[-1], device=similarity.device)
    unit_diagonal = (row == row[:, None]) & ~rows.clamped & ~similarity.isnan()
    return torch.where(unit_diagonal, 1, (similarity + similarity.mT) / 2)
