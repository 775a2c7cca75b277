"""Cosine embedding loss over all pairs of the rows of z, (2N, D); rows i and i + N are positives.

With unit rows u, S = U U^T and M = 2N - 2 negatives per row,

    l_i = 1 - S_i,pos(i) + 1/M sum_{j != i, pos(i)} max(0, S_ij - margin).

A gradient g_i on l_i and A_ij = [S_ij > margin] for negatives, else 0, give

    grad_u_i = 1/M sum_j (g_i + g_j) A_ij u_j - (g_i + g_pos(i)) u_pos(i),

and through the normalisation grad_z = (grad_u - <grad_u, u> u) / |z|.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from cosloss.kernels.eager import in_batch_cosine_embedding as kernel


class InBatchCosineEmbedding(Function):
    """Per-row in-batch cosine embedding loss, (2N,)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, margin: float) -> Tensor:
        return kernel.forward(z, margin)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        z, ctx.margin = inputs
        ctx.save_for_backward(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        return kernel.backward(grads[0], z, ctx.margin), None
