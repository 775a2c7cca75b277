"""Memory that a training step gives to the next one, so that the CPU's pages need no new mapping.

A loss keeps its tiles here from its forward to its backward pass. A later forward pass takes the
memory over: the earlier loss finds its ticket void, and computes its tiles again. What is needed
within one call only is scratch memory.
"""

import math
import threading
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from cosloss.kernels.eager.memory import empty

LARGEST_SCRATCH = 16 * 2**20  # bytes; beyond, mapping the pages takes little of the step


class Workspace(threading.local):
    """One thread's buffer of tiles, with its present holder's ticket, and its scratch buffers."""

    def __init__(self) -> None:
        self._tiles = _Buffer()
        self._claimed: Tensor | None = None
        self._ticket: object = None
        self._scratch = defaultdict[str, _Buffer](_Buffer)

    def claim(self, elements: int, like: Tensor) -> tuple[Tensor, object]:
        """A flat buffer of like's dtype and device, and the ticket that is valid until the next."""
        self._claimed, self._ticket = None, object()
        self._claimed = self._tiles.view((elements,), like)
        return self._claimed, self._ticket

    def held(self) -> Tensor:
        """The buffer as its holder claimed it."""
        assert self._claimed is not None
        return self._claimed

    def holds(self, ticket: object) -> bool:
        """Whether the buffer still contains what the ticket's holder wrote."""
        return ticket is not None and ticket is self._ticket

    def release_tiles(self) -> None:
        """Hand the tiles' memory back."""
        self._tiles, self._claimed, self._ticket = _Buffer(), None, None

    def release(self) -> None:
        """Hand all memory back."""
        self.release_tiles()
        self._scratch.clear()

    def scratch(self, use: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Uninitialised memory of like's dtype and device, until it is asked for that use again."""
        if math.prod(shape) * like.element_size() > LARGEST_SCRATCH:
            self._scratch.pop(use, None)
            return empty(shape, like)
        return self._scratch[use].view(shape, like)


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
            self._memory = memory = empty((size,), torch.empty(0, dtype=torch.uint8))
        return memory[:size]


workspace = Workspace()


def release_memory() -> None:
    """Hand back the memory that this thread's losses keep from one step to the next.

    On a CPU that is up to 256 MiB of tiles, of the last loss alone, and scratch memory of at most
    16 MiB for each of a few uses. A loss whose backward pass is yet to come computes its tiles
    again.

    Example:
        >>> release_memory()
    """
    workspace.release()
