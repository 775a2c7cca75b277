"""compare_gradients of a module: its parameters are judged too, whatever the twin is."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cosloss.gradient_check import check_finite_differences, compare_gradients


class Scale(torch.autograd.Function):
    """x * weight + bias; the gradient of the weight is multiplied by `factor`."""

    @staticmethod
    def forward(ctx, x, weight, bias, factor):
        ctx.save_for_backward(x, weight)
        ctx.factor = factor
        return x * weight + bias

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad * weight, ctx.factor * (grad * x).sum(0), grad.sum(0), None


class Affine(nn.Module):
    def __init__(self, factor=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, generator=generator))
        self.bias = nn.Parameter(torch.randn(4, generator=generator))
        self.factor = factor
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return Scale.apply(x, self.weight, self.bias, self.factor)

    def plain(self, x):
        return x * self.weight + self.bias


class WithReference(Affine):
    def reference(self):
        return self.plain


class PlainAffine(nn.Module):
    """A module with parameters of its own, which have the same names."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return x * self.weight + self.bias


TWINS = {
    "closure": lambda m: lambda x: x * m.weight + m.bias,
    "method": lambda m: m.plain,
    "module": lambda m: PlainAffine(),
    "own reference": lambda m: None,
}


def inputs():
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("factor", [1.0, -1.0, 1.01])
def test_a_parameter_of_a_wrong_gradient(twin, factor):
    module = (WithReference if twin == "own reference" else Affine)(factor)
    before = copy.deepcopy(module.state_dict())
    report = compare_gradients(module, TWINS[twin](module), inputs())
    assert set(report.inputs) == {"x", "self.weight", "self.bias"}
    assert report.inputs["x"].passed
    assert report.inputs["self.bias"].passed
    assert report.inputs["self.weight"].passed == (factor == 1.0)
    assert bool(report) == (factor == 1.0), report
    assert module.calls == 0, "the module itself is not called"
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in module.parameters())


class Embedding(nn.Embedding):
    def __init__(self, factor):
        super().__init__(5, 4)
        self.factor = factor

    def forward(self, rows):
        found = super().forward(rows)
        return Scale.apply(found, torch.ones(4), torch.zeros(4), 1.0) * self.factor


@pytest.mark.parametrize("right", [True, False])
def test_a_layer_whose_input_has_no_gradient(right):
    module = Embedding(1.0 if right else 1.5)
    rows = torch.tensor([0, 1, 1, 4])
    report = compare_gradients(module, lambda rows: F.embedding(rows, module.weight), rows)
    assert set(report.inputs) == {"self.weight"}
    assert bool(report) == right


def test_frozen_parameters_are_not_judged():
    module = Affine(-1.0)
    module.weight.requires_grad_(False)
    report = compare_gradients(module, TWINS["closure"](module), inputs())
    assert set(report.inputs) == {"x", "self.bias"}
    assert report


def test_batch_norm_draws_no_average_from_a_check():
    module = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5))
    before = copy.deepcopy(module.state_dict())
    report = compare_gradients(module, None, inputs())
    assert report, report
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("factor", [1.0, -1.0])
def test_finite_differences_judge_parameters(factor):
    report = check_finite_differences(Affine(factor), inputs())
    assert bool(report) == (factor == 1.0), report


class Holding(nn.Module):
    """Holds the module's own parameters under other names, and one of its own."""

    def __init__(self, module, factor):
        super().__init__()
        self.w, self.b = module.weight, module.bias
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x):
        return (x * self.w + self.b) * self.factor


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_twin_of_other_names(factor):
    module = Affine()
    report = compare_gradients(module, Holding(module, factor), inputs())
    assert bool(report) == (factor == 1.0), report


def test_a_twin_without_the_parameters_is_refused():
    with pytest.raises(ValueError, match=r"no parameter `weight` of shape \(4,\)"):
        compare_gradients(Affine(), nn.Linear(4, 4), inputs())
