"""Cosine similarity of every row of one tensor with every row of another, or of its own.

With unit rows u_i = x_i / max(|x_i|, eps), v_j likewise, and S = U V^T, a gradient G on S gives

    grad_u = G v,  grad_v = G^T u,  grad_x = (grad_u - <grad_u, u> u [|x| > eps]) / max(|x|, eps).

When V is U, S is symmetric, and one product is enough: grad_u = (G + G^T) u.
"""

from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from cosloss.kernels import native
from cosloss.kernels.dispatch import wants_native
from cosloss.kernels.eager import pairwise_cosine_similarity as kernel
from cosloss.modes import autograd_composite, without_autocast


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
        with without_autocast(x1):
            return *kernel.backward(grads[0], x1, x2, ctx.eps, ctx.needs_input_grad), None


class NativePairwiseCosineSimilarity(Function):
    """The same by the compiled kernels, for tensors that torch.func does not see.

    A backward pass that is itself differentiated starts from x1 and x2, not from their unit rows.
    """

    @staticmethod
    def forward(ctx: Any, x1: Tensor, x2: Tensor | None, eps: float) -> Tensor:
        found = native.pairwise_cosine_similarity.forward(x1, x2, eps)
        value, rows = found or (kernel.forward(x1, x2, eps), [])
        ctx.eps = eps
        ctx.save_for_backward(x1, x2, *chain.from_iterable(rows))
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x1, x2, *saved = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if not saved or torch.is_grad_enabled() or not wants_native(grads[0]):
            with without_autocast(x1):
                return *kernel.backward(grads[0], x1, x2, ctx.eps, needs), None
        chosen = native.pairwise_cosine_similarity
        rows = [chosen.Rows(*saved[at : at + 2]) for at in range(0, len(saved), 2)]
        with without_autocast(x1):
            grad1, *grad2 = chosen.backward(grads[0], rows, ctx.eps, needs)
        return grad1, grad2[0] if grad2 else None, None


def pairwise_cosine_similarity(x1: Tensor, x2: Tensor | None, eps: float) -> Tensor:
    """The Function that suits x1 and x2, or what it consists of where torch differentiates that."""
    if autograd_composite():
        return kernel.forward(x1, x2, eps)
    if x1.ndim == 2 and wants_native(x1, x1 if x2 is None else x2):
        return NativePairwiseCosineSimilarity.apply(x1, x2, eps)
    return PairwiseCosineSimilarity.apply(x1, x2, eps)
