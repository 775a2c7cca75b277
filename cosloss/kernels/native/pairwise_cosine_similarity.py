"""Cosine similarity of all pairs of rows, with compiled kernels around torch's matrix products.

Shapes: x1 (N, D), x2 (M, D) or None for x1. Rows are normalised in float64; the products are in
float32, or in float64 for float64 rows. Without x2 the result is symmetric: only the products above
its diagonal are computed, and one product with the sum of a gradient and its transpose is enough.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cosloss.kernels.native import unit_rows
from cosloss.kernels.native.library import function
from cosloss.kernels.scratch import empty

BLOCK = 256  # rows of a symmetric matrix at once: their part of a product stays in the cache


class Rows(NamedTuple):
    """unit: (N, D). norm: (N,) in float64, max(|x|, eps), or 0 for a zero row."""

    unit: Tensor
    norm: Tensor


def forward(x1: Tensor, x2: Tensor | None, eps: float) -> tuple[Tensor, list[Rows]] | None:
    """Similarities (N, M) in [-1, 1], and the rows of x1, and of x2, for `backward`.

    None if the squares of float64 rows leave float64's range, or are not numbers.
    """
    rows = [_rows(x, eps) for x in (x1, x2) if x is not None]
    given = [found for found in rows if found is not None]
    if len(given) < len(rows):
        return None
    product = _symmetric(given[0], eps) if x2 is None else _product(*given)
    return product.to(x1.dtype), given


def backward(
    grad: Tensor, rows: list[Rows], eps: float, needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients on x1, and on x2, from the gradient on the similarities, where `needs` asks."""
    dtype = grad.dtype
    grad = grad.to(rows[0].unit.dtype)
    if len(rows) == 1:
        return [_through(_symmetric_gradient(grad.contiguous(), rows[0]), rows[0], eps).to(dtype)]
    sides = zip((grad, grad.T), rows, reversed(rows), needs, strict=False)
    return [
        _through(side @ other.unit, own, eps).to(dtype) if need else None
        for side, own, other, need in sides
    ]


def _rows(x: Tensor, eps: float) -> Rows | None:
    found = unit_rows.forward([x.detach().to(torch.promote_types(x.dtype, torch.float32))], eps)
    return None if found is None else Rows(*found[:2])


def _product(rows1: Rows, rows2: Rows) -> Tensor:
    result = empty((rows1.unit.shape[0], rows2.unit.shape[0]), rows1.unit)
    return torch.mm(rows1.unit, rows2.unit.T, out=result).clamp_(-1, 1)


def _symmetric(rows: Rows, eps: float) -> Tensor:
    unit, size = rows.unit, rows.unit.shape[0]
    result = empty((size, size), unit)
    mirror = function("pairwise_mirror", unit.dtype)
    for first, last in _blocks(size):
        torch.mm(unit[first:last], unit[first:].T, out=result[first:last, first:])
        mirror(result.data_ptr(), size, first, last, rows.norm.data_ptr(), eps)
    return result


def _symmetric_gradient(grad: Tensor, rows: Rows) -> Tensor:
    unit, size = rows.unit, rows.unit.shape[0]
    result = empty(unit.shape, unit)
    both = unit.new_empty(min(BLOCK, size), size)
    add_mirrored = function("pairwise_add_mirrored", unit.dtype)
    for first, last in _blocks(size):
        add_mirrored(grad.data_ptr(), size, first, last, both.data_ptr())
        torch.mm(both[: last - first], unit, out=result[first:last])
    return result


def _through(grad_unit: Tensor, rows: Rows, eps: float) -> Tensor:
    # unit rows serve as x: the gradient through a norm takes x's direction alone
    (found,) = unit_rows.backward([grad_unit], None, [rows.unit], rows.norm, [True], eps)
    assert found is not None
    return found


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + BLOCK, size)) for first in range(0, size, BLOCK))
