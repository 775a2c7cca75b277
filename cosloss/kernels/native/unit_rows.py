"""Rows scaled to one length, the inner products of paired rows, and the gradient through both.

Shapes: x (N, D), of a first view or of two; r (N, D) or (2N, D), first view first. A row's norm is
max(|x|, eps) in float64; a zero row's is 0, and so are its r and its gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cosloss.kernels.native.library import function


def forward(
    views: Sequence[Tensor],
    eps: float = 0.0,
    scale: float | Tensor = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """r = scale x / norm of the views' rows, their norms, and <r_i, r_pair(i)> of two views' rows.

    dtype: r's, to which it is rounded; None for the views', widened.

    None if the squares of float64 rows leave float64's range, or are not numbers.
    """
    first, second = _adjacent(views)
    n, d = first.shape
    r = first.new_empty(len(views) * n, d)
    norm = r.new_empty(r.shape[0], dtype=torch.float64)
    products = None if second is None else r.new_empty(r.shape[0])
    in_range = function("unit_rows_forward", r.dtype)(
        *_strided(first, second), n, d, eps, float(scale), *_at(r, norm, products)
    )
    return (r if dtype is None else r.to(dtype), norm, products) if in_range else None


def backward(
    grads: Sequence[Tensor | None],
    grad_products: Tensor | None,
    views: Sequence[Tensor],
    norm: Tensor,
    needs: Sequence[bool],
    eps: float = 0.0,
    scale: float | Tensor = 1.0,
    along: Tensor | None = None,
) -> list[Tensor | None]:
    """The gradients on the views, where needed, from those on their rows of r and on the products.

    grads: one for each view, in its dtype, widened.
    along: (V N,) in float64, the inner product of each row of r with the gradient on it, for views
        that are some columns of the rows whose norms are given.
    """
    first, second = _adjacent(views)
    n, d = first.shape
    grad1, grad2 = grads[0], None if second is None else grads[1]
    found1 = first.new_empty(n, d) if needs[0] else None
    found2 = second.new_empty(n, d) if second is not None and needs[1] else None
    given = [None if x is None else x.contiguous() for x in (grad1, grad2, grad_products)]
    function("unit_rows_backward", first.dtype)(
        *_at(*given),
        *_strided(first, second),
        *_at(norm, None if along is None else along.contiguous()),
        n,
        d,
        eps,
        float(scale),
        *_at(found1, found2),
    )
    return [found1] if second is None else [found1, found2]


def ratio(norm: Tensor, longer: Tensor) -> Tensor:
    """The norms of prefixes of rows, over those of longer ones; 0 where one is zero."""
    return (norm / longer).masked_fill(norm == 0, 0)


def _adjacent(views: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """A first and a second view in at least float32, the numbers of a row one after the other."""
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in views]
    first, second = wide[0], wide[1] if len(wide) == 2 else None
    if first.stride(1) != 1:
        first = first.contiguous()
    if second is not None and second.stride(1) != 1:
        second = second.contiguous()
    return first, second


def _strided(first: Tensor, second: Tensor | None) -> tuple[int | None, ...]:
    """The address and the row stride of both views, null and 0 without a second."""
    if second is None:
        return first.data_ptr(), first.stride(0), None, 0
    return first.data_ptr(), first.stride(0), second.data_ptr(), second.stride(0)


def _at(*tensors: Tensor | None) -> list[int | None]:
    """The addresses of tensors, null for None."""
    return [None if x is None else x.data_ptr() for x in tensors]
