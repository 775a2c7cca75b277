"""The card that a kernel runs on: what of it decides how the kernel's programs are laid out."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class Card(NamedTuple):
    """A kind of GPU.

    cores: what its matrices are multiplied by: Blackwell's "tcgen05" and Hopper's "wgmma", which
        take operands from shared memory, or "mma", by which all others do from registers.
    shared: the bytes of shared memory that a program may have.
    processors: its multiprocessors: so many programs run at once.
    """

    name: str
    cores: str
    shared: int
    processors: int


CORES = {9: "wgmma", 10: "tcgen05"}  # by the major number of NVIDIA's compute capability
INTERPRETER = Card("Triton's interpreter", "interpreter", 0, 3)  # computes a CPU's tensors


def card_of(like: Tensor) -> Card:
    """The card that a tensor lies on."""
    return _card(like.device) if like.is_cuda else INTERPRETER


@cache
def _card(device: torch.device) -> Card:
    found = torch.cuda.get_device_properties(device)
    nvidia = torch.version.hip is None
    shared = found.shared_memory_per_block
    if nvidia:  # more, on request: a property that torch's type stubs know since 2.15
        shared = getattr(found, "shared_memory_per_block_optin", shared)
    return Card(
        found.name,
        CORES.get(found.major, "mma") if nvidia else "mma",
        shared,
        found.multi_processor_count,
    )
