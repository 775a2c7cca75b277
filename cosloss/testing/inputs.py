"""Pairs of row tensors, (N, D) in float64, at generic points and at hard ones.

The in-batch losses take them as two views, the row-wise ones as pairs of rows.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def generic_pair(rows: int = 6, columns: int = 9, seed: int = 0) -> Pair:
    """Two correlated Gaussian tensors: similarities are near 0.5, none 0 or +-1."""
    generator = torch.Generator("cpu").manual_seed(seed)
    shared, a, b = torch.randn(
        3, rows, columns, dtype=torch.float64, generator=generator, device="cpu"
    )
    return shared + a, 0.7 * (shared + b)


def hard_pairs(dtype: torch.dtype) -> Iterator[tuple[str, Pair]]:
    """Named pairs that break careless code: singular rows, odd shapes, extreme norms."""
    a, b = generic_pair()
    yield "zero row", (_with_row(a, 1, 0 * a[1]), b)
    yield "two zero rows", (_with_row(a, 1, 0 * a[1]), _with_row(b, 1, 0 * b[1]))
    yield "parallel row", (a, _with_row(b, 2, 2 * a[2]))
    yield "antiparallel row", (a, _with_row(b, 2, -2 * a[2]))
    yield "orthogonal row", (_with_row(a, 2, _quarter_turn(b[2])), b)
    yield "near-parallel row", (a, _with_row(b, 2, a[2] + 1e-4 * b[2]))
    yield "equal views", (a, a.clone())
    yield "duplicates", (a[[0, 0, 0, 3, 3, 5]], b[[1, 1, 2, 2, 2, 2]])
    yield "one row", generic_pair(rows=1)
    yield "one column", generic_pair(columns=1)
    yield "odd size", generic_pair(rows=5, columns=129)
    yield "long rows", generic_pair(rows=3, columns=4099)
    yield "one large entry", (_with_row(a, 4, torch.cat([a[4, :-1], 1e3 * a[4, -1:]])), b)
    limits = torch.finfo(dtype)
    large, small = limits.max / 64, limits.smallest_normal * limits.eps * 64
    for name, scale1, scale2 in (
        ("large norms", large, large),
        ("small norms", small, small),
        ("large and small norms", large, small),
        ("small and large norms", small, large),
    ):
        yield name, (a * scale1, b * scale2)
    mixed = torch.logspace(-1, 1, 6, dtype=torch.float64, device="cpu")[:, None]
    exponent = math.log10(large) - 1
    yield "every scale in one batch", (a * mixed**exponent, b * mixed.flip(0) ** exponent)


def layouts() -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Named views of a tensor: the same numbers at unusual strides."""
    yield "transposed", lambda x: x.mT.contiguous().mT
    yield "every second column", lambda x: x.repeat_interleave(2, -1)[..., ::2]
    yield "offset", lambda x: torch.cat([x[..., :1], x], -1)[..., 1:]


def _with_row(x: Tensor, row: int, value: Tensor) -> Tensor:
    return x.index_copy(0, torch.tensor([row], device=x.device), value[None])


def _quarter_turn(x: Tensor) -> Tensor:
    # exactly orthogonal to x in every dtype
    turned = torch.zeros_like(x)
    turned[:-1:2], turned[1::2] = -x[1::2], x[:-1:2]
    return turned
