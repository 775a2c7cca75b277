"""Training on a loss's twin, to hold its curve against the loss's own."""

from functools import wraps
from types import MethodType
from typing import Any

from torch import Tensor, nn


class TwinLoss(nn.Module):
    """The plain-autograd twin of a loss, in the loss's place and with its parameters."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

        # the same signature: who looks for what the loss takes finds it here too
        @wraps(type(loss).forward)
        def forward(own: TwinLoss, *inputs: Any) -> Tensor:
            # anew at each call: a temperature that is learnt changes
            return own.loss.reference()(*inputs)

        # a method, so that a copy of this module calls the copy's loss
        self.forward = MethodType(forward, self)
