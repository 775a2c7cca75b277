"""On a GPU: the table on the device, large batches, tuning, memory, and two runs' bits."""

import pytest
import torch

from cosloss import functional, verify
from cosloss.kernels import dispatch
from cosloss.kernels.triton import tuning

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
