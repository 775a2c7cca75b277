"""Block shapes of the in-batch kernels: by the card, a few per dtype and width.

`tests/kernels/triton/compiled.py` compiles each for every kind of card: none spills more than 128
bytes a thread, none takes more shared memory than it says here, and some fit on every card.
"""

import os
from functools import cache
from math import inf
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import Config

from cosloss.kernels.triton.card import Card

SMALLEST_BLOCK = 16 if triton.knobs.runtime.interpret else 64


class Shape(NamedTuple):
    """A program's tile, its warps and stages, and how it goes over D.

    kib: the shared memory that it takes at most, 1,024 bytes each, at the widest D of its row, by
        whichever Triton takes most.
    whole: whether the rows are held whole, or read in parts for every tile.
    any_kind: whether it is for a logsumexp and softplus too, which take more registers.
    polynomial: see `tile.exponentials`, of the forward kernel.
    """

    block: tuple[int, ...]
    warps: int
    stages: int
    kib: int
    whole: bool = True
    any_kind: bool = True
    polynomial: int = 0


# not offered to the tuner until it has been timed on a card, but for COSLOSS_ON_TRIAL=1: it has an
# eighth less for the special units to do, whose share of a forward tile binds at so small a D
ON_TRIAL = (Shape((128,), 8, 2, 68, polynomial=8),) if os.environ.get("COSLOSS_ON_TRIAL") else ()

# by the card's cores, an element's bytes, and the largest D; small batches take the first that fits
Table = dict[str, dict[int, dict[float, tuple[Shape, ...]]]]
FORWARD: Table = {
    "mma": {
        2: {
            128: (Shape((64,), 4, 2, 34), Shape((128,), 8, 2, 66)),
            256: (Shape((64,), 4, 2, 66), Shape((64,), 8, 2, 66)),
            inf: (Shape((64,), 4, 3, 33, False), Shape((128,), 8, 3, 65, False)),
        },
        4: {inf: (Shape((64,), 8, 2, 33, False),)},
    },
    "wgmma": {
        2: {
            64: (Shape((64,), 4, 2, 34), Shape((128,), 8, 2, 68), *ON_TRIAL),
            256: (Shape((64,), 4, 2, 98), Shape((128,), 8, 2, 196)),
            inf: (Shape((64,), 4, 3, 49, False), Shape((128,), 8, 3, 97, False)),
        },
        4: {
            64: (Shape((64,), 4, 2, 80), Shape((64,), 8, 2, 80)),
            128: (Shape((64,), 4, 2, 41, False), Shape((64,), 8, 2, 41, False)),
            inf: (Shape((64,), 4, 3, 57, False), Shape((64,), 8, 3, 57, False)),
        },
    },
    "tcgen05": {
        2: {
            128: (Shape((64,), 4, 2, 50), Shape((64,), 8, 2, 50)),
            256: (Shape((64,), 8, 2, 98),),
            inf: (Shape((64,), 4, 3, 49, False), Shape((64,), 8, 3, 49, False)),
        },
        4: {inf: (Shape((64,), 4, 2, 48, False), Shape((64,), 8, 2, 48, False))},
    },
    "interpreter": {
        2: {256: (Shape((16,), 4, 1, 0),), inf: (Shape((16,), 4, 1, 0, False),)},
        4: {128: (Shape((16,), 4, 1, 0),), inf: (Shape((16,), 4, 1, 0, False),)},
    },
}
BACKWARD: Table = {
    "mma": {
        2: {
            128: (Shape((64, 64), 4, 3, 61), Shape((128, 32), 8, 3, 65)),
            256: (Shape((64, 32), 8, 3, 71), Shape((64, 64), 8, 2, 96)),
            512: (
                Shape((32, 32), 4, 2, 96),
                Shape((64, 32), 8, 3, 57, False),
                Shape((64, 32), 8, 3, 135, any_kind=False),
            ),
            inf: (Shape((64, 32), 8, 3, 57, False),),
        },
        4: {
            64: (Shape((32, 32), 4, 2, 26), Shape((64, 32), 8, 2, 42)),
            inf: (Shape((64, 32), 8, 2, 33, False),),
        },
    },
    "wgmma": {
        2: {
            64: (
                Shape((64, 64), 4, 3, 37),
                Shape((64, 128), 4, 2, 45, any_kind=False),
                Shape((128, 128), 8, 2, 53),
            ),
            128: (
                Shape((64, 64), 4, 3, 69),
                Shape((64, 128), 4, 2, 85, any_kind=False),
                Shape((128, 128), 8, 2, 101, any_kind=False),
            ),
            256: (Shape((64, 64), 4, 2, 99, any_kind=False), Shape((64, 64), 8, 2, 107)),
            inf: (Shape((64, 64), 8, 2, 128, False), Shape((64, 32), 8, 3, 128, False)),
        },
        4: {
            64: (Shape((64, 32), 4, 2, 58), Shape((128, 32), 8, 2, 90)),
            128: (Shape((64, 32), 4, 2, 33, False), Shape((128, 32), 8, 2, 65, False)),
            inf: (
                Shape((64, 16), 8, 2, 64, False, any_kind=False),
                Shape((64, 16), 8, 1, 64, False),
            ),
        },
    },
    "tcgen05": {
        2: {
            128: (Shape((64, 64), 4, 3, 90), Shape((128, 64), 8, 3, 110)),
            256: (Shape((64, 32), 8, 2, 84), Shape((64, 64), 8, 2, 133)),
            inf: (Shape((64, 32), 8, 1, 45, False), Shape((64, 64), 8, 1, 81, False)),
        },
        4: {
            64: (Shape((64, 32), 4, 2, 58), Shape((128, 32), 8, 2, 90)),
            128: (Shape((64, 32), 4, 2, 33, False), Shape((128, 32), 8, 2, 65, False)),
            inf: (Shape((64, 32), 8, 2, 80, False),),
        },
    },
    "interpreter": {
        2: {512: (Shape((16, 16), 4, 1, 0),), inf: (Shape((16, 16), 4, 1, 0, False),)},
        4: {64: (Shape((16, 16), 4, 1, 0),), inf: (Shape((16, 16), 4, 1, 0, False),)},
    },
}
# by an element's bytes: the columns of rows in parts that a program reads at a time, and the widest
# part of a gradient that it adds up
PART = {2: 64, 4: 32}
WIDEST_GRADIENT = {2: 512, 4: 256}
# the widest rows whose gradient is taken on to their sources by the program that has it
REACHES = {2: 512, 4: 256}
FEW_REGISTERS = ("exp", "hinge")
BANDS_FROM = 512  # columns of half precision, from which a gradient is taken from bands


