"""Memory of the CPU: fresh for large results, and kept from step to step for scratch.

A gradient is written once, into memory the system has not backed yet. For two float32 gradients of
65536 x 128 the page faults take longer than the arithmetic; 2 MiB pages need 512 times fewer, and
memory that a step hands to the next one needs none.
"""

import ctypes
import math
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_HUGE_PAGE = 1 << 21
_MADV_HUGEPAGE = 14
LARGEST_SCRATCH = 16 * 2**20  # bytes; beyond, mapping the pages takes little of the step


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor with like's dtype, in huge pages where the system offers them."""
    result = like.new_empty(shape)
    if result.nbytes < _HUGE_PAGE or not result.is_cpu or _madvise is None:
        return result
    start = -(-result.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    size = (result.data_ptr() + result.nbytes - start) // _HUGE_PAGE * _HUGE_PAGE
    if size > 0:
        # advice only: where it is refused, the pages are small ones
        _madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_HUGEPAGE)
    return result


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
            with torch.inference_mode(False):  # training may write to what an evaluation made
                self._view = self._bytes(size).view(like.dtype).view(shape)
        return self._view

    def _bytes(self, size: int) -> Tensor:
        memory = self._memory
        if memory is None or not size <= memory.numel() <= 4 * size:
            self._memory = memory = None  # the old memory goes before the new comes
            self._memory = memory = empty((size,), torch.empty(0, dtype=torch.uint8, device="cpu"))
        return memory[:size]


def _system_madvise() -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    return ctypes.CDLL(None).madvise


_madvise = _system_madvise()
workspace = Workspace()


def release_memory() -> None:
    """Hand back the memory that this thread's losses keep from one step to the next.

    On a CPU that is up to 256 MiB of tiles, of the last loss alone, and at most 16 MiB for each of
    a few other uses. The compiled kernels' threads keep a tile each, which stays with them.

    Example:
        >>> release_memory()
    """
    workspace.release()
