"""Meta and fake tensors: shapes without numbers, in every function and module."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from cosloss import (
    CosineEmbeddingLoss,
    InfoNCELoss,
    MaxSimLoss,
    NTXentLoss,
    SigmoidContrastiveLoss,
    SupConLoss,
    functional,
    losses,
)
from tests.surroundings.calls import CALLS, arguments, error, found, learnt

LEARNABLE = [NTXentLoss, InfoNCELoss, SupConLoss, MaxSimLoss, SigmoidContrastiveLoss]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_meta_tensors(name, dtype):
    given = arguments(dtype)
    like = found(name, given)
    on_meta = {k: x.detach().to("meta").requires_grad_(x.requires_grad) for k, x in given.items()}
    value = CALLS[name].function(functional, on_meta)
    grads = torch.autograd.grad(value.sum(), learnt(name, on_meta))
    for empty, real in zip((value, *grads), like, strict=True):
        assert (empty.shape, empty.dtype, empty.device.type) == (real.shape, real.dtype, "meta")


@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors(name):
    given = arguments()
    like = found(name, given)
    plain = {k: x.detach() for k, x in given.items()}
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(x) for k, x in plain.items()}
        for k, x in fake.items():
            x.requires_grad_(given[k].requires_grad)
        value = CALLS[name].function(functional, fake)
        grads = torch.autograd.grad(value.sum(), learnt(name, fake))
    assert [x.shape for x in (value, *grads)] == [x.shape for x in like]


@pytest.mark.parametrize("mode", ["real", "fake"])
@pytest.mark.parametrize("name", CALLS)
def test_make_fx(name, mode):
    given = arguments()
    like = found(name, given)

    def step(given):
        return found(name, given)

    traced = make_fx(step, tracing_mode=mode)({k: given[k] for k in CALLS[name].names})
    assert error(traced({k: given[k] for k in CALLS[name].names}), like) < 2e-6


@pytest.mark.parametrize("scalar_parameters", [True, False])
@pytest.mark.parametrize("module", LEARNABLE)
def test_a_module_is_made_on_meta_and_filled_later(module, scalar_parameters):
    arguments_ = {"learnable_temperature": True, "scalar_parameters": scalar_parameters}
    there = module(0.3, device="meta", **arguments_)
    here = module(0.3, **arguments_)
    assert repr(there) == repr(here)
    there.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in there.parameters():
            parameter.fill_(torch.nan)
    there.reset_parameters()
    assert there.state_dict() == here.state_dict()
    assert float(there.temperature.detach()) == pytest.approx(0.3)


def test_a_module_is_shown_without_a_warning(recwarn):
    for module in LEARNABLE:
        for dtype, shown in ((torch.float32, "0.25"), (torch.bfloat16, "0.2509")):
            loss = module(0.25, learnable_temperature=True, dtype=dtype)
            assert f"temperature={shown}, " in repr(loss)
            assert "learnable_temperature=True" in repr(loss)
    assert "bias=-10, " in repr(SigmoidContrastiveLoss())
    for module in (CosineEmbeddingLoss, *LEARNABLE):
        assert "gather_distributed" not in repr(module())
        for gather in (True, "ring") if module is not MaxSimLoss else ():
            assert f"gather_distributed={gather!r}" in repr(module(gather_distributed=gather))
    assert not recwarn.list


def test_sup_con_keeps_no_buffer():
    loss = SupConLoss()
    assert not [*loss.buffers()]
    assert loss.rows_without_positive is None
    z, labels = torch.randn(6, 4), torch.tensor([0, 0, 1, 2, 2, 3])
    with torch.inference_mode():
        loss(z.clone(), labels.clone())
    assert loss.rows_without_positive == 2
    assert not loss.rows_without_positive.is_inference()
    loss(z.requires_grad_(), labels).backward()
    copy.deepcopy(loss)
    torch.compile(loss, backend="eager", fullgraph=True)(z, labels)


def test_every_module_of_the_library_is_here():
    modules = {getattr(losses, name) for name in losses.__all__} - {losses.MemoryBank}
    assert modules == {*LEARNABLE, CosineEmbeddingLoss, losses.CosineSimilarity}
