"""Row-wise cosine similarity of plain CPU tensors, in blocks whose temporaries stay in cache.

Most rows need neither float64 nor a clamp. They take the direct formulas, with n = |x|, m = |y|:

    S = <x, y> / (n m),    grad_x = (g / (n m)) y - (g S / n^2) x.

The others are done again by the formulas for every case: rows whose squares leave the dtype's
range, rows that eps clamps, NaN, and S near +-1, where the direct formulas cancel.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cosloss.kernels.eager.memory import empty_like

# Elements: two inputs and a product, 8 MiB each in float32, stay in a level 3 cache. Smaller blocks
# mean more parallel regions, and each one waits for its slowest thread on a busy machine.
BLOCK = 1 << 21
PARALLEL = 0.99  # up to this |S| the direct formulas lose at most 3 bits of the gradient
NEAR_ONE = 0.9375  # up to this S, 1 - S loses at most 4 bits

Gradients = tuple[Tensor | None, Tensor | None]


def usable(*tensors: Tensor) -> bool:
    """Whether these are plain tensors in memory, whose values may steer the computation."""
    return (
        not torch.is_grad_enabled()
        and forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
        and all(map(_plain, tensors))
    )


def similarity(x1: Tensor, x2: Tensor, eps: float, redo: Callable[..., Tensor]) -> Tensor:
    """Similarities of the rows; `redo(x1, x2, eps)` gives those of the rows that need care."""
    rows1, rows2 = _rows(x1), _rows(x2)
    result = rows1.new_empty(rows1.shape[0])
    product = torch.empty_like(rows1[: _block_rows(rows1)])
    for block in _blocks(rows1):
        b1, b2, out = rows1[block], rows2[block], result[block]
        norms = _direct(b1, b2, product[: b1.shape[0]], out)
        careful = _careful(norms, out, (-PARALLEL, PARALLEL), eps)
        if careful is not None:
            out[careful] = redo(b1[careful], b2[careful], eps)
    return result.view(x1.shape[:-1])


def distance(x1: Tensor, x2: Tensor, eps: float, redo: Callable[..., Tensor]) -> Tensor:
    """1 - similarity of the rows; `redo(x1, x2, eps)` gives those of the rows that need care."""
    rows1, rows2 = _rows(x1), _rows(x2)
    result = rows1.new_empty(rows1.shape[0])
    product = torch.empty_like(rows1[: _block_rows(rows1)])
    for block in _blocks(rows1):
        b1, b2, out = rows1[block], rows2[block], result[block]
        norms = _direct(b1, b2, product[: b1.shape[0]], out)
        careful = _careful(norms, out, (-2, NEAR_ONE), eps)
        torch.sub(1, out, out=out)
        if careful is not None:
            out[careful] = redo(b1[careful], b2[careful], eps)
    return result.view(x1.shape[:-1])


def backward(
    grad: Tensor,
    x1: Tensor,
    x2: Tensor,
    eps: float,
    needs: tuple[bool, ...],
    redo: Callable[..., Gradients],
) -> Gradients:
    """Gradients on x1 and x2; `redo(grad, x1, x2, eps, needs)` gives those that need care."""
    rows1, rows2, grad = _rows(x1), _rows(x2), grad.reshape(-1)
    grad1 = empty_like(rows1) if needs[0] else None
    grad2 = empty_like(rows2) if needs[1] else None
    similarities = grad.new_empty(_block_rows(rows1))
    for block in _blocks(rows1):
        b1, b2, g = rows1[block], rows2[block], grad[block]
        outs = [None if whole is None else whole[block] for whole in (grad1, grad2)]
        scratch, *_ = (out for out in outs if out is not None)
        s = similarities[: g.shape[0]]
        # the gradient's own memory holds the product first: no memory beyond the gradients
        norms = _direct(b1, b2, scratch, s)
        across = (g / norms[0] / norms[1]).unsqueeze(1)
        along = ((g * s) / (norms * norms)).unsqueeze(2)
        for out, own, other, projection in zip(outs, (b1, b2), (b2, b1), along, strict=True):
            if out is not None:
                torch.mul(other, across, out=out).addcmul_(own, projection, value=-1)
        careful = _careful(norms, s, (-PARALLEL, PARALLEL), eps, g)
        if careful is not None:
            again = redo(g[careful], b1[careful], b2[careful], eps, needs)
            for out, rows in zip(outs, again, strict=True):
                if out is not None and rows is not None:
                    out[careful] = rows
    return (
        None if grad1 is None else grad1.view(x1.shape),
        None if grad2 is None else grad2.view(x2.shape),
    )


def _direct(x1: Tensor, x2: Tensor, product: Tensor, similarity: Tensor) -> Tensor:
    """Write the similarities, (N,), and return both norms, (2, N)."""
    norms = x1.new_empty(2, x1.shape[0])
    torch.linalg.vector_norm(x1, dim=1, out=norms[0])
    torch.linalg.vector_norm(x2, dim=1, out=norms[1])
    torch.sum(torch.mul(x1, x2, out=product), 1, out=similarity)
    similarity.div_(norms[0] * norms[1])
    return norms


def _careful(
    norms: Tensor,
    similarity: Tensor,
    bounds: tuple[float, float],
    eps: float,
    grad: Tensor | None = None,
) -> Tensor | None:
    """The indices of the rows for which the direct formulas are not good enough, if any."""
    # products of two norms, and of a gradient with two, stay in the dtype's range
    tiny = torch.finfo(norms.dtype).tiny
    smallest, largest = max(tiny**0.25, 1.00001 * eps), tiny**-0.25
    if (
        _within(norms, smallest, largest)
        and _within(similarity, *bounds)
        and (grad is None or _within(grad.abs(), tiny**0.5, tiny**-0.5))
    ):
        return None
    direct = ((norms >= smallest) & (norms <= largest)).all(0)
    direct &= (similarity >= bounds[0]) & (similarity <= bounds[1])
    if grad is not None:
        size = grad.abs()
        direct &= (size == 0) | ((size >= tiny**0.5) & (size <= tiny**-0.5))
    careful = direct.logical_not_().nonzero().squeeze(1)
    return careful if careful.numel() else None


def _within(x: Tensor, low: float, high: float) -> bool:
    least, most = x.aminmax()
    return low <= least.item() and most.item() <= high  # both False where there is a NaN


def _plain(x: Tensor) -> bool:
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        # a batched gradient's tensors say that they are on the CPU, and have no values of their own
        and torch._C._dispatch_keys(x).has(torch._C.DispatchKey.CPU)
        and x.dtype in (torch.float32, torch.float64)
        and x.numel() > 0
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def _rows(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1])


def _block_rows(rows: Tensor) -> int:
    return max(1, BLOCK // rows.shape[1])


def _blocks(rows: Tensor) -> Iterator[slice]:
    size = _block_rows(rows)
    return (slice(start, start + size) for start in range(0, rows.shape[0], size))
