"""Cosine similarity of all pairs of rows of plain CPU tensors, in their own precision.

For rows whose norms are beyond eps and whose squares stay in the dtype's range. Without x2 the
result is symmetric: the tiles above its diagonal are mirrored, and their gradients' sum with those
below is what both halves of the rows' gradient need.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cosloss.kernels.eager.memory import empty

SIDE = 512  # of a symmetric matrix's tiles


class Rows(NamedTuple):
    """unit: (N, D), norm: (N, 1)."""

    unit: Tensor
    norm: Tensor


def rows(x: Tensor, eps: float) -> Rows | None:
    """The rows of x, (N, D), over their norms; None if one of them needs more care than that."""
    tiny = torch.finfo(x.dtype).tiny
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    least, most = norm.aminmax()
    if not (max(tiny**0.25, 1.00001 * eps) <= least.item() and most.item() <= tiny**-0.25):
        return None
    return Rows(x / norm, norm)


def forward(rows1: Rows, rows2: Rows | None) -> Tensor:
    """Similarities (N, M) in [-1, 1]; without rows2, symmetric with a unit diagonal."""
    unit = rows1.unit
    if rows2 is not None:
        result = empty((unit.shape[0], rows2.unit.shape[0]), unit)
        return torch.mm(unit, rows2.unit.T, out=result).clamp_(-1, 1)
    result = empty((unit.shape[0], unit.shape[0]), unit)
    for i, j in _triangle(unit.shape[0]):
        tile = torch.mm(unit[i], unit[j].T, out=result[i, j]).clamp_(-1, 1)
        if i == j:
            # a matrix product need not sum (i, j) and (j, i) in the same order
            result[i, i] = (tile + tile.T).div_(2).fill_diagonal_(1)
        else:
            result[j, i] = tile.T
    return result


def backward(
    grad: Tensor, rows1: Rows, rows2: Rows | None, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients on x1 and x2 from the gradient on the similarities, where `needs` asks."""
    if rows2 is not None:
        return (
            _through(grad @ rows2.unit, rows1) if needs[0] else None,
            _through(grad.T @ rows1.unit, rows2) if needs[1] else None,
        )
    unit = rows1.unit
    grad_unit = torch.zeros_like(unit)
    for i, j in _triangle(unit.shape[0]):
        both = grad[i, j] + grad[j, i].T
        grad_unit[i].addmm_(both, unit[j])
        if i != j:
            grad_unit[j].addmm_(both.T, unit[i])
    return _through(grad_unit, rows1), None


def _triangle(size: int) -> Iterator[tuple[slice, slice]]:
    """The tiles on and above the diagonal."""
    blocks = [slice(start, min(start + SIDE, size)) for start in range(0, size, SIDE)]
    return ((i, j) for k, i in enumerate(blocks) for j in blocks[k:])


def _through(grad_unit: Tensor, rows: Rows) -> Tensor:
    along = (grad_unit * rows.unit).sum(1, keepdim=True)
    return grad_unit.addcmul_(rows.unit, along, value=-1).div_(rows.norm)
