"""Rows divided by their clamped norm, n = max(|x|, eps), at any scale and dtype.

Everything is in float64: there the squares of the narrower dtypes neither overflow nor vanish.
These are differentiable torch operations: a backward written with them has a right derivative.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ClampedRows(NamedTuple):
    """unit: x / n, (..., D). norm: n, (..., 1). clamped: |x| <= eps, or zero: |x| = 0; (..., 1)."""

    unit: Tensor
    norm: Tensor
    clamped: Tensor
    zero: Tensor


def clamped_rows(x: Tensor, eps: float) -> ClampedRows:
    """The rows of x over their clamped norms; a zero row has unit 0, norm 1 and no derivative."""
    wide = x.double()
    largest = _largest(wide)
    zero = largest == 0
    # the squares of float64 rows are the only ones that may overflow or vanish
    scale = torch.where(zero, 1, largest) if x.dtype == torch.float64 else torch.ones_like(largest)
    scaled = wide / scale
    # sqrt has an infinite derivative at 0, so a zero row is moved off it
    length = torch.where(zero, 1, scaled.square().sum(-1, keepdim=True)).sqrt()
    norm = length * scale
    clamped = zero | (norm <= eps)
    unit = torch.where(clamped, wide / (eps or 1), scaled / length)
    norm = torch.where(zero, 1, norm.clamp_min(eps))
    return ClampedRows(torch.where(zero, 0, unit), norm, clamped, zero)


def through_clamped_rows(grad_unit: Tensor, rows: ClampedRows) -> Tensor:
    """The gradient on x from the gradient on its unit rows."""
    along = (grad_unit * rows.unit).sum(-1, keepdim=True) * rows.unit
    return torch.where(rows.zero, 0, (grad_unit - torch.where(rows.clamped, 0, along)) / rows.norm)


def _largest(x: Tensor) -> Tensor:
    if x.shape[-1] == 0:
        return x.new_zeros(*x.shape[:-1], 1)
    return x.detach().abs().amax(-1, keepdim=True)
