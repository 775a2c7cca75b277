"""Row-wise cosine similarity of plain CPU tensors, in blocks whose temporaries stay in cache.

Most rows need no clamp and no more than their own precision. They take the direct formulas, whose
factors the forward pass leaves for the backward pass: with n = |x|, m = |y|,

    S = <x, y> / (n m),    grad_x = g (y / (n m) - x S / n^2),    grad_y likewise.

The others are done again. Float32 rows take the same formulas in float64, where S near +-1, at
which they cancel, leaves enough digits. What remains, rows that eps clamps, zeros, NaN and float64
rows of those kinds, takes the formulas for every case.
"""

from collections.abc import Iterable
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from cosloss.kernels.eager import cosine_similarity as every_case
from cosloss.kernels.eager.memory import empty_like

# Elements: two inputs and two results, 2 MiB each in float32, stay in a level 3 cache. Smaller
# blocks mean more parallel regions, and each one waits for its slowest thread.
BLOCK = 1 << 19
CAREFUL_BLOCK = 1 << 17  # its rows are gathered, and widened
PARALLEL = 0.99  # up to this |S| the direct formulas lose at most 3 bits of the gradient
NEAR_ONE = 0.9375  # up to this S, 1 - S loses at most 4 bits

Gradients = tuple[Tensor | None, Tensor | None]


