"""Modules check what they are built with, and hold it; no argument is taken for another."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from cosloss import (
    CosineEmbeddingLoss,
    CosineSimilarity,
    InfoNCELoss,
    MaxSimLoss,
    NTXentLoss,
    SigmoidContrastiveLoss,
    SupConLoss,
    functional,
)

CONTRASTIVE = [NTXentLoss, InfoNCELoss, SupConLoss]
EVERY = [*CONTRASTIVE, MaxSimLoss, SigmoidContrastiveLoss]
Z = torch.randn(2, 6, 4)


def inputs(module):
    """Two views; or rows and labels, or items of one token each."""
    if module is MaxSimLoss:
        return Z[0][:, None], Z[1][:, None]
    return Z[0], torch.arange(6) % 3 if module is SupConLoss else Z[1]


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: NTXentLoss(0.5, 4096), ValueError, "none, mean, sum; got 4096"),
        (lambda: InfoNCELoss(0.07, True), ValueError, "got True .*given by name"),
        (lambda: InfoNCELoss(0.07, symmetric="sum"), TypeError, "symmetric must be True or False"),
        (lambda: NTXentLoss(reduction="avg"), ValueError, "got 'avg'"),
        (lambda: NTXentLoss("0.5"), TypeError, "temperature must be a number; got '0.5'"),
        (lambda: NTXentLoss(None), TypeError, "temperature must be a number; got None"),
        (lambda: NTXentLoss(0), ValueError, "temperature must be positive; got 0"),
        (lambda: NTXentLoss(math.nan), ValueError, "temperature must be finite; got nan"),
        (lambda: NTXentLoss(math.inf), ValueError, "temperature must be finite; got inf"),
        (lambda: NTXentLoss(nn.Parameter(torch.tensor(0.5))), TypeError, "goes to cosloss.func"),
        (lambda: NTXentLoss(decoupled=1), TypeError, "decoupled must be True or False; got 1"),
        (lambda: SupConLoss(0.1, gather_distributed="yes"), TypeError, "gather_distributed must"),
        (lambda: SupConLoss(0.1, learnable_temperature=0.1), TypeError, "learnable_temperature"),
        (lambda: SupConLoss(scalar_parameters=None), TypeError, "scalar_parameters must be True"),
        (lambda: SigmoidContrastiveLoss(bias=None), TypeError, "bias must be a number"),
        (lambda: SigmoidContrastiveLoss(learnable_bias=2), TypeError, "learnable_bias must be"),
        (lambda: SigmoidContrastiveLoss(0.1, "sum"), TypeError, "bias must be a number; got 'sum'"),
        (lambda: MaxSimLoss(symmetric=None), TypeError, "symmetric must be True or False"),
        (lambda: MaxSimLoss(gather_distributed="ring"), TypeError, "gather_distributed"),
        (lambda: CosineEmbeddingLoss(1.5), ValueError, r"in \[-1, 1\]; got 1.5"),
        (lambda: CosineEmbeddingLoss("mean"), TypeError, "margin must be a number; got 'mean'"),
        (lambda: CosineEmbeddingLoss(0.0, 4.0), ValueError, "got 4.0"),
        (lambda: CosineEmbeddingLoss(negative_weight=0), ValueError, "must be positive; got 0"),
        (lambda: CosineEmbeddingLoss(negative_weight="4"), TypeError, "negative_weight must be"),
        (lambda: CosineSimilarity(eps=-1.0), RuntimeError, "non-negative; got -1.0"),
        (lambda: CosineSimilarity("1"), TypeError, "dim must be an integer; got '1'"),
        (lambda: functional.info_nce_loss(*Z, 0.07, "sum"), TypeError, "negatives must be a Tens"),
        (lambda: functional.info_nce_loss(*Z, 0.07, None, "sum"), TypeError, "symmetric must be"),
        (lambda: functional.nt_xent_loss(*Z, 0.5, 4096), ValueError, "got 4096"),
        (lambda: functional.nt_xent_loss(*Z, ignore=[0] * 6), TypeError, "ignore must be a Tensor"),
        (lambda: functional.nt_xent_loss(*Z, weight=[1] * 6), TypeError, "weight must be a Tensor"),
        (lambda: functional.sup_con_loss(Z[0], [0] * 6), TypeError, "labels must be a Tensor"),
        (
            lambda: functional.nt_xent_loss(*Z, torch.ones(2)),
            ValueError,
            r"a number or a 0-d tensor; got shape \(2,\)",
        ),
    ],
)
def test_a_mistake_is_named_at_once(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_one_positional_order():
    for module in CONTRASTIVE:
        loss = module(0.3, "sum")
        assert (loss.temperature, loss.reduction) == (0.3, "sum")
    loss = SigmoidContrastiveLoss(0.3, -3, "sum", learnable_temperature=False, learnable_bias=False)
    assert (loss.temperature, loss.bias, loss.reduction) == (0.3, -3, "sum")
    loss = CosineEmbeddingLoss(0.3, "sum")
    assert (loss.margin, loss.reduction) == (0.3, "sum")
    found = InfoNCELoss(0.3, "sum")(*Z)
    torch.testing.assert_close(found, functional.info_nce_loss(*Z, 0.3, reduction="sum"))


@pytest.mark.parametrize("number", [1, np.float32(0.5), np.float64(0.5), torch.tensor(0.5)])
@pytest.mark.parametrize("module", EVERY)
@pytest.mark.parametrize("learnable", [True, False])
def test_any_number_is_taken(module, number, learnable):
    loss = module(number, learnable_temperature=learnable)
    assert float(torch.as_tensor(loss.temperature).detach()) == pytest.approx(float(number))
    assert f"temperature={float(number):.4g}," in repr(loss)
    assert SigmoidContrastiveLoss(bias=-10).bias.dtype == torch.float32


@pytest.mark.parametrize("module", EVERY)
@pytest.mark.parametrize("learnable", [True, False])
def test_a_schedule_sets_the_temperature(module, learnable):
    loss = module(0.5, learnable_temperature=learnable)
    parameters = {id(p) for p in loss.parameters()}
    for how in ("temperature", "log_temperature"):
        for number in (0.2, torch.tensor(0.1), 1):
            value = math.log(number) if how == "log_temperature" else number
            setattr(loss, how, value)
            assert float(torch.as_tensor(loss.temperature).detach()) == pytest.approx(float(number))
            assert float(loss.log_temperature) == pytest.approx(math.log(number), abs=1e-6)
            bias = {"bias": -10.0} if module is SigmoidContrastiveLoss else {}
            call = getattr(functional, loss.function)
            there = call(*inputs(module), temperature=float(number), **bias)
            torch.testing.assert_close(loss(*inputs(module)).detach(), there)
    with pytest.raises(ValueError, match="temperature must be positive; got -1"):
        loss.temperature = -1
    assert {id(p) for p in loss.parameters()} == parameters
    loss.reset_parameters()
    if learnable:
        assert float(loss.temperature.detach()) == pytest.approx(0.5)


def test_a_bias_is_set():
    learnt, fixed = SigmoidContrastiveLoss(), SigmoidContrastiveLoss(learnable_bias=False)
    for loss in (learnt, fixed):
        loss.bias = -3
        assert float(loss.bias) == -3
    assert isinstance(learnt.bias, nn.Parameter)
    with pytest.raises(ValueError, match="bias must be finite"):
        learnt.bias = math.nan


@pytest.mark.parametrize("module", EVERY)
def test_state_dicts_of_either_shape(module):
    scalar = module(0.2, learnable_temperature=True)
    vector = module(0.4, learnable_temperature=True, scalar_parameters=False)
    assert all(p.shape == (1,) for p in vector.parameters())
    vector.load_state_dict(scalar.state_dict())
    assert float(vector.temperature.detach()) == pytest.approx(0.2)
    vector.temperature = 0.7
    scalar.load_state_dict(vector.state_dict())
    assert float(scalar.temperature.detach()) == pytest.approx(0.7)
    value = vector(*inputs(module))
    assert value.shape == ()
    torch.testing.assert_close(value, scalar(*inputs(module)))
    twin = vector.reference()(*inputs(module))
    torch.testing.assert_close(twin, value, rtol=1e-5, atol=1e-6)
