"""Normalisation of rows to unit length, and the gradient through it.

With u = x / |x| and a gradient g on u, the gradient on x is (g - (g.u) u) / |x|.
"""

import torch
from torch import Tensor


def unit_rows(z: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows of z, (N, D), and the reciprocal norms, (N, 1); a zero row gives zeros in both.

    Rows are first divided by their largest magnitude, so that no square over- or underflows.
    """
    largest = z.detach().abs().amax(dim=1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1)
    scaled = z / largest
    norm = scaled.square().sum(dim=1, keepdim=True)
    zero = norm == 0
    norm = torch.where(zero, 1, norm).sqrt()
    return scaled / norm, torch.where(zero, 0, 1 / norm / largest)


def through_unit_rows(grad_u: Tensor, u: Tensor, reciprocal_norm: Tensor) -> Tensor:
    """The gradient on z from the gradient on its unit rows u."""
    return (grad_u - (grad_u * u).sum(dim=1, keepdim=True) * u) * reciprocal_norm
