"""Temperatures, biases and weights in bfloat16 and float16: rounded where stored, nowhere after."""

import pytest
import torch

from cosloss import InfoNCELoss, NTXentLoss, SigmoidContrastiveLoss, SupConLoss, reference
from cosloss.kernels import dispatch
from tests.surroundings.calls import CALLS, arguments, error, expected, found

NARROW = [torch.bfloat16, torch.float16]
LEARNT = [name for name, call in CALLS.items() if "T" in call.names]


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "1-d"])
@pytest.mark.parametrize("narrow", NARROW)
@pytest.mark.parametrize("temperature", [0.3, 0.02])
@pytest.mark.parametrize("name", LEARNT)
def test_functions(name, temperature, narrow, shape, backend):
    given = arguments()
    for number, value in {"T": temperature, "B": -1.5}.items():
        given[number] = torch.full(shape, value, dtype=narrow).requires_grad_()
    with dispatch.use(backend):
        ours = found(name, given)
    theirs = expected(name, given)
    assert [x.shape for x in ours] == [x.shape for x in theirs]
    for mine, exact in zip(ours, theirs, strict=True):
        rounding = 3e-5 if mine.dtype == torch.float32 else torch.finfo(narrow).eps
        assert error([mine], [exact]) < rounding


@pytest.mark.parametrize("narrow", NARROW)
@pytest.mark.parametrize("module", [NTXentLoss, InfoNCELoss, SupConLoss, SigmoidContrastiveLoss])
def test_modules_moved_to_a_narrow_dtype(module, narrow):
    given = arguments()
    loss = module(0.02, learnable_temperature=True).to(narrow)
    second = torch.arange(6) % 3 if module is SupConLoss else given["b"]
    value = loss(given["a"], second)
    value.backward()
    more = {}
    if module is SigmoidContrastiveLoss:
        more["bias"] = loss.bias.detach().double()
    exact = getattr(reference, loss.function)(
        given["a"].detach().double(),
        second if module is SupConLoss else second.detach().double(),
        temperature=loss.log_temperature.detach().double().exp(),
        **more,
    )
    torch.testing.assert_close(value.detach().double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        loss.reference()(given["a"], second).detach().double(), exact, rtol=1e-5, atol=1e-6
    )
    assert loss.log_temperature.grad.dtype == narrow
    assert loss.temperature.dtype == torch.float32


@pytest.mark.parametrize("narrow", NARROW)
@pytest.mark.parametrize("name", [n for n, call in CALLS.items() if "w" in call.names])
def test_weights(name, narrow):
    given = arguments()
    given["w"] = given["w"].to(narrow)
    ours = found(name, given)
    assert error(ours, expected(name, given)) < 3e-6
    assert ours[0].dtype == torch.float32


@pytest.mark.parametrize("name", LEARNT)
def test_a_wide_parameter_stays_wide(name):
    given = arguments(torch.bfloat16)
    given["T"] = torch.tensor(0.02, dtype=torch.float64, requires_grad=True)
    value, *_ = found(name, given)
    exact, *_ = expected(name, given)
    assert value.dtype == torch.bfloat16
    assert error([value], [exact]) < 1e-2
