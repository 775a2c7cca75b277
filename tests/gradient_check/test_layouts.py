"""A gradient must not depend on how its incoming gradient and its inputs lie in memory."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cosloss.gradient_check import compare_gradients
from cosloss.watch import GradientError, GradientWatch


def in_order(t):
    """What a kernel reads that takes a tensor for contiguous."""
    flat = t.new_empty(0).set_(t.untyped_storage())
    return flat[(t.storage_offset() + torch.arange(t.numel())) % len(flat)].reshape(t.shape)


class Cubed(torch.autograd.Function):
    """x³, whose backward reads what `reads` says as if it were contiguous."""

    @staticmethod
    def forward(ctx, x, reads):
        ctx.save_for_backward(x)
        ctx.reads = reads
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        grad = in_order(grad) if ctx.reads == "gradient" else grad
        x = in_order(x) if ctx.reads == "input" else x
        return 3 * x**2 * grad, None


class Cube(nn.Module):
    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def forward(self, x):
        return Cubed.apply(x, self.reads)


@pytest.mark.parametrize("shape", [(6,), (6, 4), (2, 3, 4), (2, 3, 4, 5)])
@pytest.mark.parametrize("reads", ["gradient", "input"])
def test_memory_read_in_order_is_seen(reads, shape):
    report = compare_gradients(lambda x: Cubed.apply(x, reads), None, torch.randn(shape))
    assert "memory read as if it were contiguous?" in report.reason


def test_a_gradient_expanded_from_one_number_is_told_apart():
    class Halves(Cubed):
        @staticmethod
        def backward(ctx, grad):
            factor = 0.5 if 0 in grad.stride() else 1
            return 3 * ctx.saved_tensors[0] ** 2 * grad * factor, None

    report = compare_gradients(lambda x: Halves.apply(x, ""), None, torch.randn(6, 4))
    assert "expanded from one number" in report.reason


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: Cubed.apply(x, ""),
        lambda x: F.dropout(x, 0.5),  # drawn in memory's order
        lambda x: F.max_pool1d(x.relu(), 2),  # ties
        lambda x: x.view(-1) ** 2,  # refuses other layouts
        lambda x: x.log_softmax(-1),
        lambda x: x.as_strided((4, 2), (3, 1)) ** 2,
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_functions_are_not_accused(fn, dtype):
    report = compare_gradients(fn, None, torch.randn(8, 6).to(dtype))
    assert report, report


@pytest.mark.parametrize(
    ("reads", "before", "after"),
    [
        ("gradient", lambda h: h, lambda y: y.t().contiguous()),
        ("input", lambda h: h.view(4, 6).t(), lambda y: y),
        ("gradient", lambda h: h, lambda y: y),  # not here, but in another layout
    ],
)
def test_a_watch_sees_the_layout_that_training_has_and_others(reads, before, after):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.loss = nn.Linear(4, 4), Cube(reads)

        def forward(self, x):
            y = after(self.loss(before(self.encoder(x))))
            return (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum()

    model = Model()
    watch = GradientWatch(model, on_failure="raise")
    with pytest.raises(GradientError, match="off by"), watch.step():
        model(torch.randn(6, 4)).backward()
    model.loss.reads = ""
    watch = GradientWatch(model, on_failure="raise")
    with watch.step():
        model(torch.randn(6, 4)).backward()
    assert watch.checks_run == 1
