"""NT-Xent over the rows of z, (2N, D), where rows i and i + N are a positive pair.

With unit rows u, S = U U^T, and l_i = lse_{j != i}(S_ij / tau) - S_i,pos(i) / tau, a gradient g_i
on l_i and P_ij = exp(S_ij / tau - lse_i), P_ii = 0:

    grad_u_i = 1/tau [ sum_j (g_i P_ij + g_j P_ji) u_j - (g_i + g_pos(i)) u_pos(i) ],

and through the normalisation grad_z = (grad_u - <grad_u, u> u) / |z|.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from cosloss.kernels.eager import nt_xent as kernel


class NTXent(Function):
    """Per-row NT-Xent loss, (2N,)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, temperature: float) -> Tensor:
        return kernel.forward(z, temperature)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        z, ctx.temperature = inputs
        ctx.save_for_backward(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        return kernel.backward(grads[0], z, ctx.temperature), None
