"""Each loss against its twin, value and gradient, at generic points, in float64."""

import pytest
import torch

from cosloss import functional, reference

TARGET = torch.tensor([1, -1, 1, -1, -1])
CASES = {
    "cosine_similarity": lambda m, a, b: m.cosine_similarity(a, b),
    "cosine_embedding_loss": lambda m, a, b: m.cosine_embedding_loss(a, b, TARGET, 0.1, "none"),
    "in_batch_cosine_embedding_loss": lambda m, a, b: m.cosine_embedding_loss(
        a, b, margin=0.1, reduction="none"
    ),
    "nt_xent_loss": lambda m, a, b: m.nt_xent_loss(a, b, 0.3, "none"),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def views():
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(5, 7, dtype=torch.float64, generator=generator).requires_grad_()
        for _ in range(2)
    )


def test_equals_its_twin(case, views):
    ours, twin = case(functional, *views), case(reference, *views)
    weight = torch.linspace(0.37, -1.1, ours.numel(), dtype=torch.float64)
    torch.testing.assert_close(ours, twin)
    torch.testing.assert_close(
        torch.autograd.grad(ours, views, weight), torch.autograd.grad(twin, views, weight)
    )


def test_finite_differences(case, views):
    assert torch.autograd.gradcheck(lambda a, b: case(functional, a, b), views)
    assert torch.autograd.gradgradcheck(lambda a, b: case(functional, a, b), views)
