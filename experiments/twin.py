"""Training on a loss's twin, to hold its curve against the loss's own."""

from torch import Tensor, nn


class TwinLoss(nn.Module):
    """The plain-autograd twin of a loss, in the loss's place."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.twin = loss.reference()

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.twin(*inputs)
