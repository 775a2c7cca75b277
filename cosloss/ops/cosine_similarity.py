"""Cosine similarity of vectors along the last dimension, with its analytic gradient.

With n_x = max(|x|, eps), n_y = max(|y|, eps), u = x / n_x, v = y / n_y and S = <u, v>, a
perturbation x~ of x alone gives, where |x| > eps,

    dS = <x~, y> / (n_x n_y) - S <x~, x> / |x|^2 = <x~, (v - S u) / n_x>,

and below eps, where n_x is constant, dS = <x~, v / n_x>; likewise for y. So

    grad_x = grad (v - S u [|x| > eps]) / n_x.

An exactly zero row is given the gradient 0.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from cosloss.kernels.eager import cosine_similarity as kernel
from cosloss.ops.composition import composed


class CosineSimilarity(Function):
    """S = <x1, x2> / (max(|x1|, eps) max(|x2|, eps)) over the last dimension."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x1: Tensor, x2: Tensor, eps: float) -> Tensor:
        return kernel.forward(x1, x2, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        x1, x2, ctx.eps = inputs
        ctx.save_for_backward(x1, x2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x1, x2 = ctx.saved_tensors
        return *kernel.backward(grads[0], x1, x2, ctx.eps, ctx.needs_input_grad), None


class CosineDistance(CosineSimilarity):
    """1 - S, accurate relative to itself where S is near 1; its gradient is that of -S."""

    @staticmethod
    def forward(x1: Tensor, x2: Tensor, eps: float) -> Tensor:
        return kernel.distance_forward(x1, x2, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        return CosineSimilarity.backward(ctx, -grads[0])


def cosine_similarity(x1: Tensor, x2: Tensor, eps: float) -> Tensor:
    """`CosineSimilarity`, or what it consists of where torch differentiates that itself."""
    return kernel.forward(x1, x2, eps) if composed() else CosineSimilarity.apply(x1, x2, eps)


def cosine_distance(x1: Tensor, x2: Tensor, eps: float) -> Tensor:
    """`CosineDistance`, or what it consists of where torch differentiates that itself."""
    if composed():
        return kernel.distance_forward(x1, x2, eps)
    return CosineDistance.apply(x1, x2, eps)
