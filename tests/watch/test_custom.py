"""target="custom": the modules that run an autograd Function written in Python."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cosloss import NTXentLoss
from cosloss.watch import Differences, GradientWatch


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return ctx.factor * x * grad, None


class Squared(nn.Module):
    def __init__(self, factor=2.0):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return Square.apply(x, self.factor)


class Block(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.inner = inner

    def forward(self, x):
        return self.linear(x) + self.inner(x)


class Checkpointed(Block):
    reentrant = False

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


class Reentrant(Checkpointed):
    reentrant = True


def train(model, every=1, steps=3, loss=None, **options):
    watch = GradientWatch(model, "custom", every, **options)
    for _ in range(steps):
        with watch.step():
            z = model(torch.randn(6, 4))
            (z.square().mean() if loss is None else loss(z, z.roll(1, 0))).backward()
    return watch


def checked(watch):
    return [outcome["module"] for outcome in watch._outcomes]


@pytest.mark.parametrize("kind", [Block, Checkpointed, Reentrant])
def test_the_innermost_module_is_found_and_a_wrong_one_is_caught(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), kind(Squared()), kind(Squared(2.1)), nn.Tanh())
    with pytest.warns(UserWarning, match=r"the gradient of `2.inner` \(Squared\) is wrong"):
        watch = train(model, check=Differences())
    assert sorted(checked(watch)) == ["1.inner", "2.inner"]  # checkpoints run last first
    assert (watch.checks_run, watch.checks_failed) == (2, 1)
    watch.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_second_step_is_checked_however_rare_checks_are():
    model = nn.Sequential(nn.Linear(4, 4), Squared())
    watch = train(model, every=100)
    assert checked(watch) == ["1"]


def test_a_loss_of_the_library_is_found():
    model = nn.Module()
    model.encoder, model.loss = nn.Linear(4, 4), NTXentLoss()
    model.forward = model.encoder.forward
    watch = train(model, loss=model.loss)
    assert set(checked(watch)) == {"loss"}
    assert watch.checks_failed == 0


def test_a_part_found_while_it_runs_within_another_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Squared()

        def forward(self, x):
            return Square.apply(self.inner(x), 2.0)

    watch = train(nn.Sequential(nn.Linear(4, 4), Twice()), steps=4)
    assert set(checked(watch)) == {"1", "1.inner"}


def test_nothing_found_is_said_and_what_to_do():
    model = nn.Sequential(nn.Linear(4, 4))
    watch = GradientWatch(model, "custom")
    with watch.step():
        Square.apply(model(torch.randn(2, 4)), 2.0).sum().backward()
    with pytest.warns(UserWarning, match="calls by name"):
        watch.warn_if_nothing_was_checked()


def test_compiled_parts_keep_their_graphs():
    compiled = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), backend="eager")
    model = nn.Sequential(compiled, Squared())
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch = train(model, every=1)
    assert set(checked(watch)) == {"1"}
    assert not torch._dynamo.utils.counters["graph_break"]
