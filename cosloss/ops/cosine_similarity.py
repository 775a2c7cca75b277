"""Cosine similarity of vectors along the last dimension, with its analytic gradient.

With n_x = max(|x|, eps), n_y = max(|y|, eps), u = x / n_x, v = y / n_y and S = <u, v>, a
perturbation x~ of x alone gives, where |x| > eps,

    dS = <x~, y> / (n_x n_y) - S <x~, x> / |x|^2 = <x~, (v - S u) / n_x>,

and below eps, where n_x is constant, dS = <x~, v / n_x>; likewise for y. So

    grad_x = grad (v - S u [|x| > eps]) / n_x.

An exactly zero row is given the gradient 0.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from cosloss.kernels import native
from cosloss.kernels.dispatch import backend, wants_native, wants_row_blocks
from cosloss.kernels.eager import cosine_similarity as kernel
from cosloss.kernels.eager import row_blocks
from cosloss.modes import autograd_composite
from cosloss.ops import custom_ops

# kernels for plain tensors, and which they take
PLAIN: dict[Callable[..., bool], ModuleType] = {
    wants_native: native.cosine_similarity,
    wants_row_blocks: row_blocks,
}


class CosineSimilarity(Function):
    """S = <x1, x2> / (max(|x1|, eps) max(|x2|, eps)) over the last dimension."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x1: Tensor, x2: Tensor, eps: float) -> Tensor:
        return backend(x1, x2).cosine_similarity.forward(x1, x2, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        x1, x2, ctx.eps = inputs
        ctx.save_for_backward(x1, x2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x1, x2 = ctx.saved_tensors
        chosen = backend(grads[0], x1, x2).cosine_similarity
        return *chosen.backward(grads[0], x1, x2, ctx.eps, ctx.needs_input_grad), None


class CosineDistance(CosineSimilarity):
    """1 - S, accurate relative to itself where S is near 1; its gradient is that of -S."""

    @staticmethod
    def forward(x1: Tensor, x2: Tensor, eps: float) -> Tensor:
        return backend(x1, x2).cosine_similarity.distance_forward(x1, x2, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        return CosineSimilarity.backward(ctx, -grads[0])


class PlainCosineSimilarity(Function):
    """Either of them by a kernel that writes in place, for tensors that torch.func does not see.

    The first backward pass uses what the forward pass found out about the rows. One that is itself
    differentiated starts from the rows, as their derivative needs it to.
    """

    @staticmethod
    def forward(
        ctx: Any, x1: Tensor, x2: Tensor, eps: float, distance: bool, suits: Callable[..., bool]
    ) -> Tensor:
        found = PLAIN[suits].forward(x1, x2, eps, distance)
        value, statistics = found or (_every_case(x1, x2, eps, distance), None)
        ctx.eps, ctx.distance, ctx.suits = eps, distance, suits
        ctx.save_for_backward(x1, x2, statistics)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x1, x2, statistics = ctx.saved_tensors
        sign, needs = -1 if ctx.distance else 1, ctx.needs_input_grad
        if statistics is None or torch.is_grad_enabled() or not ctx.suits(grads[0]):
            found = kernel.backward(sign * grads[0], x1, x2, ctx.eps, needs)
        else:
            plain = PLAIN[ctx.suits]
            found = plain.backward(grads[0], x1, x2, statistics, ctx.eps, sign, needs)
        return *found, None, None, None


def cosine_similarity(x1: Tensor, x2: Tensor, eps: float) -> Tensor:
    """The similarities, by the Function that suits x1 and x2 or as torch differentiates itself."""
    return _row_wise(x1, x2, eps, distance=False)


def cosine_distance(x1: Tensor, x2: Tensor, eps: float) -> Tensor:
    """1 less the similarities, likewise."""
    return _row_wise(x1, x2, eps, distance=True)


def _row_wise(x1: Tensor, x2: Tensor, eps: float, distance: bool) -> Tensor:
    if custom_ops.suits(x1, x2):
        return custom_ops.cosine_similarity(x1, x2, eps, distance)
    if autograd_composite():
        return _every_case(x1, x2, eps, distance)
    for suits in PLAIN:
        if suits(x1, x2):
            return PlainCosineSimilarity.apply(x1, x2, eps, distance, suits)
    return (CosineDistance if distance else CosineSimilarity).apply(x1, x2, eps)


def _every_case(x1: Tensor, x2: Tensor, eps: float, distance: bool) -> Tensor:
    return (kernel.distance_forward if distance else kernel.forward)(x1, x2, eps)
