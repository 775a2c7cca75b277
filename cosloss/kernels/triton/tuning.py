"""Block shapes of the in-batch kernels: a few per dtype and width, of which the fastest is kept.

The choice is made at the first use, once for small batches and once for large ones, and never for a
new batch size alone. `tests/kernels/triton/compiled.py` shows each entry's registers and memory.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from cosloss.kernels.triton.in_batch_bwd import in_batch_bwd_kernel
from cosloss.kernels.triton.in_batch_fwd import in_batch_fwd_kernel

LARGE = 8192  # rows from which a batch is tuned as a large one
INTERPRETED = triton.knobs.runtime.interpret
INTERPRETED_PROCESSORS = 3
SMALLEST_BLOCK = 16 if INTERPRETED else 64

Shapes = dict[int, dict[int, tuple[tuple[tuple[int, ...], int, int], ...]]]

# by an element's bytes and the largest BLOCK_D: block shape, warps, stages
FORWARD: Shapes = {
    2: {64: (((128,), 8, 3), ((64,), 4, 3)), 256: (((128,), 8, 2), ((64,), 4, 2))},
    4: {32: (((64,), 4, 3), ((64,), 8, 3)), 128: (((64,), 4, 2), ((64,), 8, 2))},
}
BACKWARD: Shapes = {
    2: {
        128: (((128, 64), 8, 3), ((64, 64), 4, 3)),
        256: (((128, 64), 8, 2), ((64, 64), 4, 2)),
        512: (((64, 64), 8, 2), ((64, 32), 8, 3)),
    },
    4: {128: (((64, 64), 8, 2), ((64, 32), 4, 2)), 256: (((64, 32), 8, 2),)},
}
# by an element's bytes: the widest rows that a program holds whole, the columns of wider rows that
# it holds at a time, and the widest part of a gradient that it accumulates
WHOLE_FORWARD, WHOLE_BACKWARD = {2: 256, 4: 128}, {2: 512, 4: 64}
PART = {2: 64, 4: 32}
WIDEST_GRADIENT = {2: 512, 4: 256}


def processors(like: Tensor) -> int:
    """The device's multiprocessors: so many programs run at once."""
    if not like.is_cuda:
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(like.device).multi_processor_count


def forward_width(d: int, size: int) -> tuple[int, bool]:
    """The columns, of d of `size` bytes, that a forward program holds at a time; whether all."""
    width = max(16, triton.next_power_of_2(d))
    return (width, True) if width <= WHOLE_FORWARD[size] else (PART[size], False)


def backward_width(d: int, size: int) -> tuple[int, bool]:
    """The columns of the gradient that a program accumulates; whether it holds its rows whole."""
    width = max(16, triton.next_power_of_2(d))
    return min(width, WIDEST_GRADIENT[size]), width <= WHOLE_BACKWARD[size]


@cache
def forward_tuner(size: int, width: int, large: bool) -> Any:
    """`in_batch_fwd_kernel` over its block shapes."""
    configs = _configs(FORWARD[size], width, ("BLOCK",))
    return triton.autotune(configs, ["KIND", "SYMMETRIC", "COLUMN_LOSSES"])(in_batch_fwd_kernel)


@cache
def backward_tuner(size: int, width: int, large: bool) -> Any:
    """`in_batch_bwd_kernel` over its block shapes."""
    configs = _configs(BACKWARD[size], width, ("BLOCK_M", "BLOCK_N"))
    return triton.autotune(configs, ["KIND", "WHOLE"])(in_batch_bwd_kernel)


def _configs(
    table: dict[int, tuple[Any, ...]], width: int, names: Sequence[str]
) -> list[triton.Config]:
    if INTERPRETED:
        return [triton.Config(dict.fromkeys(names, SMALLEST_BLOCK))]
    return [
        triton.Config(dict(zip(names, shape, strict=True)), num_warps=warps, num_stages=stages)
        for shape, warps, stages in table[min(largest for largest in table if width <= largest)]
    ]
