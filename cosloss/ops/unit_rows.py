"""Rows scaled to unit length at any scale, with the gradient

    grad_z = (grad_u - <grad_u, u> u) / |z|,

and 0 for a zero row.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from cosloss.kernels.eager import rows as kernel
from cosloss.ops.transformed import transformed


class UnitRows(Function):
    """u = z / |z|, row by row."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        u, *norm = kernel.unit_rows(z)
        ctx.save_for_backward(z, u, *norm)
        return u

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        z, *unit = ctx.saved_tensors
        if torch.is_grad_enabled():
            # for a second derivative everything must be seen to come from z
            unit = kernel.unit_rows(z)
        return kernel.through_unit_rows(grads[0], *unit)


def unit_rows(z: Tensor) -> Tensor:
    """`UnitRows`, or the operations that it consists of where autograd is not all there is."""
    return kernel.unit_rows(z)[0] if transformed(z) else UnitRows.apply(z)
