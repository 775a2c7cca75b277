"""Row-wise similarity of plain numbers: a few numbers per row, in blocks that stay in the cache.

With a = <x, x>, b = <y, y>, c = <x, y> in float64 and n_x^2 = max(a, eps^2), n_y^2 = max(b, eps^2),

    S = c / sqrt(n_x^2 n_y^2),    grad_x = grad (y / sqrt(n_x^2 n_y^2) - [|x| > eps] S x / a).

Nothing here is differentiated: what torch is to see the operations of goes through `clamped_rows`,
and so does float64 whose squares leave its range.

Shapes: x1, x2 (..., D); similarity and its gradient (...).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cosloss import modes
from cosloss.kernels.scratch import empty

BLOCK = 1 << 15  # elements; in float64 two blocks and what is between them fit a core's cache
SMALLEST = 1e-150  # a zero row's squared norm, below any other's: what is divided by it is 0
RANGE = 1e-140, 1e140  # of float64 rows' squares, whose products are taken

Index = tuple[Any, ...]


def suits(*tensors: Tensor) -> bool:
    """Whether these are plain numbers that nobody differentiates here."""
    # the range of float64 is looked at, and an accelerator would be waited for
    known = tensors[0].is_cpu or tensors[0].dtype != torch.float64
    return known and not torch.is_grad_enabled() and modes.plain(tensors)


def forward(x1: Tensor, x2: Tensor, eps: float, distance: bool) -> Tensor | None:
    """The similarities, or 1 less them; None where squares leave float64's range."""
    found = x1.new_empty(x1.shape[:-1])
    for index in _blocks(x1):
        x, y = x1[index].double(), x2[index].double()
        a, b, c = _products(x, y)
        if _out_of_range(x1, a, b):
            return None
        if distance:
            found[index] = _distance(x, y, a, b, eps)
        else:
            norms = (_squared_norms(a, eps) * _squared_norms(b, eps)).sqrt_()
            found[index] = c.div_(norms).clamp_(-1, 1)
    return found


def backward(
    grad: Tensor, x1: Tensor, x2: Tensor, eps: float, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None] | None:
    """Gradients on x1 and x2 from that on the similarity; None where squares leave the range."""
    grad1 = empty(x1.shape, x1) if needs[0] else None
    grad2 = empty(x2.shape, x2) if needs[1] else None
    for index in _blocks(x1):
        x, y = x1[index].double(), x2[index].double()
        a, b, c = _products(x, y)
        if _out_of_range(x1, a, b):
            return None
        norm1, norm2 = _squared_norms(a, eps), _squared_norms(b, eps)
        inner = grad[index] / (norm1 * norm2).sqrt_()
        along = c * inner
        for found, own, other, square, norm in (
            (grad1, x, y, a, norm1),
            (grad2, y, x, b, norm2),
        ):
            if found is not None:
                # a row below eps has a constant norm, and a zero row no gradient
                part = (along / norm).masked_fill_(square <= eps * eps, 0)
                across = inner.masked_fill(square == 0, 0)
                scaled = other * across[..., None]
                found[index] = scaled.addcmul_(own, part[..., None], value=-1)
    return grad1, grad2


def _blocks(x: Tensor) -> Iterator[Index]:
    """Indices that cut x's rows into blocks of about BLOCK elements; on an accelerator, of all."""
    if x.device.type != "cpu" or x.numel() <= BLOCK or x.ndim < 2:
        yield (...,)
        return
    inner = x.shape[1:].numel()
    if inner <= BLOCK or x.ndim == 2:
        step = max(1, BLOCK // inner)
        for start in range(0, x.shape[0], step):
            yield (slice(start, start + step),)
        return
    for i in range(x.shape[0]):
        for rest in _blocks(x[i]):
            yield i, *rest


def _products(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (x * x).sum(-1), (y * y).sum(-1), (x * y).sum(-1)


def _squared_norms(squares: Tensor, eps: float) -> Tensor:
    return squares.clamp_min(max(eps * eps, SMALLEST))


def _out_of_range(like: Tensor, *squares: Tensor) -> bool:
    """Whether float64 squares may have over- or underflowed; those of narrower rows cannot."""
    if like.dtype != torch.float64:
        return False
    lowest, highest = RANGE
    return not all(bool(((s >= lowest) & (s <= highest)).all()) for s in squares)


def _distance(x: Tensor, y: Tensor, a: Tensor, b: Tensor, eps: float) -> Tensor:
    """1 - <u, v>, with a small relative error where it is small."""
    # (|u - v|^2 + (1 - |u|^2) + (1 - |v|^2)) / 2; the last two are 0 unless clamped
    norm1, norm2 = _squared_norms(a, eps), _squared_norms(b, eps)
    u, v = x / norm1.sqrt()[..., None], y / norm2.sqrt()[..., None]
    return (u.sub_(v).square_().sum(-1) + (1 - a / norm1) + (1 - b / norm2)).div_(2)
