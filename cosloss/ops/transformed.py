"""Whether something beyond reverse-mode autograd is looking at a computation."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed(*tensors: Tensor | None) -> bool:
    """True under torch.compile, inside a torch.func transform, and for forward-mode tangents.

    An op that is tiled, in place and differentiable once then gives way to plain operations.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or any(_special(tensor) for tensor in tensors if tensor is not None)
    )


def _special(tensor: Tensor) -> bool:
    # a backward pass with is_grads_batched sees the older kind of batched tensor
    if torch._C._functorch.is_legacy_batchedtensor(tensor):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None
