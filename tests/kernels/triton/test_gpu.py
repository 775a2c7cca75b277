"""On a GPU: the table on the device, large batches, tuning, memory, CUDA graphs, two runs' bits."""

import pytest
import torch

from cosloss import functional, verify
from cosloss.kernels import dispatch
from cosloss.kernels.triton import block_shapes, tuning

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_every_op_keeps_its_budget():
    assert verify.verify(device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(300, 100), (9000, 128), (1500, 1000)])
def test_large_batches_equal_eager(rows, columns, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    z1, z2 = torch.randn(2, rows, columns, device="cuda", generator=generator).to(dtype)
    leaves = [z1.requires_grad_(), z2.requires_grad_()]
    loss = functional.nt_xent_loss(*leaves, 0.1)
    grads = torch.autograd.grad(0.37 * loss, leaves)
    with dispatch.use("eager"):
        exact = [x.detach().double().requires_grad_() for x in leaves]
        loss64 = functional.nt_xent_loss(*exact, 0.1)
        grads64 = torch.autograd.grad(0.37 * loss64, exact)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), loss64, rtol=8 * eps, atol=0)
    for grad, grad64 in zip(grads, grads64, strict=True):
        assert (grad - grad64).norm() < 16 * eps * grad64.norm()


def test_two_runs_give_the_same_bits_and_a_new_size_is_not_tuned_again(monkeypatch):
    z = torch.randn(2, 2050, 128, device="cuda", requires_grad=True)

    def grad(rows):
        return torch.autograd.grad(functional.nt_xent_loss(*z[:, :rows], 0.1), z)[0]

    first = grad(2050)
    assert torch.equal(first, grad(2050))
    monkeypatch.setattr(tuning, "do_bench", None)  # a call of it would fail
    grad(1999)


def test_memory_grows_with_the_rows_alone():
    z = torch.randn(2, 16384, 128, device="cuda", requires_grad=True)
    functional.nt_xent_loss(*z, 0.1).backward()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    functional.nt_xent_loss(*z, 0.1).backward()
    # the matrix would take 4 GiB
    assert torch.cuda.max_memory_allocated() - before < 256 * 2**20


@pytest.mark.parametrize("columns", [128, 1024])
def test_a_captured_step_replays_to_the_same_bits(columns):
    z = torch.randn(2, 2050, columns, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step():
        loss = functional.nt_xent_loss(*z, 0.1)
        return loss.detach(), *torch.autograd.grad(loss, z)

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        z.copy_(torch.randn_like(z))
    graph.replay()
    assert all(map(torch.equal, captured, step()))


@pytest.mark.parametrize("loss", ["nt_xent_loss", "info_nce_loss", "sigmoid_contrastive_loss"])
def test_a_step_does_not_wait_for_the_device(loss):
    z = torch.randn(2, 300, 128, device="cuda", requires_grad=True)
    temperature = torch.tensor(0.1, device="cuda", requires_grad=True)
    of_loss = [*z, temperature, *([torch.tensor(-2.0)] if "sigmoid" in loss else [])]
    of_loss = [x.to("cuda") for x in of_loss]
    for mode in ("default", "error"):  # the first call compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            getattr(functional, loss)(*of_loss).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_bands_of_d_logits_and_programs_that_own_a_gradient_agree(monkeypatch):
    z = torch.randn(2, 1500, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    (in_bands,) = torch.autograd.grad(functional.nt_xent_loss(*z, 0.1), z)
    monkeypatch.setattr(block_shapes, "in_bands", lambda rows: False)
    (owned,) = torch.autograd.grad(functional.nt_xent_loss(*z, 0.1), z)
    assert (in_bands - owned).norm() < 0.01 * owned.norm()
