"""What the tests of the compiled kernels share: every build of them, or none."""

import pytest
import torch

from cosloss.kernels.native import library


@pytest.fixture(autouse=True)
def compiled():
    """The kernels are there; whether they have to be is asked in test_dispatch.py."""
    if library.loaded() is None:
        pytest.skip("the kernels are not compiled")


@pytest.fixture(params=library.usable())
def build(request, monkeypatch):
    """Each build that this CPU runs, in turn, as the one that is loaded."""
    monkeypatch.setattr(library, "usable", lambda: (request.param,))
    yield from forgotten()


@pytest.fixture
def no_build(monkeypatch):
    """An installation without a compiler."""
    monkeypatch.setattr(library, "usable", tuple)
    yield from forgotten()


def forgotten():
    found = [cached for cached in vars(library).values() if hasattr(cached, "cache_clear")]
    for cached in found:
        cached.cache_clear()
    yield
    for cached in found:
        cached.cache_clear()


@pytest.fixture
def values_and_gradients():
    """values_and_gradients(function, *inputs): its value, and gradients from a generic one."""

    def run(function, *inputs, **keywords):
        inputs = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
        value = function(*inputs, **keywords)
        grad = torch.linspace(0.37, -1.1, value.numel(), dtype=value.dtype).view_as(value)
        leaves = [x for x in inputs if x.requires_grad]
        return value, *torch.autograd.grad(value, leaves, grad)

    return run
