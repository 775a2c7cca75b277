"""The engine: tiles against the whole matrix, every mode of differentiation, and determinism."""

import pytest
import torch
from torch.autograd import forward_ad

from cosloss import functional, ops, reference
from cosloss.kernels import tiles
from cosloss.kernels.eager import unit_rows
from cosloss.testing.contrastive import OPS
from tests.losses import LABELS, LOSSES, gradients, inputs, leaves


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]


@pytest.mark.parametrize("kept_bytes", [0, 2**20], ids=["computed again", "kept"])
@pytest.mark.parametrize("temperature", [0.3, 0.004], ids=["unshifted", "shifted"])
@pytest.mark.parametrize("side", [4, 16])
def test_tiles_equal_the_twin(loss, side, temperature, kept_bytes, monkeypatch):
    monkeypatch.setattr(tiles, "LARGEST_SIDE", side)
    monkeypatch.setattr(tiles, "BAND", 4 * side)
    monkeypatch.setattr(tiles, "KEPT_BYTES", kept_bytes)
    tensors = leaves(rows=11, columns=5, temperature=temperature)
    ours, twin = gradients(loss, functional, tensors), gradients(loss, reference, tensors)
    # logits of up to 1 / temperature are exact to that times eps
    torch.testing.assert_close(ours, twin, rtol=1e-11, atol=1e-11)


def test_gradcheck_in_every_mode(loss):
    if loss is LOSSES["hardness"]:
        pytest.skip("its gradient is stopped: finite differences see the whole")

    def function(*tensors):
        return loss(functional, *tensors)

    modes = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(function, leaves(3), **modes, check_batched_forward_grad=True)
    assert torch.autograd.gradgradcheck(function, leaves(3))


def test_torch_func(loss):
    tensors = inputs()

    def ours(*tensors):
        return loss(functional, *tensors).sum()

    def twin(*tensors):
        return loss(reference, *tensors).sum()

    argnums = (0, 1, 2)
    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
        torch.testing.assert_close(
            transform(ours, argnums)(*tensors),
            transform(twin, argnums)(*tensors),
            rtol=1e-9,
            atol=1e-9,
        )
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, torch.full_like(x, 0.7)) for x in tensors]
        tangents = [forward_ad.unpack_dual(f(*duals)).tangent for f in (ours, twin)]
    torch.testing.assert_close(*tangents)


def test_vmap_over_a_batch_of_batches(loss):
    batches = [inputs(rows=5), (*inputs(rows=5)[:2][::-1], torch.tensor(0.9).double())]
    stacked = [torch.stack(x) for x in zip(*batches, strict=True)]

    def function(*tensors):
        return loss(functional, *tensors).sum()

    values = torch.func.vmap(function)(*stacked)
    grads = torch.func.vmap(torch.func.grad(function))(*stacked)
    for batch, value, grad in zip(batches, values, grads, strict=True):
        torch.testing.assert_close(value, function(*batch))
        torch.testing.assert_close(grad, torch.func.grad(function)(*batch))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "queue", "sup_con", "sigmoid"])
def test_one_function_is_all_that_learnable_scalars_go_through(name, reduction):
    z1, z2, temperature = leaves(dtype=torch.float32)
    bias = torch.tensor(-1.5, requires_grad=True)
    value = {
        "nt_xent": lambda: functional.nt_xent_loss(z1, z2, temperature, reduction),
        "info_nce": lambda: functional.info_nce_loss(z1, z2, temperature, reduction=reduction),
        "queue": lambda: functional.info_nce_loss(
            z1, z2, temperature, torch.cat([z1, z2]).detach(), reduction=reduction
        ),
        "sup_con": lambda: functional.sup_con_loss(z1, LABELS[:5], temperature, "mean"),
        "sigmoid": lambda: functional.sigmoid_contrastive_loss(
            z1, z2, temperature, bias, reduction
        ),
    }[name]()
    assert value.grad_fn.name() == "InBatchBackward"
    inputs = {node.name() for node, _ in value.grad_fn.next_functions if node is not None}
    assert inputs <= {
        "torch::autograd::AccumulateGrad",
        "ViewBackward0",
    }  # a number is viewed as 0-d


def test_the_table_has_every_loss():
    assert {op.function for op in OPS} == {
        functional.nt_xent_loss,
        functional.in_batch_cosine_embedding_loss,
        functional.info_nce_loss,
        functional.sup_con_loss,
        functional.sigmoid_contrastive_loss,
    }


@pytest.mark.parametrize("name", ["each", "key bias", "symmetric", "decoupled"])
@pytest.mark.parametrize("kept", [True, False])
def test_small_operands_are_kept_for_the_backward_pass(name, kept, monkeypatch):
    loss, tensors = LOSSES[name], leaves(7, 5)
    _, expected = gradients(loss, functional, tensors)
    if not kept:
        monkeypatch.setattr(ops.in_batch, "KEPT_BYTES", 0)
    calls, forward = [], unit_rows.forward
    monkeypatch.setattr(unit_rows, "forward", lambda *a, **k: calls.append(a) or forward(*a, **k))
    value = loss(functional, *tensors)
    weight = torch.linspace(0.37, 1.4, value.numel(), dtype=value.dtype)
    for repeated in (1, 2):  # nothing of it is gone after the first
        found = torch.autograd.grad(value, tensors, weight, retain_graph=True)
        assert all(map(torch.equal, found, expected))
        assert len(calls) == (1 if kept else 1 + repeated)
