"""Memory that a training step gives to the next one, so that the CPU's pages need no new mapping.

A loss keeps its tiles here from its forward to its backward pass. A later forward pass takes the
memory over: the earlier loss finds its ticket void, and computes its tiles again.
"""

import threading

import torch
from torch import Tensor

from cosloss.kernels.eager.memory import empty


class Workspace(threading.local):
    """One buffer per thread and its present holder's ticket."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._claimed: Tensor | None = None
        self._ticket: object = None

    def claim(self, elements: int, like: Tensor) -> tuple[Tensor, object]:
        """A flat buffer of like's dtype and device, and the ticket that is valid until the next."""
        claimed, self._ticket = self._claimed, object()
        key = elements, like.dtype, like.device
        if claimed is None or key != (claimed.numel(), claimed.dtype, claimed.device):
            self._claimed = claimed = None
            claimed = self._memory(elements * like.element_size(), like.device).view(like.dtype)
            self._claimed = claimed
        return claimed, self._ticket

    def _memory(self, size: int, device: torch.device) -> Tensor:
        buffer = self._buffer
        if buffer is None or buffer.device != device or not size <= buffer.numel() <= 4 * size:
            self._buffer = buffer = None  # the old memory goes before the new comes
            buffer = empty((size,), torch.empty(0, dtype=torch.uint8, device=device))
            self._buffer = buffer
        return buffer[:size]

    def held(self) -> Tensor:
        """The buffer as its holder claimed it."""
        assert self._claimed is not None
        return self._claimed

    def holds(self, ticket: object) -> bool:
        """Whether the buffer still contains what the ticket's holder wrote."""
        return ticket is not None and ticket is self._ticket

    def release(self) -> None:
        """Hand the memory back."""
        self._buffer = self._claimed = self._ticket = None


workspace = Workspace()
