"""Normalisation of rows to unit length, and the gradient through it.

With u = x / |x| and a gradient g on u, the gradient on x is (g - (g.u) u) / |x|.
"""

import torch
from torch import Tensor


def unit_rows(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows of z, (N, D), and their norms as two factors, each (N, 1).

    The factors' product may overflow. A row is first divided by its largest magnitude, so that no
    square over- or underflows. A zero row stays zero, and has an infinite norm: what is divided by
    it vanishes.
    """
    largest = torch.linalg.vector_norm(z.detach(), torch.inf, dim=1, keepdim=True)
    largest = largest.clamp_min(torch.finfo(z.dtype).tiny)
    scaled = z / largest
    norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    norm = norm.masked_fill(norm == 0, torch.inf)
    return scaled / norm, norm, largest


def through_unit_rows(grad_u: Tensor, u: Tensor, norm: Tensor, largest: Tensor) -> Tensor:
    """The gradient on z from the gradient on its unit rows u."""
    return (grad_u - (grad_u * u).sum(dim=1, keepdim=True) * u) / norm / largest
