"""Which tensors the blocked kernels take."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def usable(*tensors: Tensor) -> bool:
    """Whether these are plain tensors in memory, whose values may steer the computation."""
    return (
        forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
        and all(map(_plain, tensors))
    )


def _plain(x: Tensor) -> bool:
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        # a batched gradient's tensors say that they are on the CPU, and have no values of their own
        and torch._C._dispatch_keys(x).has(torch._C.DispatchKey.CPU)
        and x.dtype in (torch.float32, torch.float64)
        and x.numel() > 0
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )
