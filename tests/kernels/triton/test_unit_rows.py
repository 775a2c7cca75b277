"""The rows of one length in Triton, judged by the eager ones in float64."""

import pytest
import torch

from cosloss import nt_xent_loss, ops
from cosloss.kernels.eager import unit_rows as eager
from cosloss.kernels.triton import in_batch, sources, tuning
from cosloss.kernels.triton import unit_rows as kernels
from experiments.benchmarks.measure import peak_memory
from tests.slow import slow

pytestmark = [
    pytest.mark.usefixtures("triton_backend"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, in the interpreter
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rows(count, columns, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, columns, generator=generator).to(dtype)


def exact(views, scale, *grads):
    """Outputs and gradients in float64, by the operations' own derivative."""
    wide = [z.double().requires_grad_() for z in views]
    r, _, products = eager.forward(wide, scale)
    outputs = (r, products)[: len(grads)]
    return outputs, torch.autograd.grad(outputs, wide, [g.double() for g in grads])


@pytest.mark.parametrize("columns", [1, 9, 128, *slow(2100)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pairs_and_their_gradients(dtype, columns):
    views = [rows(21, columns, seed, dtype) for seed in (0, 1)]
    views[0][3] = 0
    grads = rows(42, columns, 2), rows(42, 1, 3)[:, 0]
    true, true_grads = exact(views, 1.7, *grads)
    for scale in (1.7, torch.tensor(1.7), torch.tensor(1.7, dtype=torch.float64)):
        r, norm, products = kernels.forward(views, scale=scale)
        assert [x.dtype for x in (r, products)] == [torch.float32] * 2
        for found, wanted in zip((r, products), true, strict=True):
            torch.testing.assert_close(found.double(), wanted, rtol=2e-7, atol=2e-7)
        found = kernels.backward(
            grads[0].chunk(2), grads[1], views, norm, (True, True), scale=scale
        )
    assert [g.dtype for g in found] == [dtype] * 2
    rounding = torch.finfo(dtype).eps
    for own, wanted in zip(found, true_grads, strict=True):
        size = wanted.abs().amax(1, keepdim=True).clamp_min(1e-30)
        torch.testing.assert_close(
            own / size, wanted / size, rtol=0, atol=4 * rounding, check_dtype=False
        )
    assert (found[0][3] == 0).all()


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30, 1e37])
def test_rows_of_any_size_and_stride(scale):
    z, grad = rows(40, 9) * scale, rows(40, 9, 3)
    z[7] = 0
    small = 1e-6 if scale < 1e-38 else 1.0  # or the gradient overflows
    (true,), (true_grad,) = exact([z], 3.0, small * grad)
    for strided in (z, z.T.contiguous().T, torch.cat([z, z], 1)[:, :9]):
        r, norm, _ = kernels.forward([strided], scale=3.0)
        torch.testing.assert_close(r.double(), true, rtol=2e-7, atol=2e-7)
        (ours,) = kernels.backward([small * grad], None, [strided], norm, [True], scale=3.0)
        assert (ours[7] == 0).all()
        size = z.double().norm(dim=1, keepdim=True) / small
        torch.testing.assert_close(ours * size, true_grad * size, rtol=1e-6, atol=1e-6)


def test_only_what_needs_a_gradient_gets_one_from_what_has_one():
    views = [rows(17, 6, seed) for seed in (0, 1)]
    grads = rows(34, 6, 4), rows(34, 1, 5)[:, 0]
    _, norm, _ = kernels.forward(views, scale=1.7)
    for given in ((grads[0], None), (None, grads[1])):
        whole = [torch.zeros_like(g) if x is None else x for x, g in zip(given, grads, strict=True)]
        of_views = (None, None) if given[0] is None else given[0].chunk(2)
        _, true = exact(views, 1.7, *whole)
        for needs in ((True, True), (True, False), (False, True)):
            found = kernels.backward(of_views, given[1], views, norm, needs, scale=1.7)
            for own, wanted, need in zip(found, true, needs, strict=True):
                assert (own is not None) == need
                if need:
                    torch.testing.assert_close(own, wanted.float(), rtol=1e-5, atol=1e-6)


def test_a_nan_stays_in_its_pair():
    views = [rows(20, 5, seed) for seed in (0, 1)]
    views[1][4, 2] = torch.nan
    r, norm, products = kernels.forward(views)
    assert products.isnan().nonzero()[:, 0].tolist() == [4, 24]
    assert r.isnan().any(1).nonzero()[:, 0].tolist() == [24]
    grads = rows(40, 5, 2).chunk(2), rows(40, 1, 3)[:, 0]
    found = kernels.backward(*grads, views, norm, (True, True))
    for grad in found:
        assert grad.isnan().any(1).nonzero()[:, 0].tolist() == [4]


@pytest.mark.parametrize("planted", ["views", "scale", "pair"])
def test_a_wrong_kernel_is_caught(planted, monkeypatch):
    backward = kernels.backward

    def off(grads, grad_products, views, norm, needs, scale):
        if planted == "views":
            views = views[::-1]
        if planted == "scale":
            scale = 1.0
        if planted == "pair":
            grad_products = 1.01 * grad_products
        return backward(grads, grad_products, views, norm, needs, scale)

    monkeypatch.setattr(kernels, "backward", off)
    with pytest.raises(AssertionError):
        test_pairs_and_their_gradients(torch.float32, 9)


def test_memory_of_a_step_in_bfloat16(monkeypatch):
    """Bytes per row of 128; what does not grow with the batch is left out."""
    for module in (kernels, in_batch, sources, tuning):  # the interpreter's copies do not count
        monkeypatch.setattr(module, "launch", lambda *arguments, **constants: None)
    monkeypatch.setattr(ops.in_batch, "KEPT_BYTES", 0)  # a large batch's operands are not kept

    def step(count):
        views = [rows(count, 128, seed, torch.bfloat16).requires_grad_() for seed in (0, 1)]
        return peak_memory(lambda: torch.autograd.grad(nt_xent_loss(*views, 0.1), views)) * 2**20

    per_row = (step(3072) - step(1024)) / (2 * 2048)
    assert per_row * 65536 <= 40e6
