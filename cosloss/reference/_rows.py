"""Row normalisation and reduction that the twins share."""

import torch
from torch import Tensor


def unit_rows(z: Tensor) -> Tensor:
    """Rows of z, (N, D), scaled to unit norm at any non-zero scale; a zero row stays zero.

    A zero row's gradient is zero as well: the multiplication by `nonzero` cuts it.
    """
    largest = z.detach().abs().amax(dim=1, keepdim=True)
    scaled = z / torch.where(largest > 0, largest, 1)
    norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    nonzero = norm != 0
    return scaled / torch.where(nonzero, norm, 1) * nonzero


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """The loss itself ("none"), its sum, or its mean."""
    return loss if reduction == "none" else getattr(loss, reduction)()
