"""Memory that is kept from call to call."""

import threading

import pytest
import torch

from cosloss import nt_xent_loss, release_memory
from cosloss.kernels import scratch as module
from cosloss.kernels.scratch import Workspace

FLOAT = torch.empty(0)


@pytest.fixture
def workspace():
    return Workspace()


def test_the_same_use_finds_the_same_memory_in_any_dtype(workspace):
    first = workspace.scratch("a", (30, 4), FLOAT)
    again = workspace.scratch("a", (60, 2), FLOAT.int())
    assert again.shape == (60, 2)
    assert again.dtype == torch.int32
    assert again.data_ptr() == first.data_ptr()


def test_uses_do_not_share_memory(workspace):
    first = workspace.scratch("a", (100,), FLOAT).zero_()
    workspace.scratch("b", (100,), FLOAT).fill_(1)
    assert (first == 0).all()


def test_threads_do_not_share_memory(workspace):
    first = workspace.scratch("a", (100,), FLOAT).zero_()
    other = threading.Thread(target=lambda: workspace.scratch("a", (100,), FLOAT).fill_(1))
    other.start()
    other.join()
    assert (first == 0).all()


def test_memory_grows_as_needed_and_shrinks_when_most_of_it_is_idle(workspace):
    def bytes_held(elements):
        return workspace.scratch("a", (elements,), FLOAT).untyped_storage().nbytes()

    assert [bytes_held(n) for n in (100, 200, 60, 10)] == [400, 800, 800, 40]


def test_large_scratch_memory_is_not_kept(workspace, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_SCRATCH", 400)
    kept = workspace.scratch("a", (100,), FLOAT)
    large = workspace.scratch("a", (101,), FLOAT)
    assert large.data_ptr() != kept.data_ptr()
    assert workspace.scratch("a", (101,), FLOAT).data_ptr() != large.data_ptr()
    wider = workspace.scratch("a", (101,), FLOAT, largest=404)
    assert workspace.scratch("a", (101,), FLOAT, largest=404).data_ptr() == wider.data_ptr()


def test_one_use_or_all_memory_is_handed_back(workspace):
    for use in "abc":
        workspace.scratch(use, (100,), FLOAT)
    workspace.release("b")
    assert set(workspace._buffers) == {"a", "c"}
    workspace.release()
    assert not workspace._buffers


def test_a_loss_keeps_the_memory_of_its_tiles_until_it_is_handed_back():
    z1, z2 = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0))
    loss = nt_xent_loss(z1.requires_grad_(), z2, 0.5)
    assert "tiles" in module.workspace._buffers
    release_memory()
    assert not module.workspace._buffers
    (found,) = torch.autograd.grad(loss, z1, retain_graph=True)
    (again,) = torch.autograd.grad(loss, z1)
    assert torch.equal(found, again)


def test_memory_that_an_evaluation_made_may_be_written_to_by_training(workspace):
    with torch.inference_mode():
        workspace.scratch("some", (3, 4), torch.empty(0, dtype=torch.float64))
    assert not workspace.scratch("some", (3, 4), torch.empty(0, dtype=torch.float64)).is_inference()
    with torch.inference_mode():
        workspace.scratch("large", (3, 4), torch.empty(0), largest=1)
    workspace.scratch("large", (3, 4), torch.empty(0), largest=1).zero_()


def test_an_accelerators_memory_is_new_each_time(workspace):
    """Another stream may still be using what was given before."""
    like = FLOAT.to("meta")
    first, again = (workspace.scratch("a", (100,), like) for _ in range(2))
    assert first.device == like.device
    assert first.untyped_storage()._cdata != again.untyped_storage()._cdata
