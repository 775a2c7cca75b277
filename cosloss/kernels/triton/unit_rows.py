"""Rows scaled to one length, the inner products of paired rows, and the gradient through both.

Shapes: x (N, D), of a first view or of two; r (N, D) or (2N, D), first view first. A row's norm is
in float64, whose squares neither overflow nor vanish for any narrower number; a zero row's is 0,
and so are its r and its gradient.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosloss.kernels.inputs import Inputs, Source
from cosloss.kernels.triton.tile import launch

BLOCK = 2048  # elements of a program's block of each tensor: 8 for each of its threads
WARPS = 8


def forward(
    views: Sequence[Tensor], scale: float | Tensor = 1.0, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """r = scale x / |x| of the views' rows, their norms, and of two views <r_i, r_pair(i)>.

    dtype: r's, to which it is rounded; None for float32. The products are of the unrounded r.
    """
    n, d = views[0].shape
    r = views[0].new_empty(len(views) * n, d, dtype=dtype or torch.float32)
    norm = r.new_empty(r.shape[0], dtype=torch.float64)
    products = norm.new_empty(r.shape[0], dtype=torch.float32) if len(views) == 2 else None
    _launch_forward(views, r, norm, products, *_scale(scale, r))
    return r, norm, products


def backward(
    grads: Sequence[Tensor | None],
    grad_products: Tensor | None,
    views: Sequence[Tensor],
    norm: Tensor,
    needs: Sequence[bool],
    scale: float | Tensor = 1.0,
) -> list[Tensor | None]:
    """The gradients on the views, where needed, from those on their rows of r and on the products.

    grads: one for each view, of any dtype.
    """
    n = views[0].shape[0]
    norms = norm.split(n)
    sources = [Source(x, own, need) for x, own, need in zip(views, norms, needs, strict=True)]
    pulls: Sequence[Tensor] = ()
    if grad_products is not None:
        pulls = grad_products.split(n)
        pairs = zip(views[::-1], norms[::-1], strict=True)
        sources = [
            own._replace(pair=x, pair_norm=norm)
            for own, (x, norm) in zip(sources, pairs, strict=True)
        ]
    parts = [None if grad is None else grad[None] for grad in grads]
    inputs = Inputs(sources, (), (), scale, pulls, None, along=False, bias=False)
    return reach(parts, sources, inputs)[0]


def reach(
    grads: Sequence[Tensor | None], sources: Sequence[Source], inputs: Inputs
) -> tuple[list[Tensor | None], list[Tensor]]:
    """The gradients on sources where they are wanted, and <r, grad_r> of their rows if that is.

    grads: those on each source's rows of r, (S, N, D), S of which add up; None is 0.
    """
    parts = [
        part_of(source, inputs, grad) if source.wanted else None
        for source, grad in zip(sources, grads, strict=True)
    ]
    launches: list[list[Part]] = []
    for part in parts:
        if part is None:
            continue
        # one launch takes two that lack the same
        if launches and len(launches[-1]) == 1 and _lacks(launches[-1][0]) == _lacks(part):
            launches[-1].append(part)
        else:
            launches.append([part])
    for together in launches:
        like = together[0].x
        d = like.shape[1]
        columns = min(triton.next_power_of_2(d), BLOCK)
        counts = [part.rows for part in together]
        rows = min(BLOCK // columns, triton.next_power_of_2(max(counts)))
        launch(
            unit_rows_bwd_kernel,
            (sum(triton.cdiv(count, rows) for count in counts),),
            like,
            *as_two(together),
            *common_of(inputs, like),
            d,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=WARPS,
        )
    return found_in(parts)


class Part(NamedTuple):
    """A source as a kernel takes it, in this order, and where its results go.

    grad_x: the memory for its gradient. along: that for <r, grad_r> of its rows, if it is wanted.
    grad: that on its rows of r where it is in memory: `splits` that add up, `split` numbers apart.
    """

    x: Tensor
    stride: int
    norm: Tensor
    grad_x: Tensor
    along: Tensor | None
    rows: int
    pair: Tensor | None
    pair_stride: int
    pair_norm: Tensor | None
    grad: Tensor | None
    splits: int
    split: int


POWER = tl.constexpr(2.0**100)
PART = tl.constexpr(32)  # columns of a gradient in registers that are taken at once
ROWS_OF = tl.constexpr(Part._fields.index("rows"))


def part_of(source: Source, inputs: Inputs, grad: Tensor | None = None) -> Part:
    """A part with memory of its own; grad: (S, N, D)."""
    x, pair = _rows(source.x), source.pair
    pair = None if pair is None or not inputs.pulls else _rows(pair)
    splits = split = 0
    if grad is not None:
        grad = grad if grad[0].is_contiguous() else grad.contiguous()
        splits, split = grad.shape[0], grad.stride(0)
    return Part(
        x,
        x.stride(0),
        source.norm,
        x.new_empty(x.shape),
        source.norm.new_empty(x.shape[0]) if inputs.along else None,
        x.shape[0],
        pair,
        0 if pair is None else pair.stride(0),
        None if pair is None else source.pair_norm,
        grad,
        splits,
        split,
    )


def as_two(parts: Sequence[Part]) -> list[tuple[Any, ...]]:
    """Two parts at most as a kernel takes them: of one that there is not, everything is None."""
    return [*map(tuple, parts), *[(None,) * len(Part._fields)] * 2][:2]


def found_in(parts: Sequence[Part | None]) -> tuple[list[Tensor | None], list[Tensor]]:
    """The gradients of parts, None where there is none, and <r, grad_r> of their rows."""
    alongs = [part.along for part in parts if part is not None and part.along is not None]
    return [None if part is None else part.grad_x for part in parts], alongs


def common_of(inputs: Inputs, like: Tensor) -> tuple[Any, ...]:
    """What all sources' rows share, as a kernel takes it: pulls, scale and factor."""
    pulls = (*(pull.contiguous() for pull in inputs.pulls), None, None)[:2]
    return pulls, *_scale(inputs.scale, like), inputs.factor


def _lacks(part: Part) -> list[bool]:
    return [x is None for x in part]


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _scale(scale: float | Tensor, rows: Tensor) -> tuple[float, Tensor | None]:
    """A number as a kernel takes it: from the host, or where it lies on the rows' device."""
    if isinstance(scale, Tensor) and scale.device == rows.device:
        return 1.0, scale
    return float(scale), None


def _launch_forward(views: Sequence[Tensor], *arguments: object) -> None:
    n, d = views[0].shape
    views = [_rows(x) for x in views]
    first, second = (*((x, x.stride(0)) for x in views), (None, 0))[:2]
    columns = min(triton.next_power_of_2(d), BLOCK)
    rows = min(BLOCK // columns, triton.next_power_of_2(n))
    constants = {"ROWS": rows, "COLUMNS": columns, "num_warps": WARPS}
    grid = (triton.cdiv(n, rows),)
    launch(unit_rows_fwd_kernel, grid, views[0], *first, *second, *arguments, n, d, **constants)


@triton.jit
def unit_rows_fwd_kernel(
    x1,
    stride1,
    x2,
    stride2,
    r,
    norm,
    products,
    scale,
    learnt_scale,
    n,
    D,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    if learnt_scale is not None:
        scale = tl.load(learnt_scale)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < n
    x1 += row * stride1
    factor1 = _normalise(x1, r + row * D, norm + row, inside, scale, D, ROWS, COLUMNS)
    if x2 is not None:
        x2 += row * stride2
        second = n + row
        factor2 = _normalise(x2, r + second * D, norm + second, inside, scale, D, ROWS, COLUMNS)
        product = tl.zeros((ROWS,), tl.float64)
        for start in range(0, D, COLUMNS):
            x = _load(x1, start, inside, D, COLUMNS)
            product += tl.sum(x * _load(x2, start, inside, D, COLUMNS), 1)
        product *= factor1 * factor2
        tl.store(products + row, product.to(tl.float32), mask=inside)
        tl.store(products + second, product.to(tl.float32), mask=inside)


@triton.jit
def unit_rows_bwd_kernel(
    first,
    second,
    pulls,
    scale,
    learnt_scale,
    factor,
    D,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """first, second: each a `Part`; the second may be Nones. pulls to factor: `common_of`."""
    block = tl.program_id(0)
    common = pulls, scale, learnt_scale, factor
    if second[0] is None:
        _write_grads(first, block * ROWS + tl.arange(0, ROWS), common, D, COLUMNS)
    else:
        blocks = tl.cdiv(first[ROWS_OF], ROWS)
        if block < blocks:
            _write_grads(first, block * ROWS + tl.arange(0, ROWS), common, D, COLUMNS)
        else:
            row = (block - blocks) * ROWS + tl.arange(0, ROWS)
            _write_grads(second, row, common, D, COLUMNS)


@triton.jit
def _write_grads(part, row, common, D, COLUMNS: tl.constexpr):
    """Write the gradient on rows of a part's embeddings, and <r, grad_r> if asked for.

    (h - <h, x> x / <x, x>) factor scale / norm, with h = grad_r + pull pair scale / pair_norm.
    """
    x, stride, norm, grad_x, along, count, pair, pair_stride, pair_norm, grad, splits, split = part
    inside = row < count
    row = row.to(tl.int64)
    x += row * stride
    grad_x += row * D
    if grad is not None:
        grad += row * D
    if pair is not None:
        pair += row * pair_stride
    zero, to_unit, to_x, scale, pull = _factors(norm, row, inside, pair is not None, common, D)
    inner, product, square = (tl.zeros_like(to_x), tl.zeros_like(to_x), tl.zeros_like(to_x))
    if pair is not None:
        pull *= _factor(tl.load(pair_norm + row, mask=inside, other=0), 1.0)
    for start in range(0, D, COLUMNS):
        own = _load(x, start, inside, D, COLUMNS)
        square += tl.sum(own * own, 1)
        if grad is not None:
            inner += tl.sum(_summed(grad, splits, split, start, inside, D, COLUMNS) * own, 1)
        if pair is not None:
            product += tl.sum(_load(pair, start, inside, D, COLUMNS) * own, 1)
    if along is not None:
        tl.store(along + row, inner * to_unit * scale, mask=inside)
    if pair is not None:
        inner += pull * product
    along_x = tl.where(zero, 0.0, inner / square)
    for start in range(0, D, COLUMNS):
        h = -along_x[:, None] * _load(x, start, inside, D, COLUMNS)
        if grad is not None:
            h += _summed(grad, splits, split, start, inside, D, COLUMNS)
        if pair is not None:
            h += pull[:, None] * _load(pair, start, inside, D, COLUMNS)
        found = tl.where(zero[:, None], 0.0, h * to_x[:, None])
        _store(grad_x, start, found, inside, D, COLUMNS)


@triton.jit
def write_whole_grads(part, grad_r, row, common, D, COLUMNS: tl.constexpr):
    """The same where all columns of grad_r, float32, are at hand in registers.

    Which are short here: numbers are in float32, of unit rows, which neither overflow nor vanish,
    and rows are loaded again for each use.
    """
    x, stride, norm, grad_x, along, count, pair, pair_stride, pair_norm, _, _, _ = part
    pulls, scale, learnt_scale, factor = common
    if learnt_scale is not None:
        scale = tl.load(learnt_scale).to(tl.float32)
    inside = row < count
    row = row.to(tl.int64)
    x += row * stride
    near, power = _inverse(norm + row, inside)
    near_pair, power_pair = near, power
    if pair is not None:
        pair += row * pair_stride
        near_pair, power_pair = _inverse(pair_norm + row, inside)
        pull = tl.load(pulls[0] + row, mask=inside, other=0)
        if pulls[1] is not None:
            pull += tl.load(pulls[1] + row, mask=inside, other=0)
        near_pair *= pull.to(tl.float32) * scale
    parts = _columns(grad_r, COLUMNS)
    WIDTH: tl.constexpr = min(COLUMNS, PART)
    inner = tl.zeros(near.shape, tl.float64)
    of_own = tl.zeros(near.shape, tl.float64)
    for k in tl.static_range(COLUMNS // WIDTH):
        u = _unit(x, near, power, k * WIDTH, inside, D, WIDTH)
        h = parts[k]
        if along is not None:
            of_own += tl.sum((h * u).to(tl.float64), 1)
        if pair is not None:
            h += _unit(pair, near_pair, power_pair, k * WIDTH, inside, D, WIDTH)
        inner += tl.sum((h * u).to(tl.float64), 1)
        tl.debug_barrier()
    if along is not None:
        tl.store(along + row, of_own * scale, mask=inside)
    if factor is not None:
        scale *= tl.load(factor).to(tl.float32)
    # in one dimension nothing but rounding is left
    zero = (near == 0) | (D == 1)
    to_x = near * scale
    for k in tl.static_range(COLUMNS // WIDTH):
        h = parts[k] - inner.to(tl.float32)[:, None] * _unit(
            x, near, power, k * WIDTH, inside, D, WIDTH
        )
        if pair is not None:
            h += _unit(pair, near_pair, power_pair, k * WIDTH, inside, D, WIDTH)
        found = tl.where(zero[:, None], 0.0, h * to_x[:, None] * power[:, None])
        column = k * WIDTH + tl.arange(0, WIDTH)
        mask = inside[:, None] & (column < D)[None, :]
        tl.store((grad_x + row * D)[:, None] + column[None, :], found, mask=mask)
        tl.debug_barrier()


@triton.jit
def _columns(x, COLUMNS: tl.constexpr):
    """The columns of x in parts of PART, from left to right."""
    parts = (x,)
    for _ in tl.static_range(4):
        if len(parts) * PART < COLUMNS:
            parts = _in_halves(parts)
    return parts


@triton.jit
def _in_halves(parts):
    halves = ()
    for k in tl.static_range(len(parts)):
        halves = halves + _halves(parts[k])
    return halves


@triton.jit
def _halves(x):
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _unit(rows, near, power, start, inside, D, COLUMNS: tl.constexpr):
    """Columns from `start` of rows that begin at these pointers, scaled in float32."""
    column = start + tl.arange(0, COLUMNS)
    mask = inside[:, None] & (column < D)[None, :]
    x = tl.load(rows[:, None] + column[None, :], mask=mask, other=0).to(tl.float32)
    return x * power[:, None] * near[:, None]


@triton.jit
def _inverse(norm, inside):
    """1 / norm as two factors in float32, of which one is a power of 2, mostly 1; 0 of a zero row.

    norm: pointers to numbers of float64.
    """
    length = tl.load(norm, mask=inside, other=0)
    power = tl.where(length > 1e30, 1 / POWER, tl.where(length < 1e-30, POWER, 1.0))
    near = (length * power).to(tl.float32)
    inverse = 1 / near
    inverse = tl.fma(inverse, tl.fma(-near, inverse, 1.0), inverse)  # to its last digit
    return tl.where(near == 0, 0.0, inverse), power.to(tl.float32)


@triton.jit
def _factors(norm, row, inside, PAIRED: tl.constexpr, common, D):
    """Each row's in float64: whether it is zero, those from x to u and from h to the gradient.

    Then the scale, and that from the pair's unit row to h, which is 1 where there is no pair.
    """
    pulls, scale, learnt_scale, factor = common
    if learnt_scale is not None:
        scale = tl.load(learnt_scale)
    length = tl.load(norm + row, mask=inside, other=0)
    to_unit = _factor(length, 1.0)
    # in one dimension nothing but rounding is left
    to_x = tl.where(D == 1, 0.0, to_unit * scale)
    if factor is not None:
        to_x *= tl.load(factor).to(tl.float64)
    pull = tl.full(to_x.shape, 1.0, tl.float64)
    if PAIRED:
        pull = tl.load(pulls[0] + row, mask=inside, other=0).to(tl.float64)
        if pulls[1] is not None:
            pull += tl.load(pulls[1] + row, mask=inside, other=0)
        pull *= scale
    return length == 0, to_unit, to_x, scale, pull


@triton.jit
def _summed(grad, splits, split, start, inside, D, COLUMNS: tl.constexpr):
    """The sum of so many gradients, each `split` numbers after the one before."""
    total = _load(grad, start, inside, D, COLUMNS)
    for _ in range(1, splits):
        grad += split
        total += _load(grad, start, inside, D, COLUMNS)
    return total


@triton.jit
def _normalise(x, r, norm, inside, scale, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write rows of r and their norms from rows of x; all are pointers to where rows begin."""
    square = tl.zeros((ROWS,), tl.float64)
    for start in range(0, D, COLUMNS):
        part = _load(x, start, inside, D, COLUMNS)
        square += tl.sum(part * part, 1)
    length = tl.sqrt(square)
    tl.store(norm, length, mask=inside)
    factor = _factor(length, scale)
    for start in range(0, D, COLUMNS):
        part = _load(x, start, inside, D, COLUMNS)
        _store(r, start, part * factor[:, None], inside, D, COLUMNS)
    return factor


@triton.jit
def _factor(norm, scale):
    """The factor from a row of x to its row of r."""
    return tl.where(norm == 0, 0.0, scale / norm)


@triton.jit
def _load(rows, start, inside, D, COLUMNS: tl.constexpr):
    """COLUMNS columns from `start` of the rows that begin at these pointers, in float64."""
    column = start + tl.arange(0, COLUMNS)
    mask = inside[:, None] & (column < D)[None, :]
    values = tl.load(rows[:, None] + column[None, :], mask=mask, other=0)
    return values.to(tl.float32).to(tl.float64)


@triton.jit
def _store(rows, start, values, inside, D, COLUMNS: tl.constexpr):
    column = start + tl.arange(0, COLUMNS)
    mask = inside[:, None] & (column < D)[None, :]
    tl.store(rows[:, None] + column[None, :], values.to(tl.float32), mask=mask)
