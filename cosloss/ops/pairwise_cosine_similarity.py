"""Cosine similarity of every row of one tensor with every row of another, or of its own.

With unit rows u_i = x_i / max(|x_i|, eps), v_j likewise, and S = U V^T, a gradient G on S gives

    grad_u = G v,  grad_v = G^T u,  grad_x = (grad_u - <grad_u, u> u [|x| > eps]) / max(|x|, eps).

When V is U, S is symmetric, and one product is enough: grad_u = (G + G^T) u.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from cosloss.kernels.eager import pairwise_cosine_similarity as kernel
from cosloss.ops.composition import composed


class PairwiseCosineSimilarity(Function):
    """S_ij = <x1_i, x2_j> / (max(|x1_i|, eps) max(|x2_j|, eps)); x2 = None stands for x1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x1: Tensor, x2: Tensor | None, eps: float) -> Tensor:
        return kernel.forward(x1, x2, eps)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor | None, float], output: Tensor
    ) -> None:
        x1, x2, ctx.eps = inputs
        ctx.save_for_backward(x1, x2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x1, x2 = ctx.saved_tensors
        return *kernel.backward(grads[0], x1, x2, ctx.eps, ctx.needs_input_grad), None


def pairwise_cosine_similarity(x1: Tensor, x2: Tensor | None, eps: float) -> Tensor:
    """The Function, or what it consists of where torch differentiates that itself."""
    return (
        kernel.forward(x1, x2, eps) if composed() else PairwiseCosineSimilarity.apply(x1, x2, eps)
    )
