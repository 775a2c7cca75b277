"""Rows scaled to length 1, for losses whose parts add up their gradients before the normalisation.

With u = x / |x| and a gradient h on u, that on x is (h - <h, u> u) / |x|, and 0 for a zero row. Of
a short row each part's own may be beyond the dtype where the sum is not.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from cosloss.kernels import dispatch, eager
from cosloss.modes import differentiates_itself, without_autocast


class UnitRows(Function):
    """u of rows x (N, D), in at least float32; its second derivative is the composition's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.unit_rows = dispatch.in_batch(x).unit_rows
        with without_autocast(x):
            u, norm, _ = ctx.unit_rows.forward([x])
        ctx.save_for_backward(x, norm)
        return u

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        x, norm = ctx.saved_tensors
        twice = torch.is_grad_enabled()
        with without_autocast(x):
            if twice or differentiates_itself(grad):
                with torch.enable_grad():
                    aliased = x.view_as(x)
                    (found,) = torch.autograd.grad(
                        _composition(aliased), aliased, grad, create_graph=twice
                    )
            else:
                (found,) = ctx.unit_rows.backward([grad], None, [x], norm, [True])
        return found.to(x.dtype)


def unit_rows(x: Tensor) -> Tensor:
    """x / |x| of each row, in at least float32; 0 of a zero row."""
    if differentiates_itself(x):
        with without_autocast(x):
            return _composition(x)
    return UnitRows.apply(x)


def _composition(x: Tensor) -> Tensor:
    u, _, _ = eager.unit_rows.forward([x])
    return u
