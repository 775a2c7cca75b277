"""Rows scaled to one length, the inner products of paired rows, and the gradient through both.

Shapes: x (N, D), of a first view or of two; r (N, D) or (2N, D), first view first. Arithmetic is in
at least float32. `forward` consists of operations that torch differentiates any number of times.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def forward(
    views: Sequence[Tensor], scale: float | Tensor = 1.0, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """r = scale x / |x| of the views' rows, their norms, and <r_i, r_pair(i)> of two views' rows.

    dtype: r's, to which it is rounded; None for the views', widened. The products are of the
        unrounded r. A norm is given as two factors, (V N, 2), whose product may overflow.
    """
    x = _joined(views)
    # divided by its largest magnitude first, no row has a square that over- or underflows
    largest = torch.linalg.vector_norm(x.detach(), torch.inf, dim=1, keepdim=True)
    largest = largest.clamp_min(torch.finfo(x.dtype).tiny)
    scaled = x / largest
    norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    # a zero row stays zero, and what is divided by its norm vanishes
    norm = norm.masked_fill(norm == 0, torch.inf)
    r = scaled / norm * scale
    products = (r * r.roll(views[0].shape[0], 0)).sum(1) if len(views) == 2 else None
    return r if dtype is None else r.to(dtype), torch.cat([norm, largest], 1), products


def backward(
    grads: Sequence[Tensor | None],
    grad_products: Tensor | None,
    views: Sequence[Tensor],
    norm: Tensor,
    needs: Sequence[bool],
    scale: float | Tensor = 1.0,
    along: Tensor | None = None,
) -> list[Tensor | None]:
    """The gradients on the views, where needed, from those on their rows of r and on the products.

    With h the gradient on a row of r, its share of the products' included, and u = x / |x|, it is
    scale (h - <h, u> u) / |x|.

    along: (V N,), <h, r> of whole rows, for views that are some of their columns.
    """
    x, (length, largest) = _joined(views), norm.split(1, 1)
    u = x / largest / length
    missing = torch.zeros_like(views[0])
    h = torch.cat([missing if grad is None else grad for grad in grads]).to(u.dtype)
    if grad_products is not None:
        n = views[0].shape[0]
        both = (grad_products + grad_products.roll(n, 0))[:, None].to(u.dtype)
        h = h + both * scale * u.roll(n, 0)
    inner = (h * u).sum(1, keepdim=True) if along is None else (along[:, None] / scale).to(u.dtype)
    found = scale * (h - inner * u) / length / largest
    return [g if need else None for g, need in zip(found.chunk(len(views)), needs, strict=True)]


def ratio(norm: Tensor, longer: Tensor) -> Tensor:
    """The norms of prefixes of rows, over those of longer ones; 0 where one is zero."""
    found = norm[:, 0] / longer[:, 0] * (norm[:, 1] / longer[:, 1])
    return found.masked_fill(norm[:, 0].isinf(), 0)


def _joined(views: Sequence[Tensor]) -> Tensor:
    x = torch.cat(list(views)) if len(views) == 2 else views[0]
    return x.to(torch.promote_types(x.dtype, torch.float32))