def forward(
    x1: Tensor, x2: Tensor, eps: float, distance: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Similarities of the rows, or 1 less them; and what `backward` takes of the rows.

    That is the factors 1 / (n m), S / n^2 and S / m^2, (3, N), and the indices of the rows for
    whose gradient they are not good enough, if any.
    """
    rows1, rows2 = _rows(x1), _rows(x2)
    statistics = rows1.new_empty(3, rows1.shape[0])
    factors = torch.empty_like(statistics)
    norm1, norm2, similarity = statistics
    product = torch.empty_like(rows1[: _block_rows(rows1)])
    for block in _blocks(rows1, rows2, norm1, norm2, similarity, factors[0]):
        _direct(product, *block)
    torch.div(similarity, statistics[:2].square(), out=factors[1:])
    careful = again = _careful(statistics, -PARALLEL, PARALLEL, eps)
    if distance:
        again = _careful(statistics, -2, NEAR_ONE, eps)
    value = 1 - similarity if distance else similarity.clone()
    for part in _parts(again, rows1):
        value[part] = _value_again(rows1[part], rows2[part], eps, distance)
    return value.view(x1.shape[:-1]), factors, careful


def backward(
    grad: Tensor,
    x1: Tensor,
    x2: Tensor,
    factors: Tensor,
    careful: Tensor | None,
    eps: float,
    needs: tuple[bool, ...],
) -> Gradients:
    """Gradients on x1 and x2 from the gradient on the similarity, each only where needed."""
    rows1, rows2, grad = _rows(x1), _rows(x2), grad.reshape(-1)
    grad1 = empty_like(rows1) if needs[0] else None
    grad2 = empty_like(rows2) if needs[1] else None
    slopes = (factors * grad).unsqueeze(2)
    for block1, block2, a, b1, b2, out1, out2 in _blocks(rows1, rows2, *slopes, grad1, grad2):
        _combine(block2, a, block1, b1, out1)
        _combine(block1, a, block2, b2, out2)
    for part in _parts(_with_extreme(grad, careful), rows1):
        again = _gradients_again(grad[part], rows1[part], rows2[part], eps, needs)
        _replace((grad1, grad2), part, again)
    return (
        None if grad1 is None else grad1.view(x1.shape),
        None if grad2 is None else grad2.view(x2.shape),
    )


def _direct(
    product: Tensor,
    x1: Tensor,
    x2: Tensor,
    norm1: Tensor,
    norm2: Tensor,
    similarity: Tensor,
    inverse: Tensor,
) -> None:
    """Write norms, similarities and 1 / (n m) of a block; product is scratch memory."""
    torch.linalg.vector_norm(x1, dim=1, out=norm1)
    torch.linalg.vector_norm(x2, dim=1, out=norm2)
    torch.mul(norm1, norm2, out=inverse).reciprocal_()
    torch.sum(torch.mul(x1, x2, out=product[: x1.shape[0]]), 1, out=similarity)
    similarity.mul_(inverse)


def _combine(x: Tensor, a: Tensor, y: Tensor, b: Tensor, out: Tensor | None) -> None:
    """out = a x - b y, if it is asked for."""
    if out is not None:
        torch.mul(x, a, out=out).addcmul_(y, b, value=-1)


def _careful(statistics: Tensor, low: float, high: float, eps: float) -> Tensor | None:
    """The indices of the rows for which the direct formulas are not good enough, if any."""
    # products of two norms stay in the dtype's range
    tiny = torch.finfo(statistics.dtype).tiny
    smallest, largest = max(tiny**0.25, 1.00001 * eps), tiny**-0.25
    least, most = statistics.amin(1).tolist(), statistics.amax(1).tolist()
    if (
        smallest <= min(least[:2])  # each False where there is a NaN
        and max(most[:2]) <= largest
        and low <= least[2]
        and most[2] <= high
    ):
        return None
    norms, similarity = statistics[:2], statistics[2]
    direct = ((norms >= smallest) & (norms <= largest)).all(0)
    direct &= (similarity >= low) & (similarity <= high)
    return direct.logical_not_().nonzero().squeeze(1)


def _with_extreme(grad: Tensor, careful: Tensor | None) -> Tensor | None:
    """The careful rows, and those whose gradient leaves the dtype's range on its way."""
    tiny = torch.finfo(grad.dtype).tiny
    size = grad.abs()
    least, most = size.aminmax()
    if tiny**0.5 <= least.item() and most.item() <= tiny**-0.5:
        return careful
    direct = (size == 0) | ((size >= tiny**0.5) & (size <= tiny**-0.5))
    if careful is not None:
        direct[careful] = False
    return direct.logical_not_().nonzero().squeeze(1)


def _parts(rows: Tensor | None, like: Tensor) -> tuple[Tensor, ...]:
    if rows is None or rows.numel() == 0:
        return ()
    return rows.split(max(1, CAREFUL_BLOCK // like.shape[1]))


def _replace(wholes: Gradients, part: Tensor, by: Gradients) -> None:
    for whole, rows in zip(wholes, by, strict=True):
        if whole is not None and rows is not None:
            whole[part] = rows


def _value_again(x1: Tensor, x2: Tensor, eps: float, distance: bool) -> Tensor:
    formula = every_case.distance_forward if distance else every_case.forward
    if x1.dtype != torch.float32:
        return formula(x1, x2, eps)
    wide1, wide2 = x1.double(), x2.double()
    statistics, _ = _wide_direct(wide1, wide2)
    if distance:
        apart = wide1.div_(statistics[0, :, None]).sub_(wide2.div_(statistics[1, :, None]))
        value = (apart.square_().sum(1) / 2).float()
    else:
        value = statistics[2].float().clamp_(-1, 1)
    for part in _parts(_careful(statistics, -2, 2, eps), x1):
        value[part] = formula(x1[part], x2[part], eps)
    return value


def _gradients_again(
    grad: Tensor, x1: Tensor, x2: Tensor, eps: float, needs: tuple[bool, ...]
) -> Gradients:
    if x1.dtype != torch.float32:
        return every_case.backward(grad, x1, x2, eps, needs)
    wide1, wide2 = x1.double(), x2.double()
    statistics, factors = _wide_direct(wide1, wide2)
    a, b1, b2 = (factors * grad).unsqueeze(2)
    found = (
        (wide2 * a).addcmul_(wide1, b1, value=-1).float() if needs[0] else None,
        (wide1 * a).addcmul_(wide2, b2, value=-1).float() if needs[1] else None,
    )
    for part in _parts(_careful(statistics, -2, 2, eps), x1):
        _replace(found, part, every_case.backward(grad[part], x1[part], x2[part], eps, needs))
    return found


def _wide_direct(x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    statistics = x1.new_empty(3, x1.shape[0])
    factors = torch.empty_like(statistics)
    norm1, norm2, similarity = statistics
    _direct(torch.empty_like(x1), x1, x2, norm1, norm2, similarity, factors[0])
    torch.div(similarity, statistics[:2].square(), out=factors[1:])
    return statistics, factors


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _block_rows(rows: Tensor) -> int:
    return max(1, BLOCK // rows.shape[1])


def _blocks(rows: Tensor, *others: Tensor | None) -> Iterable[tuple[Any, ...]]:
    """Blocks of all the tensors' rows, side by side; None stays None."""
    size = _block_rows(rows)
    if rows.shape[0] <= size:
        return [(rows, *others)]
    other_blocks = (repeat(None) if x is None else x.split(size) for x in others)
    return zip(rows.split(size), *other_blocks, strict=False)
