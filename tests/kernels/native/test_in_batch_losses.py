"""The in-batch losses on the compiled engine, judged by themselves in float64: the eager one."""

from functools import partial

import pytest
import torch

from cosloss import functional, reference
from cosloss.kernels import dispatch, tiles
from cosloss.kernels.native import in_batch
from cosloss.kernels.native import unit_rows as native_rows
from tests import losses
from tests.slow import slow

LOSSES = {name: partial(loss, functional) for name, loss in losses.LOSSES.items()}


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]


def rows(count, columns, seed=0):
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))


def views(count, columns):
    z1 = rows(count, columns)
    return z1, 0.6 * z1 + rows(count, columns, seed=1)


def gradients(loss, tensors, temperature, dtype):
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    value = loss(*leaves, temperature)
    weight = torch.linspace(0.37, 1.4, value.numel(), dtype=dtype).view_as(value)
    return value, torch.autograd.grad(value, leaves, weight), leaves


@pytest.mark.parametrize("kept_bytes", [0, 2**24], ids=["computed again", "kept"])
@pytest.mark.parametrize("temperature", [0.3, 0.02, torch.tensor(0.3)], ids=str)
@pytest.mark.parametrize("side", [32, 1024])
def test_losses_in_float32(loss, side, temperature, kept_bytes, monkeypatch):
    monkeypatch.setattr(tiles, "LARGEST_SIDE", side)
    monkeypatch.setattr(tiles, "BAND", 64 * side)
    monkeypatch.setattr(tiles, "KEPT_BYTES", kept_bytes)
    tensors = views(150, 33)
    value, grads, _ = gradients(loss, tensors, temperature, torch.float32)
    exact, exact_grads, _ = gradients(loss, tensors, temperature, torch.float64)
    budget = 2e-6 + 4e-7 / float(temperature)
    torch.testing.assert_close(value.double(), exact, rtol=budget, atol=budget)
    for ours, true in zip(grads, exact_grads, strict=True):
        size = true.norm(dim=1).max()
        torch.testing.assert_close(ours / size, (true / size).float(), rtol=0, atol=budget)


@pytest.mark.parametrize("backends", [("native", "eager"), ("eager", "native")], ids="-".join)
def test_a_backward_pass_by_another_backend_does_not_take_the_tiles_for_its_own(loss, backends):
    leaves = [x.requires_grad_() for x in views(90, 12)]
    with dispatch.use(backends[0]):
        value = loss(*leaves, 0.3).sum()
    with dispatch.use(backends[1]):
        grads = torch.autograd.grad(value, leaves)
    for ours, true in zip(
        grads, torch.autograd.grad(loss(*leaves, 0.3).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["nt_xent_loss", "sigmoid_contrastive_loss"])
@pytest.mark.parametrize("shape", [(256, 2048), *slow(((2048, 128),))], ids=str)
def test_long_sums_of_like_terms_err_no_more_than_the_twin(build, shape, name):
    """Rows in ten tight clusters: sums along rows and along columns grow with each term."""
    near = rows(10, shape[1])[torch.arange(shape[0]) % 10] + 0.05 * rows(*shape, seed=1)
    tensors = near, near + 0.05 * rows(*shape, seed=2)
    settings = (0.1, -10.0) if "sigmoid" in name else (0.05,)

    def gradient(module, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        value = getattr(module, name)(*leaves, *settings)
        return torch.cat([g.double() for g in torch.autograd.grad(value, leaves)])

    exact = gradient(reference, torch.float64)
    ours, twin = (gradient(module, torch.float32) - exact for module in (functional, reference))
    assert ours.norm() <= 1.25 * twin.norm()


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "bias alone"])
def test_a_bias_has_its_gradient(frozen):
    found = []
    for dtype in (torch.float32, torch.float64):
        z1, z2 = (x.to(dtype).requires_grad_(not frozen) for x in views(70, 9))
        bias = torch.tensor(-1.5, dtype=dtype, requires_grad=True)
        value = 0.37 * functional.sigmoid_contrastive_loss(z1, z2, 0.3, bias)
        value.backward()
        found.append([x.grad for x in (z1, z2, bias)])
    for ours, exact in zip(*found, strict=True):
        assert (ours is None) == (exact is None)
        if exact is not None:
            torch.testing.assert_close(ours, exact.float(), rtol=1e-4, atol=1e-6)


def test_the_number_of_threads_changes_no_bit(loss):
    before = torch.get_num_threads()
    for count in (70, 150, 330):  # of 64 rows, 3, 5 and 11 blocks of both views
        results = []
        try:
            for threads in (1, 2, 8, 8):
                torch.set_num_threads(threads)
                results.append(gradients(loss, views(count, 40), 0.3, torch.float32)[:2])
        finally:
            torch.set_num_threads(before)
        for value, grads in results[1:]:
            assert torch.equal(value, results[0][0])
            assert all(map(torch.equal, grads, results[0][1]))


@pytest.mark.parametrize(
    "planted", ["packed columns", "packed rows", "loss's gradient", "kept", "rows", "products"]
)
def test_a_wrong_kernel_is_caught(planted, monkeypatch):
    """Each is used by a loss: as it is wrong, some gradient is."""

    if planted in ("rows", "products"):
        backward = native_rows.backward

        def off(grads, grad_products, *others, **keywords):
            if planted == "rows":
                grads = [None if grad is None else 1.001 * grad for grad in grads]
            elif grad_products is not None:
                grad_products = 1.001 * grad_products
            return backward(grads, grad_products, *others, **keywords)

        monkeypatch.setattr(native_rows, "backward", off)
    elif planted == "loss's gradient":
        right = in_batch.NativeLoop._loss_grads
        monkeypatch.setattr(
            in_batch.NativeLoop,
            "_loss_grads",
            lambda self, d_stat, *others: right(self, 1.001 * d_stat, *others),
        )
    elif planted == "kept":
        run = in_batch.NativeLoop.run

        def after_what_was_kept(self, *others, grads=None, **keywords):
            if grads is not None and self._kept is not None:
                self._kept *= 1.001
            run(self, *others, grads=grads, **keywords)

        monkeypatch.setattr(in_batch.NativeLoop, "run", after_what_was_kept)
    else:
        name = f"_pack_{planted.removeprefix('packed ')}"
        packed = getattr(in_batch, name)
        monkeypatch.setattr(in_batch, name, lambda *arguments: packed(*arguments) * 1.001)
    with pytest.raises(AssertionError):
        _agree_with_float64(views(20, 7))


def _agree_with_float64(tensors):
    for loss in LOSSES.values():
        _, grads, _ = gradients(loss, tensors, 0.3, torch.float32)
        _, exact, _ = gradients(loss, tensors, 0.3, torch.float64)
        for ours, true in zip(grads, exact, strict=True):
            torch.testing.assert_close(ours, true.float(), rtol=1e-4, atol=1e-6)


def test_right_kernels_pass_what_catches_wrong_ones():
    _agree_with_float64(views(20, 7))
