"""Rows scaled to one length, the inner products of paired rows, and the gradient through both.

Shapes: z (N, D) in float32, of the first view or of two; r (N, D) or (2N, D), first view first.
"""

import torch
from torch import Tensor

from cosloss.kernels.native.library import function


def forward(views: tuple[Tensor, ...], scale: float) -> tuple[Tensor, Tensor]:
    """r = scale z / |z| of the views' rows, and 1 / |z| in float64; a zero row has 0 for both."""
    n, d = views[0].shape
    r = views[0].new_empty(len(views) * n, d)
    inverse = torch.empty(len(views) * n, dtype=torch.float64)
    for start, z in zip(range(0, r.shape[0], max(n, 1)), views, strict=False):
        z = z if z.stride(1) == 1 else z.contiguous()
        function("unit_rows_forward", torch.float32)(
            z.data_ptr(), z.stride(0), n, d, scale, _row(r, start), _row(inverse, start)
        )
    return r, inverse


def products(r: Tensor) -> Tensor:
    """<r_i, r_i+N> of both views' rows, once for each of the 2N."""
    n = r.shape[0] // 2
    found = r.new_empty(2 * n)
    function("paired_products", torch.float32)(r.data_ptr(), n, r.shape[1], found.data_ptr())
    return found


def backward(
    grad_r: Tensor | None,
    grad_products: Tensor | None,
    r: Tensor,
    inverse: Tensor,
    scale: float,
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradient on each view, where needed, from those on r and on the pairs' products."""
    n, d = r.shape[0] // len(needs), r.shape[1]
    grad_r = None if grad_r is None else grad_r.contiguous()
    grad_products = None if grad_products is None else grad_products.contiguous()
    found = [r.new_empty(n, d) if need else None for need in needs]
    for view, grad_z in enumerate(found):
        if grad_z is not None:
            function("unit_rows_backward", torch.float32)(
                None if grad_r is None else grad_r.data_ptr(),
                None if grad_products is None else grad_products.data_ptr(),
                r.data_ptr(),
                inverse.data_ptr(),
                r.shape[0] // 2,
                view * n,
                n,
                d,
                scale,
                grad_z.data_ptr(),
            )
    return found


def _row(x: Tensor, index: int) -> int:
    return x.data_ptr() + index * x.stride(0) * x.element_size()
