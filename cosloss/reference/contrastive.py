"""Twins of the in-batch contrastive losses."""

import torch
from torch import Tensor

from cosloss.reference._rows import reduce, unit_rows


def nt_xent_loss(
    z1: Tensor, z2: Tensor, temperature: float = 0.5, reduction: str = "mean"
) -> Tensor:
    """NT-Xent (Chen et al., 2020, Algorithm 1): cross entropy of row i's positive among 2N - 1."""
    n = z1.shape[0]
    u = unit_rows(torch.cat([z1, z2]))
    logits = u @ u.T / temperature
    row = torch.arange(2 * n, device=z1.device)
    logits = logits.masked_fill(row == row[:, None], -torch.inf)
    loss = logits.logsumexp(1) - logits[row, (row + n) % (2 * n)]
    return reduce(loss, reduction)
