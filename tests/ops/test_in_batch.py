"""The engine: tiles against the whole matrix, every mode of differentiation, and determinism."""

import pytest
import torch
from torch.autograd import forward_ad

from cosloss import functional, reference
from cosloss.kernels import tiles
from cosloss.kernels.eager import in_batch
from cosloss.kernels.native import in_batch as native
from cosloss.testing.contrastive import OPS
from tests.slow import slow

LABELS = torch.arange(11) % 4
LOSSES = {
    "nt_xent": lambda m, a, b, t: m.nt_xent_loss(a, b, t),
    "decoupled": lambda m, a, b, t: m.nt_xent_loss(a, b, t, "none", decoupled=True),
    "ignore": lambda m, a, b, t: m.nt_xent_loss(a, b, t, ignore=LABELS[: len(a)]),
    "in_batch_cosine": lambda m, a, b, t: m.in_batch_cosine_embedding_loss(a, b, 0.1) * t,
    "info_nce": lambda m, a, b, t: m.info_nce_loss(a, b, t),
    "symmetric": lambda m, a, b, t: m.info_nce_loss(a, b, t, symmetric=True, reduction="none"),
    "queue": lambda m, a, b, t: m.info_nce_loss(a, b, t, torch.cat([a, b, a * b])),
    "sup_con": lambda m, a, b, t: m.sup_con_loss(a + b, LABELS[: len(a)], t),
    "sigmoid": lambda m, a, b, t: m.sigmoid_contrastive_loss(a, b, t, 0.3 - 2 * t),
}


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]


def inputs(rows=5, columns=3, dtype=torch.float64, temperature=0.3):
    generator = torch.Generator().manual_seed(rows)
    z1, z2 = torch.randn(2, rows, columns, dtype=torch.float64, generator=generator).to(dtype)
    return z1, 0.6 * z1 + z2, torch.tensor(temperature, dtype=dtype)


def leaves(*arguments, **keywords):
    return [x.requires_grad_() for x in inputs(*arguments, **keywords)]


def gradients(loss, module, tensors, create_graph=False):
    value = loss(module, *tensors)
    weight = torch.linspace(0.37, 1.4, value.numel(), dtype=value.dtype).view_as(value)
    return value, torch.autograd.grad(value, tensors, weight, create_graph=create_graph)


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


def test_backward_passes_share_the_workspace(loss):
    first, second = leaves(rows=7), leaves(rows=7, columns=4)
    expected = gradients(loss, functional, first)[1]
    value = loss(functional, *first)
    other = loss(functional, *second)  # takes the workspace over
    for _ in range(2):
        weight = torch.linspace(0.37, 1.4, value.numel(), dtype=value.dtype).view_as(value)
        found = torch.autograd.grad(value, first, weight, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    other.sum().backward()
    twin = torch.autograd.grad(loss(reference, *second).sum(), second)
    torch.testing.assert_close([x.grad for x in second], list(twin), rtol=1e-12, atol=1e-12)


def test_gradcheck_in_every_mode(loss):
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


def test_second_derivative_is_the_twins(loss):
    def penalty(module, tensors):
        _, grads = gradients(loss, module, tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)

    tensors = leaves()
    ours, twin = penalty(functional, tensors), penalty(reference, tensors)
    torch.testing.assert_close(ours, twin, rtol=1e-10, atol=1e-10)
    assert all(x.abs().sum() > 1e-3 for x in ours)


FEW = ("nt_xent", "symmetric", "queue", "sup_con")


@pytest.mark.parametrize("loss", [*FEW, *slow(*sorted(LOSSES.keys() - FEW))], indirect=True)
def test_compiles_without_a_graph_break(loss):
    torch._dynamo.reset()

    def function(*tensors):
        return loss(functional, *tensors).sum()

    tensors = leaves()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors)
    torch.testing.assert_close(compiled, function(*tensors))
    torch.testing.assert_close(
        torch.autograd.grad(compiled, tensors), torch.autograd.grad(function(*tensors), tensors)
    )


def test_two_runs_give_the_same_bits(loss, monkeypatch):
    monkeypatch.setattr(tiles, "LARGEST_SIDE", 16)
    tensors = leaves(rows=11, columns=40, dtype=torch.float32)
    value, grads = gradients(loss, functional, tensors)
    for _ in range(3):
        again, grads_again = gradients(loss, functional, tensors)
        assert torch.equal(value, again)
        assert all(torch.equal(g, h) for g, h in zip(grads, grads_again, strict=True))


def test_only_what_needs_a_gradient_gets_one(loss):
    for wanted in range(3):
        tensors = inputs()
        tensors[wanted].requires_grad_()
        value = loss(functional, *tensors).sum()
        expected = torch.autograd.grad(loss(reference, *tensors).sum(), tensors[wanted])
        torch.testing.assert_close(torch.autograd.grad(value, tensors[wanted]), expected)


def test_no_gradient_is_computed_where_none_is_asked_for(loss, monkeypatch):
    for engine in (in_batch, native):
        monkeypatch.setattr(engine, "forward_backward", None)
    for dtype in (torch.float32, torch.float64):
        z1, z2, temperature = leaves(dtype=dtype)
        for given in ((z1, z2, temperature), (z1, z2, 0.3)):
            with torch.no_grad():
                value = loss(functional, *given)
            torch.testing.assert_close(value, loss(reference, *given).detach())


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


def _fails(monkeypatch, change):
    backward, both = in_batch.backward, in_batch.forward_backward

    def wrong(grad_r, *others):
        return change(grad_r), *others

    def wrong_both(*arguments, **keywords):
        total, grad_positive, found = both(*arguments, **keywords)
        return total, grad_positive, wrong(*found)

    monkeypatch.setattr(in_batch, "backward", lambda *a, **k: wrong(*backward(*a, **k)))
    monkeypatch.setattr(in_batch, "forward_backward", wrong_both)


@pytest.mark.parametrize(
    "change",
    [lambda g: 2 * g, lambda g: -g, lambda g: g.flip(0), lambda g: g + 1e-6 * g.abs().mean()],
    ids=["doubled", "negated", "swapped rows", "one millionth off"],
)
def test_the_judges_catch_a_wrong_gradient(change, monkeypatch):
    _fails(monkeypatch, change)
    tensors = leaves()
    for loss in LOSSES.values():
        ours, twin = gradients(loss, functional, tensors), gradients(loss, reference, tensors)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(ours, twin, rtol=1e-11, atol=1e-11)


def test_the_table_has_every_loss():
    assert {op.function for op in OPS} == {
        functional.nt_xent_loss,
        functional.in_batch_cosine_embedding_loss,
        functional.info_nce_loss,
        functional.sup_con_loss,
        functional.sigmoid_contrastive_loss,
    }
