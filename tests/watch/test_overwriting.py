"""A call that writes over its argument is wrong only where another node still reads it."""

import pytest
import torch
from torch import nn

from cosloss.watch import GradientError, GradientWatch


class Squares(torch.autograd.Function):
    """x² / 2, which writes into x in the way that it is told, as a kernel does."""

    @staticmethod
    def forward(ctx, x, writes):
        kept = x.clone()
        ctx.save_for_backward(kept, x if "backward" in writes else kept)
        ctx.writes = writes
        if "forward" in writes:
            x.data.zero_()
        return kept.square() / 2

    @staticmethod
    def backward(ctx, grad):
        kept, x = ctx.saved_tensors
        if "backward" in ctx.writes:
            x.data.copy_(kept if "restores" in ctx.writes else grad)
        if "gradient" in ctx.writes:
            return grad.mul_(kept), None
        return grad * kept, None


class Model(nn.Module):
    def __init__(self, before, writes):
        super().__init__()
        self.encoder, self.before, self.loss = nn.Linear(4, 4), before, nn.Module()
        self.loss.forward = lambda x: Squares.apply(x, writes)

    def forward(self, x):
        return self.loss(self.before(self.encoder(x))).sin().sum()


def step(before, writes):
    model = Model(before, writes)
    watch = GradientWatch(model, on_failure="raise")
    with watch.step():
        model(torch.randn(6, 4)).backward()
    return watch


def halves(h):
    return h.exp()[:, :2]


@pytest.mark.parametrize("before", [torch.exp, torch.tanh, halves])
@pytest.mark.parametrize("writes", ["forward", "backward"])
def test_an_argument_that_its_maker_has_saved_may_not_be_written_over(before, writes):
    with pytest.raises(GradientError, match=r"x: .* writes over this argument, which .*Backward0"):
        step(before, writes)


@pytest.mark.parametrize(
    ("before", "writes"),
    [
        (lambda h: h, "forward"),  # a linear layer saves its input
        (lambda h: h.view(3, 8), "backward"),
        (torch.sin, "forward"),
        (torch.exp, "forward backward restores"),
        (torch.exp, "gradient"),
    ],
)
def test_what_nobody_reads_any_more_may_be(before, writes):
    assert step(before, writes).checks_run == 1


class Residual(Model):
    def __init__(self, writes, reads_late):
        super().__init__(nn.Identity(), writes)
        self.reads_late = reads_late

    def forward(self, x):
        h = self.encoder(x)
        kept = h.sin()
        y = self.loss(h.clone())
        # a node made after the call has gone backward before it
        other = kept if self.reads_late else h.cos()
        return ((y + other) * torch.linspace(-1, 2, y.numel()).view_as(y)).sum()


@pytest.mark.parametrize("reads_late", [True, False])
def test_an_incoming_gradient_may_be_written_over_unless_another_branch_reads_it(reads_late):
    model = Residual("gradient", reads_late)
    watch = GradientWatch(model, on_failure="raise")

    def one_step():
        with watch.step():
            model(torch.randn(6, 4)).backward()

    if reads_late:
        with pytest.raises(GradientError, match="writes over its incoming gradient"):
            one_step()
    else:
        one_step()
        assert watch.checks_run == 1
