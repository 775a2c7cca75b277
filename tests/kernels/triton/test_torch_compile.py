"""Under torch.compile the kernels are custom ops: no graph break, opcheck's rules, same numbers."""

import pytest
import torch

from cosloss import functional, reference
from cosloss.criteria import CosineEmbedding, CrossEntropy, SigmoidContrast
from cosloss.kernels.triton import cosine_similarity
from cosloss.ops import custom_ops
from cosloss.problem import Mask, PositiveMask, Problem

LABELS = torch.arange(20) % 5
FUNCTIONS = {
    "cosine_similarity": lambda m, a, b, t: m.cosine_similarity(a, b) * t,
    "cosine_embedding_loss": lambda m, a, b, t: (
        m.cosine_embedding_loss(a, b, LABELS % 2 * 2.0 - 1, 0.1) * t
    ),
}

pytestmark = [
    pytest.mark.usefixtures("triton_backend"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, in the interpreter
]


def leaves():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 20, 9, generator=generator)
    return [x.requires_grad_() for x in (a, 0.6 * a + b, torch.tensor(0.3))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_graph_break_and_the_twins_numbers(name, monkeypatch):
    torch._dynamo.reset()
    calls = []
    backward = cosine_similarity.backward
    monkeypatch.setattr(
        cosine_similarity, "backward", lambda *a, **k: calls.append(backward) or backward(*a, **k)
    )

    def call(*tensors):
        return FUNCTIONS[name](functional, *tensors).sum()

    tensors = leaves()
    value = torch.compile(call, fullgraph=True, backend="aot_eager")(*tensors)
    twin = FUNCTIONS[name](reference, *tensors).sum()
    torch.testing.assert_close(value, twin)
    torch.testing.assert_close(
        torch.autograd.grad(0.37 * value, tensors), torch.autograd.grad(0.37 * twin, tensors)
    )
    assert len(calls) == 1


def test_sup_con_on_tight_clusters_errs_no_more_than_the_twin():
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 4
    z = torch.randn(4, 16, generator=generator)[labels]
    z = z + 0.001 * torch.randn(64, 16, generator=generator)

    def gradient(loss, z):
        z = z.clone().requires_grad_()
        return torch.autograd.grad(loss(z, labels), z)[0]

    exact = gradient(reference.sup_con_loss, z.double())
    twin = gradient(reference.sup_con_loss, z)
    compiled = torch.compile(functional.sup_con_loss, fullgraph=True, backend="aot_eager")
    error = (gradient(compiled, z) - exact).norm()
    assert error <= 2 * (twin - exact).norm()


def arguments():
    r, c = 0.5 * torch.randn(2, 18, 9, generator=torch.Generator().manual_seed(0))
    ids, views = LABELS[:18], Mask((0, 9, -9))
    of_class = PositiveMask(ids, ids, torch.full((18,), 3.0))
    given = (r * r.flip(0)).sum(1)
    small, any_size = CrossEntropy(10.0), CrossEntropy()
    for rows, columns, bias, pair, problem in (
        (r, None, None, given, Problem(small, views, True)),
        (r, None, None, given, Problem(any_size, Mask((), (ids, ids), (ids % 2, ids % 2)), True)),
        (r, None, None, None, Problem(small, Mask((0,)), True, positives=of_class)),
        (r, c, torch.tensor(0.2), given, Problem(SigmoidContrast(), Mask((0,)), False)),
        (r, c, None, given, Problem(small, Mask((0,), row_limits=given), False)),
        (r, None, None, given, Problem(CosineEmbedding(0.1, 3), views, True)),
    ):
        leaves = (
            None if x is None else x.clone().requires_grad_() for x in (rows, columns, bias, pair)
        )
        tensors, spec, margin = problem.flatten()
        yield *leaves, tensors, [0, *spec], margin


@pytest.mark.slow
def test_opcheck():
    a, b, _ = leaves()
    for distance in (False, True):
        torch.library.opcheck(custom_ops.cosine_similarity, (a, b, 1e-8, distance))
    for case in arguments():
        torch.library.opcheck(custom_ops._stats, case)


def test_every_transform_but_compile_is_eagers():
    a, b, t = (x.detach() for x in leaves())

    def call(a, b):
        return functional.nt_xent_loss(a, b, t) + functional.cosine_similarity(a, b).sum()

    def twin(a, b):
        return reference.nt_xent_loss(a, b, t) + reference.cosine_similarity(a, b).sum()

    for transform in (torch.func.grad, torch.func.jacfwd):
        torch.testing.assert_close(transform(call)(a, b), transform(twin)(a, b))
    stacked = torch.stack([a, b]), torch.stack([b, a])
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(call))(*stacked),
        torch.func.vmap(torch.func.grad(twin))(*stacked),
    )
