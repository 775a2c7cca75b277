"""Row-wise similarity of plain numbers: a few numbers per row, in blocks that stay in the cache.

With a = <x, x>, b = <y, y>, c = <x, y> in float64 and n_x^2 = max(a, eps^2), n_y^2 = max(b, eps^2),

    S = c / sqrt(n_x^2 n_y^2),    grad_x = grad (y / sqrt(n_x^2 n_y^2) - [|x| > eps] S x / n_x^2).

Nothing here is differentiated: what torch is to see the operations of goes through `clamped_rows`,
and so does float64 whose squares leave its range.

Shapes: x1, x2 (..., D); similarity and its gradient (...); statistics (3, N) in float64: a, b, S.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from cosloss.kernels.scratch import empty, workspace

BLOCK = 1 << 15  # elements per thread; in float64 three of them fit a core's cache
SHORT = 32  # shorter rows are laid out across, or torch would sum a few numbers at a time
SMALLEST = 1e-150  # a zero row's squared norm, below any other's: what is divided by it is 0
RANGE = 1e-140, 1e140  # of float64 rows' squares, whose products are taken


def forward(x1: Tensor, x2: Tensor, eps: float, distance: bool) -> tuple[Tensor, Tensor] | None:
    """The similarities, or 1 less them, and the rows' statistics for `backward`.

    None where squares leave float64's range.
    """
    rows1, rows2 = _rows(x1), _rows(x2)
    statistics = rows1.new_empty((3, rows1.shape[0]), dtype=torch.float64)
    squares, similarity = statistics[:2], statistics[2]
    value = torch.empty_like(similarity) if distance else similarity
    for part, x, y, room in _blocks(rows1, rows2):
        for a, b, found in ((x, x, squares[0]), (y, y, squares[1]), (x, y, similarity)):
            torch.sum(torch.mul(a, b, out=room), 1, out=found[part])
        if distance:
            _distance(x, y, squares[:, part], eps, room, value[part])
    if x1.dtype == torch.float64 and not _in_range(squares, rows1, rows2):
        return None
    norms = _squared_norms(squares, eps)
    similarity.div_((norms[0] * norms[1]).sqrt_()).clamp_(-1, 1)
    return value.to(x1.dtype, copy=True).view(x1.shape[:-1]), statistics


def backward(
    grad: Tensor,
    x1: Tensor,
    x2: Tensor,
    statistics: Tensor,
    eps: float,
    sign: int,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients on x1 and x2 from `sign` times that on the similarity, each only where needed."""
    grad1 = empty(x1.shape, x1) if needs[0] else None
    grad2 = empty(x2.shape, x2) if needs[1] else None
    squares, similarity = statistics[:2], statistics[2]
    norms = _squared_norms(squares, eps)
    grad = sign * grad.reshape(-1).double()
    # a row below eps has a constant norm, and a zero row no gradient
    along = (grad * similarity / norms).masked_fill_(squares <= eps * eps, 0)
    across = (grad / (norms[0] * norms[1]).sqrt_()).masked_fill(squares == 0, 0)
    along, across = along.unsqueeze(2), across.unsqueeze(2)
    for part, x, y, room in _blocks(_rows(x1), _rows(x2)):
        for found, own, other, i in ((grad1, x, y, 0), (grad2, y, x, 1)):
            if found is not None:
                torch.mul(other, across[i, part], out=room)
                _rows(found)[part] = room.addcmul_(own, along[i, part], value=-1)
    return grad1, grad2


def _rows(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _blocks(rows1: Tensor, rows2: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Which rows, those of both in float64, and room for as many; on an accelerator, all rows."""
    n, d = rows1.shape
    count = max(1, BLOCK * torch.get_num_threads() // max(1, d)) if rows1.is_cpu else n
    across = d < SHORT < n
    if n <= count and not across:
        x, y = rows1.double(), rows2.double()
        yield slice(0, n), x, y, torch.empty_like(x, memory_format=torch.contiguous_format)
        return
    like = rows1.new_empty(0, dtype=torch.float64)
    memory = workspace.scratch("row blocks", (3, min(n, count) * d), like)
    for start in range(0, n, count):
        part = slice(start, min(start + count, n))
        size = part.stop - start
        shape = (3, d, size) if across else (3, size, d)
        blocks = memory[:, : size * d].unflatten(1, shape[1:])
        x, y, room = blocks.mT if across else blocks
        yield part, x.copy_(rows1[part]), y.copy_(rows2[part]), room


def _in_range(squares: Tensor, *rows: Tensor) -> bool:
    """Whether no square of float64 rows has over- or underflowed; that of a zero row is 0."""
    good = (squares >= RANGE[0]) & (squares <= RANGE[1])
    if good.all():
        return True
    zero = squares == 0
    underflowed = any(bool(x[is_zero].any()) for x, is_zero in zip(rows, zero, strict=True))
    return bool((good | zero).all()) and not underflowed


def _squared_norms(squares: Tensor, eps: float) -> Tensor:
    return squares.clamp_min(max(eps * eps, SMALLEST))


def _distance(
    x: Tensor, y: Tensor, squares: Tensor, eps: float, room: Tensor, found: Tensor
) -> None:
    """1 - <u, v>, with a small relative error where it is small."""
    # (|u - v|^2 + (1 - |u|^2) + (1 - |v|^2)) / 2; the last two are 0 unless clamped
    norms = _squared_norms(squares, eps)
    inverse = norms.rsqrt().unsqueeze(2)
    torch.mul(x, inverse[0], out=room).addcmul_(y, inverse[1], value=-1)
    torch.sum(room.mul_(room), 1, out=found)
    found.add_((1 - squares / norms).sum(0)).div_(2)
