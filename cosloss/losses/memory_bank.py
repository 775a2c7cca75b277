"""The keys of the latest batches, as negatives of the next one."""

import torch
from jaxtyping import Float
from torch import Tensor

from cosloss.arguments import check_count, check_device, check_dtype, check_flags, checked_device
from cosloss.distributed import peers
from cosloss.functional._checks import check_floating
from cosloss.losses._base import Unscriptable


class MemoryBank(Unscriptable):
    """A queue of keys, first in, first out: `loss(query, key, bank(key))` with an `InfoNCELoss`.

    Called with a batch's keys it returns those of the batches before, and in training mode takes
    the new ones in. Until it has been filled it holds random vectors, as MoCo's does. Its content
    goes with the state dict; it is no parameter, and no gradient reaches it.

    Args:
        size: how many keys it holds.
        dim: the length of a key.
        gather_distributed: take in the keys of all processes of the default group, in the order of
            ranks, so that all processes have the same content. Batches may differ in size.
        device: of the content.
        dtype: of the content, floating point; keys are rounded to it.

    Shape:
        key: (N, dim), floating point. Of more keys than `size` the last are kept.
        Output: (size, dim), a copy, without a gradient.

    Raises:
        TypeError: an argument is of another kind, or key is no floating-point tensor.
        ValueError: an argument is out of range, key has another shape, or is on another device.

    Example:
        >>> import torch
        >>> from cosloss import InfoNCELoss
        >>> loss, bank = InfoNCELoss(temperature=0.2), MemoryBank(4096, 16)
        >>> query, key = torch.randn(2, 256, 16)
        >>> loss(query, key, bank(key)).shape
        torch.Size([])

    Source: He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", 2020,
    algorithm 1.
    """

    keys: Tensor
    position: Tensor  # of the oldest key, which the next one replaces

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        gather_distributed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("size", size)
        check_count("dim", dim)
        check_flags(gather_distributed=gather_distributed)
        if device is not None:
            checked_device("device", device)
        if dtype is not None:
            check_dtype("dtype", dtype)
        self.size, self.dim = size, dim
        self.gather_distributed = gather_distributed
        self.register_buffer("keys", torch.randn(size, dim, device=device, dtype=dtype))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64, device=device))

    def forward(self, key: Float[Tensor, "n d"]) -> Float[Tensor, "size d"]:
        check_floating(key=key)
        if key.ndim != 2 or key.shape[1] != self.dim or key.shape[0] == 0:
            raise ValueError(
                f"key must have shape (N, {self.dim}) with N >= 1; got {tuple(key.shape)}"
            )
        check_device("the memory bank", self.keys, "key", key)
        negatives = self.keys.clone()  # what the loss saves must not change below
        if self.training:
            self._push(key.detach())
        return negatives

    @torch.no_grad()
    def _push(self, key: Tensor) -> None:
        group = peers(key.shape[0], key.device) if self.gather_distributed else None
        if group is not None:
            key = group.gather(key)
        n = key.shape[0]
        last = key[-self.size :].to(self.keys.dtype)
        rows = torch.arange(n - last.shape[0], n, device=key.device)
        self.keys.index_copy_(0, (self.position + rows) % self.size, last)
        self.position.add_(n).remainder_(self.size)

    def extra_repr(self) -> str:
        return f"{self.size}, {self.dim}, gather_distributed={self.gather_distributed}"