@cache
def forward_configs(d: int, size: int, card: Card) -> tuple[Config, ...]:
    """The configurations of `in_batch_fwd_kernel` that the card has shared memory for.

    d, size: the columns of rows, and the bytes of an element.
    """
    width = _power_of_2(d)
    return tuple(
        _config(
            shape,
            BLOCK=shape.block[0],
            BLOCK_D=width if shape.whole else PART[size],
            **({"POLYNOMIAL": shape.polynomial} if shape.polynomial else {}),
        )
        for shape in fitting(FORWARD, d, size, card)
    )


@cache
def backward_configs(d: int, size: int, card: Card, kind: str) -> tuple[Config, ...]:
    """The configurations of `in_batch_bwd_kernel` for a criterion's kind, likewise."""
    width = gradient_width(d, size)
    return tuple(
        _config(
            shape,
            BLOCK_M=shape.block[0],
            BLOCK_N=shape.block[1],
            BLOCK_D=width,
            BLOCK_K=PART[size],
        )
        for shape in fitting(BACKWARD, d, size, card)
        if shape.any_kind or kind in FEW_REGISTERS
    )


def gradient_width(d: int, size: int) -> int:
    """The columns of the gradient that a program adds up."""
    return min(_power_of_2(d), WIDEST_GRADIENT[size])


def reaches(rows: Tensor) -> bool:
    """Whether a program has all of its rows' gradient, and registers to take it to its sources."""
    return rows.shape[1] <= REACHES[rows.element_size()] and not in_bands(rows)


def in_bands(rows: Tensor) -> bool:
    """Whether a gradient on rows is a library's product of bands of d_logits.

    It is where the programs that own it would compute the logits twice and more, or have no room.
    """
    narrow = rows.dtype in (torch.bfloat16, torch.float16) and torch.version.hip is None
    return (
        narrow
        and rows.shape[1] >= BANDS_FROM
        # of which torch has none, unless cuBLAS is told to
        and not torch.are_deterministic_algorithms_enabled()
    )


def even(d: int, size: int) -> bool:
    """Whether d columns fill every block in which they are read, whichever shape that is."""
    return d == _power_of_2(d) and d >= PART[size] and d % gradient_width(d, size) == 0


def fitting(table: Table, d: int, size: int, card: Card) -> list[Shape]:
    """A table's shapes for rows of d columns that the card has shared memory for."""
    rows = table[card.cores][size]
    shapes = rows[min(largest for largest in rows if d <= largest)]
    return [shape for shape in shapes if shape.kib * 1024 <= card.shared]


def _power_of_2(d: int) -> int:
    return max(16, triton.next_power_of_2(d))  # a matrix product takes 16 at least


def _config(shape: Shape, **constants: int) -> Config:
    return Config(
        {**constants, "WHOLE": shape.whole}, num_warps=shape.warps, num_stages=shape.stages
    )
