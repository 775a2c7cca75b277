"""Row-wise cosine similarity and its gradient, in one pass over the rows each.

Shapes: x1, x2 (..., D); similarity (...); statistics (N, 3) in float64.
"""

import torch
from torch import Tensor

from cosloss.kernels.native.library import function
from cosloss.kernels.scratch import empty


def forward(x1: Tensor, x2: Tensor, eps: float, distance: bool) -> tuple[Tensor, Tensor] | None:
    """Similarities of the rows, or 1 less them, and the rows' statistics for `backward`.

    None if the squares of float64 rows leave float64's range, or are not numbers.
    """
    rows1, rows2 = _rows(x1), _rows(x2)
    value = rows1.new_empty(x1.shape[:-1])
    statistics = rows1.new_empty((rows1.shape[0], 3), dtype=torch.float64)
    in_range = function("cosine_similarity_forward", x1.dtype)(
        *_pair(rows1, rows2), eps, distance, value.data_ptr(), statistics.data_ptr()
    )
    return (value, statistics) if in_range else None


def backward(
    grad: Tensor,
    x1: Tensor,
    x2: Tensor,
    statistics: Tensor,
    eps: float,
    sign: int,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients on x1 and x2 from `sign` times the gradient on S, each only where needed."""
    grad, rows1, rows2 = grad.contiguous(), _rows(x1), _rows(x2)
    grad1 = empty(x1.shape, x1) if needs[0] else None
    grad2 = empty(x2.shape, x2) if needs[1] else None
    function("cosine_similarity_backward", x1.dtype)(
        grad.data_ptr(),
        *_pair(rows1, rows2),
        eps,
        sign,
        statistics.data_ptr(),
        None if grad1 is None else grad1.data_ptr(),
        None if grad2 is None else grad2.data_ptr(),
    )
    return grad1, grad2


def _rows(x: Tensor) -> Tensor:
    """(N, D), each row's elements side by side."""
    rows = x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _pair(rows1: Tensor, rows2: Tensor) -> tuple[int, ...]:
    return (
        rows1.data_ptr(),
        rows1.stride(0),
        rows2.data_ptr(),
        rows2.stride(0),
        *rows1.shape,
    )
