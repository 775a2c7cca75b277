"""What holds for every in-batch loss on every backend; what is a backend's own is in its folder."""

import pytest
import torch

from cosloss import functional, reference
from tests.losses import LOSSES, gradients, inputs, leaves
from tests.slow import slow

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter


FEW = ("nt_xent", "sup_con")
MATRICES = {"shared hard": 2, "directions": 4, "false negatives": 2, "hardness": 2}
MATRICES |= {"query bias": 2}  # one of the queries and one of the keys
MATRICES |= {name: 2 for name in LOSSES if name.startswith("dims")}  # one for each prefix
MATRICES |= {"dims, directions": 2 * MATRICES["directions"], "dims, sigmoid": 1 + 2}
OTHERS = [name for name in LOSSES if name not in FEW]


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]


def wide(tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


def assert_near(found, exact, rounding, floor=0.0):
    assert found.isfinite().all()
    assert (found - exact).abs().max() <= rounding * exact.abs().max() + floor


@pytest.mark.parametrize("temperature", [0.3, 0.004], ids=["unshifted", "shifted"])
def test_value_and_gradients_are_the_twins(backend, loss, temperature):
    tensors = leaves(backend.rows, 19, backend.dtype, temperature)
    value, grads = gradients(loss, functional, tensors)
    exact, exact_grads = gradients(loss, reference, wide(tensors))
    # logits of up to 1 / temperature are exact to that times eps
    *rows, temperatures = zip((value, *grads), (exact, *exact_grads), strict=True)
    for ours, twin in rows:
        assert_near(ours, twin, backend.rounding / temperature)
    # what sums terms of up to this size, which may cancel
    floor = torch.finfo(backend.dtype).eps / temperature**2
    assert_near(*temperatures, backend.rounding / temperature, floor)
    assert backend.computed


def test_backward_passes_share_the_workspace(backend, loss):
    first, second = leaves(7, dtype=backend.dtype), leaves(7, 4, backend.dtype)
    expected = gradients(loss, functional, first)[1]
    value = loss(functional, *first)
    other = loss(functional, *second)  # takes the workspace over
    weight = torch.linspace(0.37, 1.4, value.numel(), dtype=value.dtype).view_as(value)
    for _ in range(2):
        found = torch.autograd.grad(value, first, weight, retain_graph=True)
        for again, before in zip(found, expected, strict=True):
            assert_near(again, before, backend.rounding)
    found = torch.autograd.grad(other.sum(), second)
    leaves_of_twin = wide(second)
    exact = torch.autograd.grad(loss(reference, *leaves_of_twin).sum(), leaves_of_twin)
    for ours, twin in zip(found, exact, strict=True):
        assert_near(ours, twin, backend.rounding / 0.3)


def test_only_what_needs_a_gradient_gets_one(backend, loss):
    for wanted in range(3):
        tensors = inputs(backend.rows, 9, backend.dtype)
        tensors[wanted].requires_grad_()
        found = torch.autograd.grad(loss(functional, *tensors).sum(), tensors[wanted])
        twins = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
        exact = torch.autograd.grad(loss(reference, *twins).sum(), twins[wanted])
        assert_near(*found, *exact, backend.rounding / 0.3)


def test_no_gradient_is_computed_where_none_is_asked_for(backend, loss):
    z1, z2, temperature = leaves(dtype=backend.dtype)
    for given in ((z1, z2, temperature), (z1, z2, 0.3)):
        with torch.no_grad():
            value = loss(functional, *given)
        assert_near(value, loss(reference, *wide([z1, z2]), given[2]).detach(), backend.rounding)
    assert set(backend.computed) == {"forward"}


def test_second_derivatives_are_the_twins(backend, loss):
    tensors = leaves(dtype=backend.dtype)

    def penalty(module, tensors):
        _, grads = gradients(loss, module, tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)

    ours, twin = penalty(functional, tensors), penalty(reference, wide(tensors))
    for found, exact in zip(ours, twin, strict=True):
        assert exact.abs().sum() > 1e-3
        assert_near(found, exact, 8 * backend.rounding / 0.3**2)


def test_batched_gradients_are_the_single_ones(backend, loss):
    tensors = leaves(dtype=backend.dtype)
    value = loss(functional, *tensors).sum()
    weights = torch.tensor([1.0, -0.5], dtype=backend.dtype)
    batched = torch.autograd.grad(value, tensors, weights, is_grads_batched=True, retain_graph=True)
    single = torch.autograd.grad(value, tensors)
    for each, one in zip(batched, single, strict=True):
        weighted = torch.stack([one, -0.5 * one])
        assert_near(each, weighted, 4 * backend.rounding / 0.3)


def test_two_runs_give_the_same_bits(backend, loss):
    tensors = leaves(backend.rows, 19, backend.dtype)
    value, grads = gradients(loss, functional, tensors)
    again, grads_again = gradients(loss, functional, tensors)
    assert torch.equal(value, again)
    assert all(map(torch.equal, grads, grads_again))


def test_nan_makes_the_loss_nan(backend, loss):
    for temperature in (0.3, 0.004):
        z1, z2, temperature = inputs(20, 5, backend.dtype, temperature)
        z2[3, 2] = torch.nan
        assert loss(functional, z1, z2, temperature).isnan().all()


@pytest.mark.parametrize("loss", [*FEW, *slow(*OTHERS)], indirect=True)
def test_compiles_without_a_graph_break(backend, loss):
    torch._dynamo.reset()

    def function(*tensors):
        return loss(functional, *tensors).sum()

    tensors = leaves(20, 9, backend.dtype)
    value = torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors)
    found = torch.autograd.grad(0.37 * value, tensors)
    twins = wide(tensors)
    exact = loss(reference, *twins).sum()
    assert_near(value, exact, backend.rounding / 0.3)
    for ours, twin in zip(found, torch.autograd.grad(0.37 * exact, twins), strict=True):
        assert_near(ours, twin, backend.rounding / 0.3)
    if backend.module.__name__ == "cosloss.kernels.triton.in_batch":
        # whose kernels torch.compile calls, once for each matrix; a CPU's it does not
        matrices = [n for name, n in MATRICES.items() if loss is LOSSES[name]]
        assert [backend.computed.count("backward")] == (matrices or [1])


