"""Every op of the table against its float64 twin, within the budget that its twin sets."""

import pytest
import torch

from cosloss.testing import OPS, errors

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=OPS, ids=lambda op: op.name)
def op(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_budget(op, dtype):
    budget = op.budget(dtype)
    for sample in (*op.generic(), *op.hard(dtype)):
        found = errors(op.function, op.twin, sample, dtype)
        assert found.within(budget), (sample.name, sample.keywords, found, budget)


def test_finite_differences(op):
    for sample in op.generic():
        if "hardness" in sample.keywords:  # whose gradient is stopped: the twin has it
            continue
        function = sample.bind(op.function)
        assert torch.autograd.gradcheck(function, sample.tensors(torch.float64)), sample.name


def test_the_table_sees_a_wrong_gradient(op):
    class FivePercentOff(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            wrong = grad.clone()
            wrong.view(-1)[3] *= 1.05
            return wrong

    def wrong(**arguments):
        name = next(iter(sample.inputs))
        return op.function(**{**arguments, name: FivePercentOff.apply(arguments[name])})

    sample = next(iter(op.generic()))
    budget = op.budget(torch.float32)
    assert not errors(wrong, op.twin, sample, torch.float32).within(budget)
