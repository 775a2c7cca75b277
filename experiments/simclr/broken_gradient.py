"""A loss whose gradient turns wrong, to see its checks at work: experiment=broken_gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cosloss import reference


class WrongSign(torch.autograd.Function):
    """Cosine similarity of rows, in whose gradient one sign may be wrong.

    Right is grad_x = grad (v - S u) / |x|, with unit rows u, v and S = <u, v>; with `wrong` it is
    grad (v + S u) / |x|. For orthogonal rows, S = 0, and for collapsed ones nothing would show.
    """

    @staticmethod
    def forward(ctx: Any, x1: Tensor, x2: Tensor, wrong: bool) -> Tensor:
        ctx.save_for_backward(x1, x2)
        ctx.sign = 1 if wrong else -1
        return reference.cosine_similarity(x1, x2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x1, x2 = ctx.saved_tensors
        norm1, norm2 = x1.norm(dim=1, keepdim=True), x2.norm(dim=1, keepdim=True)
        u, v = x1 / norm1, x2 / norm2
        similarity = (u * v).sum(1, keepdim=True)
        grad = grads[0].unsqueeze(1)
        grad_x1 = grad * (v + ctx.sign * similarity * u) / norm1
        return grad_x1, grad * (u + ctx.sign * similarity * v) / norm2, None


class BrokenCosineLoss(nn.Module):
    """1 - S for positive pairs, max(0, S) for each row and the next one's positive.

    Args:
        wrong_after: how many steps of training have the right gradient.
    """

    steps: Tensor

    def __init__(self, wrong_after: int = 20) -> None:
        super().__init__()
        self.wrong_after = wrong_after
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        wrong = bool(self.steps >= self.wrong_after)
        if self.training and torch.is_grad_enabled() and z1.requires_grad:
            self.steps += 1
        positive = WrongSign.apply(z1, z2, wrong)
        negative = WrongSign.apply(z1, z2.roll(1, 0), wrong)
        return (1 - positive).mean() + negative.relu().mean()

    def reference(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The same loss in plain autograd torch operations."""
        return _twin


def _twin(z1: Tensor, z2: Tensor) -> Tensor:
    positive = reference.cosine_similarity(z1, z2)
    negative = reference.cosine_similarity(z1, z2.roll(1, 0))
    return (1 - positive).mean() + negative.relu().mean()