CHANGES = {
    "doubled": lambda g: 2 * g,
    "negated": lambda g: -g,
    "swapped rows": lambda g: g.flip(0),
    "last digits off": lambda g: g + torch.finfo(g.dtype).eps ** 0.6 * g.abs().mean(),
}


@pytest.mark.parametrize(
    ("loss", "change"),
    [
        *((name, change) for name in FEW for change in CHANGES),
        *slow(*((name, "last digits off") for name in OTHERS)),
    ],
    indirect=["loss"],
)
def test_the_judge_catches_a_wrong_gradient(backend, loss, change, monkeypatch):
    change = CHANGES[change]

    def planted(grads):
        return [None if grads[0] is None else change(grads[0]), *grads[1:]]

    backward = backend.module.backward
    monkeypatch.setattr(backend.module, "backward", lambda *a, **k: planted(backward(*a, **k)))
    if hasattr(backend.module, "forward_backward"):
        both = backend.module.forward_backward

        def wrong_both(*arguments, **keywords):
            *rest, grads = both(*arguments, **keywords)
            return *rest, planted(grads)

        monkeypatch.setattr(backend.module, "forward_backward", wrong_both)
    if backend.module.REACHES_INPUTS:
        reach = backend.module.input_grads

        def wrong_inputs(*arguments, **keywords):
            found = reach(*arguments, **keywords)
            return found._replace(sources=planted(found.sources))

        monkeypatch.setattr(backend.module, "input_grads", wrong_inputs)
    with pytest.raises(AssertionError):
        test_value_and_gradients_are_the_twins(backend, loss, 0.3)
