"""torch.func transforms, over the arguments of a loss or over anything else around it."""

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from cosloss import NTXentLoss, SigmoidContrastiveLoss, functional
from cosloss.kernels import dispatch
from tests.surroundings.calls import CALLS, arguments, error, expected, incoming

ONE = torch.tensor([0.5, 2.0], dtype=torch.float64)
UNRELATED = {
    "grad": lambda f, w: grad(lambda w: f(w).sum())(w),
    "jacrev": lambda f, w: jacrev(lambda w: f(w).sum())(w),
    "jacfwd": lambda f, w: jacfwd(lambda w: f(w).sum())(w),
    "hessian": lambda f, w: hessian(lambda w: (w * f(w)).sum())(w).diagonal() / 2,
    "jvp": lambda f, w: jvp(f, (w,), (torch.ones_like(w),))[1],
    "vmap": lambda f, w: vmap(lambda w: f(w) / w)(w),
}


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("needs", [True, False], ids=["requires_grad", "plain"])
@pytest.mark.parametrize("transform", UNRELATED)
@pytest.mark.parametrize("name", CALLS)
def test_around_plain_embeddings(name, transform, needs, backend):
    given = {k: x.detach() if not needs else x for k, x in arguments().items()}
    with dispatch.use(backend):
        total = CALLS[name].function(functional, given).sum().detach().double()
        around = UNRELATED[transform](
            lambda w: w * CALLS[name].function(functional, given).sum().to(w.dtype), ONE
        )
    torch.testing.assert_close(around.detach(), total.expand(2), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_the_arguments(name):
    given = arguments(torch.float64)
    exact = expected(name, given)
    names = [k for k in CALLS[name].names if given[k].requires_grad]
    plain = {k: x.detach() for k, x in given.items()}
    upstream = incoming(exact[0])

    def weighted(*inputs):
        return (
            CALLS[name].function(functional, plain | dict(zip(names, inputs, strict=True)))
            * upstream
        ).sum()

    inputs = [plain[k] for k in names]
    places = tuple(range(len(names)))
    for transform in (grad, jacrev, jacfwd):
        assert error(transform(weighted, places)(*inputs), exact[1:]) < 1e-11, transform
    curved = hessian(weighted)(*inputs)
    assert curved.shape == (*inputs[0].shape, *inputs[0].shape)
    torch.testing.assert_close(
        curved, torch.autograd.functional.hessian(lambda x: weighted(x, *inputs[1:]), inputs[0])
    )


@pytest.mark.parametrize("which", "abTBwgly")
def test_vmap_over_one_argument_alone(which):
    given = {k: x.detach() for k, x in arguments(torch.float64).items()}
    other = {"g": given["g"].flip(0), "l": given["l"].roll(1, 0), "y": -given["y"]}.get(
        which, 0.7 * given[which]
    )
    stack = torch.stack([given[which], other])
    for name, call in CALLS.items():
        if which not in call.names:
            continue

        def one(x, call=call):
            return call.function(functional, given | {which: x})

        together = vmap(one)(stack)
        torch.testing.assert_close(together, torch.stack([one(x) for x in stack]), msg=name)


@pytest.mark.parametrize("module", [NTXentLoss, SigmoidContrastiveLoss])
def test_functional_call_of_a_module(module):
    given = arguments(torch.float64)
    loss = module(learnable_temperature=True, dtype=torch.float64)
    parameters = {k: p.detach() for k, p in loss.named_parameters()}

    def value(parameters, a, b):
        return functional_call(loss, parameters, (a, b))

    found, of_a = grad(value, (0, 1))(parameters, given["a"].detach(), given["b"].detach())
    loss(given["a"], given["b"]).backward()
    torch.testing.assert_close(found, {k: p.grad for k, p in loss.named_parameters()})
    torch.testing.assert_close(of_a, given["a"].grad)


def test_per_sample_gradients_of_an_encoder():
    weight = torch.randn(8, 4, dtype=torch.float64)
    views = torch.randn(3, 2, 6, 8, dtype=torch.float64)

    def loss(weight, pair):
        return functional.nt_xent_loss(pair[0] @ weight, pair[1] @ weight)

    together = vmap(grad(loss), (None, 0))(weight, views)
    for found, pair in zip(together, views, strict=True):
        leaf = weight.clone().requires_grad_()
        (expected_,) = torch.autograd.grad(loss(leaf, pair), leaf)
        torch.testing.assert_close(found, expected_)
