"""A function whose every backward pass has a graph of its own.

`torch.autograd.gradcheck` goes backward through one graph many times. Training does so once, and a
Function may rely on it: one that frees what it saved, or scales it in place, would crash in the
second pass, or give another gradient there.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from cosloss.gradient_check.copies import copy_tensor

Outputs = Callable[..., tuple[Tensor, ...]]


class _FreshGraphs(Function):
    @staticmethod
    def forward(ctx: Any, function: Outputs, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return tuple(output.detach() for output in _graph(function, inputs)[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, outputs = _graph(ctx.function, ctx.saved_tensors)
        pairs = [
            (output, copy_tensor(grad))  # a backward may write into it
            for output, grad in zip(outputs, grads, strict=True)
            if grad is not None and output.requires_grad
        ]
        if not pairs:
            return None, *(None for _ in inputs)
        reached, given = zip(*pairs, strict=True)
        return None, *torch.autograd.grad(reached, inputs, given, allow_unused=True)


def _graph(
    function: Outputs, inputs: tuple[Tensor, ...]
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    # with gradients in the forward pass too: a function may ask whether they are on
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        return leaves, function(*leaves)


def with_fresh_graphs(function: Outputs) -> Outputs:
    """The function of tensors, differentiable once, backwards, as often as one likes."""

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        return _FreshGraphs.apply(function, *inputs)

    return call
