"""A failure names the part of the module whose gradient is wrong."""

import warnings

import pytest
import torch
from torch import nn

from cosloss.watch import GradientWatch
from cosloss.watch.checks import Differences, Discrepancy
from tests.watch.test_gradient_watch import Norm, step


class Block(nn.Module):
    """A residual block: a linear layer, a norm, and what it does with them."""

    def __init__(self, norm, wrong_sum=False):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.inner = nn.Sequential(nn.Tanh(), norm)
        self.wrong_sum = wrong_sum

    def forward(self, x):
        y = self.inner(self.linear(x))
        return Halved.apply(x, y) if self.wrong_sum else x + y


class Halved(torch.autograd.Function):
    """x + y, whose backward gives y half of its gradient."""

    @staticmethod
    def forward(ctx, x, y):
        return x + y

    @staticmethod
    def backward(ctx, grad):
        return grad, grad / 2


def plain(block):
    """The block's twin, from plain operations and its own parameters."""

    def twin(x):
        norm = block.inner[1]
        y = block.linear(x).tanh()
        weights = (norm.weight, norm.bias) if isinstance(norm, nn.LayerNorm) else ()
        return x + nn.functional.layer_norm(y, y.shape[-1:], *weights)

    return twin


def message(block, check):
    model = nn.Sequential(nn.Linear(8, 8), block)
    twin = plain(block) if isinstance(check, Discrepancy) else None
    watch = GradientWatch(model, "1", 1, twin=twin, check=check)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(watch, model)
    assert watch.checks_failed == 1, watch.report()
    weights = [p.grad for p in model.parameters()]
    assert all(w is not None for w in weights)
    return str(caught[-1].message)


@pytest.mark.parametrize("check", [Differences, Discrepancy])
def test_the_innermost_wrong_part_is_named(check):
    said = message(Block(Norm()), check())
    assert "wrong in its part `inner.1` (Norm): " in said
    assert "`inner` " not in said


@pytest.mark.parametrize("check", [Differences, Discrepancy])
def test_a_module_whose_parts_are_right_is_wrong_itself(check):
    said = message(Block(nn.LayerNorm(8), wrong_sum=True), check())
    assert "its parts (`linear`, `inner`) are right by themselves" in said


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_twin_that_closes_over_the_module_sees_its_parameters(dtype):
    block = Block(nn.LayerNorm(8)).to(dtype)
    model = nn.Sequential(nn.Linear(8, 8, dtype=dtype), block)
    watch = GradientWatch(model, "1", 1, "raise", twin=plain(block))
    before = [t.clone() for t in block.state_dict().values()]
    with watch.step():
        model(torch.randn(6, 8, dtype=dtype)).sin().sum().backward()
    assert (watch.checks_run, watch.checks_failed) == (1, 0), watch.report()
    assert all(map(torch.equal, before, block.state_dict().values()))
    assert isinstance(block.linear.weight, nn.Parameter)


def test_looking_for_the_part_leaves_the_training_as_it_is():
    def trained(watched):
        torch.manual_seed(0)
        drop = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(8), Norm())
        model = nn.Sequential(nn.Linear(8, 8), drop)
        watch = GradientWatch(model, "1", 1, check=Differences())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(3):
                if watched:
                    step(watch, model)
                else:
                    model(torch.randn(6, 8)).sin().sum().backward()
        assert watch.checks_failed == (3 if watched else 0)
        return [*(p.grad for p in model.parameters()), *model.buffers()]

    assert all(map(torch.equal, trained(True), trained(False)))
