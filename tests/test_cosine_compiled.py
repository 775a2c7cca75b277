"""Cosine similarity and its losses under torch.compile and torch.export."""

import pytest
import torch
from torch.func import grad, jvp, vmap

from cosloss import functional, reference
from cosloss.kernels import native
from cosloss.kernels.eager import cosine_similarity as kernel
from tests.slow import slow

TARGET = torch.tensor([1, -1, 1, -1, -1, 1])
CASES = {
    "cosine_similarity": lambda m, a, b: m.cosine_similarity(a, b),
    "pairwise": lambda m, a, b: m.pairwise_cosine_similarity(a, b),
    "embedding": lambda m, a, b: m.cosine_embedding_loss(
        a, b, TARGET[: a.shape[0]], 0.1, reduction="sum"
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    torch.compiler.reset()
    return CASES[request.param]


def pair(rows: int = 6, columns: int = 9):
    generator = torch.Generator().manual_seed(5)
    a, b = torch.randn(2, rows, columns, generator=generator)
    return a.requires_grad_(), (a + b).detach().requires_grad_()


def value_and_gradients(function, a, b):
    out = function(a, b)
    weight = torch.linspace(0.37, 1.1, out.numel()).view_as(out)
    return out.detach(), *torch.autograd.grad(out, (a, b), weight)


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_no_graph_break(case, backend, request):
    if backend == "inductor" and "embedding" not in request.node.name:
        pytest.skip("one op goes through Inductor's compiler, for time; all through its front end")
    a, b = pair()
    compiled = torch.compile(lambda a, b: case(functional, a, b), fullgraph=True, backend=backend)
    expected = value_and_gradients(lambda a, b: case(reference, a, b), a, b)
    torch.testing.assert_close(value_and_gradients(compiled, a, b), expected)


def test_dynamic_shapes(case):
    compiled = torch.compile(
        lambda a, b: case(functional, a, b), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows, columns in ((6, 9), (4, 3), (5, 17)):
        a, b = pair(rows, columns)
        expected = value_and_gradients(lambda a, b: case(reference, a, b), a, b)
        torch.testing.assert_close(value_and_gradients(compiled, a, b), expected)


@pytest.mark.parametrize(
    "case", ["embedding", *slow("cosine_similarity", "pairwise")], indirect=True
)
def test_transforms_inside_compile(case):
    a, b = (x.detach() for x in pair())

    def transforms(module):
        def scalar(a, b):
            return case(module, a, b).sin().sum()

        def all_of_them(a, b):
            gradient = grad(scalar, argnums=(0, 1))(a, b)
            tangent = jvp(lambda a: case(module, a, b), (a,), (b,))[1]
            stacked = torch.stack([a, 2 * a + b])
            mapped = vmap(lambda a: case(module, a, b))(stacked)
            return *gradient, tangent, mapped

        return all_of_them

    compiled = torch.compile(transforms(functional), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b), transforms(reference)(a, b))


def test_zero_rows_and_the_eps_ball_compiled():
    a, b = pair()
    with torch.no_grad():
        a[1], a[2] = 0, 1e-9 * a[2]
    compiled = torch.compile(functional.cosine_similarity, fullgraph=True, backend="aot_eager")
    expected = value_and_gradients(reference.cosine_similarity, a, b)
    torch.testing.assert_close(value_and_gradients(compiled, a, b), expected)


def test_an_invalid_target_is_nan_where_it_cannot_be_raised():
    a, b = pair()
    compiled = torch.compile(functional.cosine_embedding_loss, fullgraph=True, backend="aot_eager")
    loss = compiled(a, b, torch.tensor([1, 0, 1, -1, -1, 1]), reduction="none")
    assert loss.isnan().tolist() == [False, True, False, False, False, False]
    loss.sum().backward()
    assert a.grad.isnan().any(1).tolist() == [False, True, False, False, False, False]


def test_export(case):
    class Module(torch.nn.Module):
        def forward(self, a, b):
            return case(functional, a, b)

    a, b = (x.detach() for x in pair())
    exported = torch.export.export(Module(), (a, b)).module()
    torch.testing.assert_close(exported(a, b), case(reference, a, b))


def test_the_analytic_backward_is_what_runs_in_eager_mode(monkeypatch):
    a, b = pair()

    def gradients():
        def scalar(a, b):
            return functional.cosine_similarity(a, b).sum()

        return {
            "backward": torch.autograd.grad(scalar(a, b), a)[0],
            "func.grad": grad(scalar)(a.detach(), b.detach()),
            "vmap of grad": vmap(grad(lambda a, b: scalar(a[None], b[None])))(a, b).detach(),
            "create_graph": torch.autograd.grad(scalar(a, b), a, create_graph=True)[0].detach(),
            "no gradient on the other": torch.autograd.grad(scalar(a, b.detach()), a)[0],
            "compiled": torch.autograd.grad(compiled(a, b).sum(), a)[0],
        }

    compiled = torch.compile(functional.cosine_similarity, fullgraph=True, backend="aot_eager")
    right = gradients()

    def planted(original):
        return lambda *args: tuple(None if g is None else 1.5 * g for g in original(*args))

    for module in (kernel, native.cosine_similarity):
        monkeypatch.setattr(module, "backward", planted(module.backward))
    wrong = gradients()
    torch.testing.assert_close(wrong.pop("compiled"), right.pop("compiled"))  # Inductor's own
    torch.testing.assert_close(wrong, {name: 1.5 * g for name, g in right.items()})
