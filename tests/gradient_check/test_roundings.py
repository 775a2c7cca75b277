"""A function's own roundings, where no twin shows them: excused, and a fault beside them is not."""

import torch

from cosloss.gradient_check import compare_gradients
from tests.gradient_check.test_compare import views


def complement(x):
    """A factor 1 - (1 - 1e-6), which float32 rounds by some per cent, in a small term."""
    almost = torch.sigmoid(x).clamp_min(2.0).clamp_max(1 - 1e-6)
    return (x.tanh() + 1e-2 * x * torch.log(1 - almost)).sum()


class _Coarse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.single = x.dtype == torch.float32
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return (2 * grad).bfloat16().float() if ctx.single else 2 * grad


def test_a_constant_that_cancels_is_rounding():
    report = compare_gradients(complement, None, views(8)[0])
    assert report, report


def test_a_backward_in_a_coarser_format_is_none():
    x = views(8)[0]
    report = compare_gradients(lambda x: (_Coarse.apply(x) * x.cos()).sum(), None, x)
    assert not report
