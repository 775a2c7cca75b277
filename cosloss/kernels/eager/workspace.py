"""Memory that a step gives to the next one, so that the CPU's pages need no new mapping."""

import math
import threading
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from cosloss.kernels.eager.memory import empty

LARGEST_SCRATCH = 16 * 2**20  # bytes; beyond, mapping the pages takes little of the step


class Workspace(threading.local):
    """One thread's scratch buffers, each for one use within a call."""

    def __init__(self) -> None:
        self._buffers = defaultdict[str, _Buffer](_Buffer)

    def scratch(
        self, use: str, shape: Sequence[int], like: Tensor, largest: int | None = None
    ) -> Tensor:
        """Uninitialised memory of like's dtype and device, until it is asked for that use again.

        Beyond the largest number of bytes, LARGEST_SCRATCH by default, nothing is kept.
        """
        if math.prod(shape) * like.element_size() > (largest or LARGEST_SCRATCH):
            self.release(use)
            return empty(shape, like)
        return self._buffers[use].view(shape, like)

    def release(self, use: str | None = None) -> None:
        """Hand the memory of that use back, or all memory."""
        if use is None:
            self._buffers.clear()
        else:
            self._buffers.pop(use, None)


class _Buffer:
    """Memory that grows as needed, and shrinks where it is much more than is needed."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._view: Tensor | None = None
        self._key: object = None

    def view(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Uninitialised memory, the same from call to call; on an accelerator new memory."""
        if not like.is_cpu:  # its allocator keeps pages, and knows what each stream still uses
            return like.new_empty(shape)
        key = (*shape, like.dtype)
        if self._view is None or key != self._key:
            self._view, self._key = None, key
            size = math.prod(shape) * like.element_size()
            self._view = self._bytes(size).view(like.dtype).view(shape)
        return self._view

    def _bytes(self, size: int) -> Tensor:
        memory = self._memory
        if memory is None or not size <= memory.numel() <= 4 * size:
            self._memory = memory = None  # the old memory goes before the new comes
            self._memory = memory = _bytes(size)
        return memory[:size]


def _bytes(size: int) -> Tensor:
    """Uninitialised memory of the CPU, which training may write to after an evaluation made it."""
    with torch.inference_mode(False):
        return empty((size,), torch.empty(0, dtype=torch.uint8, device="cpu"))


workspace = Workspace()


def release_memory() -> None:
    """Hand back the memory that this thread's losses keep from one step to the next.

    On a CPU that is up to 256 MiB of tiles, of the last loss alone, and at most 16 MiB for each of
    a few other uses.

    Example:
        >>> release_memory()
    """
    workspace.release()
