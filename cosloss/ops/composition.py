"""When an op is its kernel's differentiable operations, and when its autograd Function."""

import torch
from torch.autograd import forward_ad


def composed() -> bool:
    """Whether torch is to differentiate the kernel's operations itself.

    - Under torch.compile and torch.export, where Inductor fuses them with their derivative.
    - Under forward-mode AD, torch.func.jvp and jacfwd included: a Function's jvp is not
      differentiated again, so that jacfwd of jacfwd is silently 0, and Dynamo refuses it.
    """
    return torch.compiler.is_compiling() or forward_ad._current_level >= 0
