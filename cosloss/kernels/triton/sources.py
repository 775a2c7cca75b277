"""The gradients on sources (`cosloss.kernels.inputs`), from those on the scaled rows."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from cosloss.kernels.inputs import Inputs, Source
from cosloss.kernels.triton.row_parts import (
    BLOCK,
    WARPS,
    along_rows,
    inverse_of,
    load_part,
    scale_of,
    store_part,
)
from cosloss.kernels.triton.tile import launch


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


ROWS_OF = tl.constexpr(Part._fields.index("rows"))


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


def part_of(source: Source, inputs: Inputs, grad: Tensor | None = None) -> Part:
    """A part with memory of its own; grad: (S, N, D)."""
    x, pair = along_rows(source.x), source.pair
    pair = None if pair is None or not inputs.pulls else along_rows(pair)
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
    return pulls, *scale_of(inputs.scale, like), inputs.factor


def _lacks(part: Part) -> list[bool]:
    return [x is None for x in part]


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
        pull *= inverse_of(tl.load(pair_norm + row, mask=inside, other=0), 1.0)
    for start in range(0, D, COLUMNS):
        own = load_part(x, start, inside, D, COLUMNS)
        square += tl.sum(own * own, 1)
        if grad is not None:
            inner += tl.sum(_summed(grad, splits, split, start, inside, D, COLUMNS) * own, 1)
        if pair is not None:
            product += tl.sum(load_part(pair, start, inside, D, COLUMNS) * own, 1)
    if along is not None:
        tl.store(along + row, inner * to_unit * scale, mask=inside)
    if pair is not None:
        inner += pull * product
    along_x = tl.where(zero, 0.0, inner / square)
    for start in range(0, D, COLUMNS):
        h = -along_x[:, None] * load_part(x, start, inside, D, COLUMNS)
        if grad is not None:
            h += _summed(grad, splits, split, start, inside, D, COLUMNS)
        if pair is not None:
            h += pull[:, None] * load_part(pair, start, inside, D, COLUMNS)
        found = tl.where(zero[:, None], 0.0, h * to_x[:, None])
        store_part(grad_x, start, found, inside, D, COLUMNS)


@triton.jit
def _factors(norm, row, inside, PAIRED: tl.constexpr, common, D):
    """Each row's in float64: whether it is zero, those from x to u and from h to the gradient.

    Then the scale, and that from the pair's unit row to h, which is 1 where there is no pair.
    """
    pulls, scale, learnt_scale, factor = common
    if learnt_scale is not None:
        scale = tl.load(learnt_scale)
    length = tl.load(norm + row, mask=inside, other=0)
    to_unit = inverse_of(length, 1.0)
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
    total = load_part(grad, start, inside, D, COLUMNS)
    for _ in range(1, splits):
        grad += split
        total += load_part(grad, start, inside, D, COLUMNS)
    return total
