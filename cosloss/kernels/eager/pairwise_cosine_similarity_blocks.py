"""Cosine similarity of all pairs of rows of plain CPU tensors, in their own precision.

For rows whose norms are beyond eps and whose squares stay in the dtype's range; a block of the
result is still in cache when it is clamped. Without x2 half of the products are mirrored.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cosloss.kernels.eager.memory import empty

BLOCK = 1 << 19  # elements of the result


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
    other = unit if rows2 is None else rows2.unit
    result = empty((unit.shape[0], other.shape[0]), unit)
    for block in _blocks(result):
        if rows2 is None:
            _mirror(unit, block, result)
        else:
            torch.mm(unit[block], other.T, out=result[block]).clamp_(-1, 1)
    return result


def backward(
    grad: Tensor, rows1: Rows, rows2: Rows | None, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients on x1 and x2 from the gradient on the similarities, where `needs` asks."""
    if rows2 is None:
        grad_unit = torch.empty_like(rows1.unit)
        for block in _blocks(grad):
            torch.mm(grad[block] + grad[:, block].T, rows1.unit, out=grad_unit[block])
        return _through(grad_unit, rows1), None
    return (
        _through(grad @ rows2.unit, rows1) if needs[0] else None,
        _through(grad.T @ rows1.unit, rows2) if needs[1] else None,
    )


def _mirror(unit: Tensor, block: slice, result: Tensor) -> None:
    start, stop = block.start, min(block.stop, unit.shape[0])
    upper = torch.mm(unit[block], unit[start:].T).clamp_(-1, 1)
    square = upper[:, : stop - start]
    # a matrix product need not sum (i, j) and (j, i) in the same order
    result[block, block] = (square + square.T).div_(2).fill_diagonal_(1)
    result[block, stop:] = upper[:, stop - start :]
    result[stop:, block] = upper[:, stop - start :].T


def _through(grad_unit: Tensor, rows: Rows) -> Tensor:
    along = (grad_unit * rows.unit).sum(1, keepdim=True)
    return grad_unit.addcmul_(rows.unit, along, value=-1).div_(rows.norm)


def _blocks(matrix: Tensor) -> Iterator[slice]:
    size = max(1, BLOCK // matrix.shape[1])
    return (slice(start, start + size) for start in range(0, matrix.shape[0], size))
