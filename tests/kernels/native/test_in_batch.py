"""The compiled work on tiles and rows, judged by the eager work in float64."""

import pytest
import torch

from cosloss import functional
from cosloss.kernels import dispatch
from cosloss.kernels.eager import tiles, walk
from cosloss.kernels.eager.cross_entropy import CrossEntropy
from cosloss.kernels.eager.in_batch_cosine_embedding import CosineEmbedding
from cosloss.kernels.eager.sigmoid_contrastive import SigmoidContrast
from cosloss.kernels.native import totals as native
from cosloss.kernels.native import unit_rows as native_rows
from cosloss.ops import unit_pairs, unit_rows

KINDS = {
    "exp": CrossEntropy(10.0),
    "logsumexp": CrossEntropy(),
    "softplus": SigmoidContrast(),
    "hinge": CosineEmbedding(0.1, 7),
}
LABELS = torch.arange(150) % 4
LOSSES = {
    "nt_xent": lambda a, b, t: functional.nt_xent_loss(a, b, t),
    "decoupled": lambda a, b, t: functional.nt_xent_loss(a, b, t, "none", decoupled=True),
    "ignore": lambda a, b, t: functional.nt_xent_loss(a, b, t, ignore=LABELS[: len(a)]),
    "weight": lambda a, b, t: functional.nt_xent_loss(a, b, t, weight=LABELS[: len(a)] + 0.5),
    "in_batch_cosine": lambda a, b, t: functional.in_batch_cosine_embedding_loss(a, b, 0.1) * t,
    "info_nce": lambda a, b, t: functional.info_nce_loss(a, b, t),
    "each": lambda a, b, t: functional.info_nce_loss(a, b, t, reduction="none"),
    "symmetric": lambda a, b, t: functional.info_nce_loss(a, b, t, symmetric=True),
    "queue": lambda a, b, t: functional.info_nce_loss(a, b, t, torch.cat([a, b, a * b])),
    "sup_con": lambda a, b, t: functional.sup_con_loss(a + b, LABELS[: len(a)], t),
    "sigmoid": lambda a, b, t: functional.sigmoid_contrastive_loss(a, b, t, -1.5),
}


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]


def rows(count, columns, seed=0):
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))


def views(count, columns):
    z1 = rows(count, columns)
    return z1, 0.6 * z1 + rows(count, columns, seed=1)


def gradients(loss, tensors, temperature, dtype, create_graph=False):
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    value = loss(*leaves, temperature)
    weight = torch.linspace(0.37, 1.4, value.numel(), dtype=dtype).view_as(value)
    return value, torch.autograd.grad(value, leaves, weight, create_graph=create_graph), leaves


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (33, 130), (200, 129)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tiles_passes_are_the_eager_ones(build, kind, shape, dtype):
    x = (3 * rows(*shape)).to(dtype)
    x[0, 0] = -torch.inf
    a, b = rows(shape[0], 1)[:, 0], rows(shape[1], 1, seed=2)[:, 0]
    i, j = slice(2, 2 + shape[0]), slice(1, 1 + shape[1])
    found = []
    for compiled in (True, False):
        exact = torch.zeros(2 + shape[0]).double(), torch.zeros(1 + shape[1]).double()
        totals = KINDS[kind].totals(*exact)
        assert totals.kind == kind
        totals = native.compiled(totals) if compiled else totals
        tile = x.clone() if compiled else x.double()
        totals.add(tile, i, j, keep=True)
        again = x.clone() if compiled else x.double()
        totals.again(again)
        torch.testing.assert_close(tile, again, rtol=0, atol=0)
        totals.finish()
        wide = torch.float32 if compiled else torch.float64
        padded_a, padded_b = (
            torch.cat([torch.zeros(skip), each]).to(wide) for skip, each in ((2, a), (1, b))
        )
        weight = totals.weigh(tile, i, j, padded_a, padded_b, out=torch.empty_like(tile))
        slopes = totals.slopes(tile, i, out=torch.empty_like(tile))
        found.append([totals.rows[i], totals.columns[j], weight.double(), slopes.double()])
    tolerance = 2e-6 if dtype == torch.float32 else 2**-7
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_reaches_its_row_and_its_column_and_no_other(kind):
    x = rows(40, 50)
    x[3, 4] = torch.nan
    totals = native.compiled(KINDS[kind].totals(torch.zeros(40).double(), torch.zeros(50).double()))
    totals.add(x, slice(0, 40), slice(0, 50), keep=True)
    assert totals.rows.isnan().nonzero().tolist() == [[3]]
    assert totals.columns.isnan().nonzero().tolist() == [[4]]


@pytest.mark.parametrize("kept_bytes", [0, 2**24], ids=["computed again", "kept"])
@pytest.mark.parametrize("temperature", [0.3, 0.02, torch.tensor(0.3)], ids=str)
@pytest.mark.parametrize("side", [32, 1024])
def test_losses_in_float32(loss, side, temperature, kept_bytes, monkeypatch):
    monkeypatch.setattr(tiles, "LARGEST_SIDE", side)
    monkeypatch.setattr(tiles, "BAND", 64 * side)
    monkeypatch.setattr(walk, "KEPT_BYTES", kept_bytes)
    tensors = views(150, 33)
    value, grads, _ = gradients(loss, tensors, temperature, torch.float32)
    exact, exact_grads, _ = gradients(loss, tensors, temperature, torch.float64)
    budget = 2e-6 + 4e-7 / float(temperature)
    torch.testing.assert_close(value.double(), exact, rtol=budget, atol=budget)
    for ours, true in zip(grads, exact_grads, strict=True):
        size = true.norm(dim=1).max()
        torch.testing.assert_close(ours / size, (true / size).float(), rtol=0, atol=budget)


def test_second_derivatives_and_batched_ones(loss):
    tensors = views(9, 5)

    def penalty(dtype):
        _, grads, leaves = gradients(loss, tensors, 0.3, dtype, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    for ours, exact in zip(penalty(torch.float32), penalty(torch.float64), strict=True):
        torch.testing.assert_close(ours, exact.float(), rtol=1e-4, atol=1e-5)
    leaves = [x.clone().requires_grad_() for x in tensors]
    value = loss(*leaves, 0.3).sum()
    weights = torch.tensor([1.0, -0.5])
    batched = torch.autograd.grad(value, leaves, weights, is_grads_batched=True, retain_graph=True)
    single = torch.autograd.grad(value, leaves)
    for each, one in zip(batched, single, strict=True):
        torch.testing.assert_close(each, weights[:, None, None] * one, rtol=1e-5, atol=1e-7)


def test_the_number_of_threads_changes_no_bit(loss):
    tensors = views(150, 120)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            r, products = unit_pairs(*tensors, 2.0)
            total, work = torch.zeros(300).double(), native.compiled
            totals = work(KINDS["exp"].totals(total, torch.zeros(120).double()))
            totals.add(r.clone(), slice(0, 300), slice(0, 120), keep=True)
            results.append((r, products, totals.rows, totals.columns))
    finally:
        torch.set_num_threads(before)
    for one in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(one, results[0], strict=True))


@pytest.mark.parametrize("planted", ["weigh", "slopes", "again", "rows", "products"])
def test_a_wrong_kernel_is_caught(planted, monkeypatch):
    """Each is used by a loss: as it is wrong, some gradient is."""
    monkeypatch.setattr(walk, "KEPT_BYTES", 0)

    def wrong(original):
        def method(self, *arguments, **keywords):
            found = original(self, *arguments, **keywords)
            (arguments[0] if found is None else found).mul_(1.001)
            return found

        return method

    if planted in ("rows", "products"):
        backward = native_rows.backward

        def off(grad_r, grad_products, *others, **keywords):
            grads = {"rows": grad_r, "products": grad_products}
            if grads[planted] is not None:
                grads[planted] = 1.001 * grads[planted]
            return backward(*grads.values(), *others, **keywords)

        monkeypatch.setattr(native_rows, "backward", off)
    else:
        monkeypatch.setattr(
            native.CompiledSums, planted, wrong(getattr(native.CompiledSums, planted))
        )
    with pytest.raises(AssertionError):
        _agree_with_float64(views(20, 7))


def _agree_with_float64(tensors):
    for loss in LOSSES.values():
        _, grads, _ = gradients(loss, tensors, 0.3, torch.float32)
        _, exact, _ = gradients(loss, tensors, 0.3, torch.float64)
        for ours, true in zip(grads, exact, strict=True):
            torch.testing.assert_close(ours, true.float(), rtol=1e-4, atol=1e-6)


def test_right_kernels_pass_what_catches_wrong_ones(monkeypatch):
    monkeypatch.setattr(walk, "KEPT_BYTES", 0)
    _agree_with_float64(views(20, 7))


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1.0, 1e30, 1e37])
def test_rows_of_any_size(build, scale):
    z = rows(40, 9) * scale
    z[7] = 0
    for strided in (z, z.T.contiguous().T, torch.cat([z, z], 1)[:, :9]):
        leaf = strided.detach().requires_grad_()
        u = unit_rows(leaf, 3.0)
        wide = z.double().requires_grad_()
        with dispatch.use("eager"):
            exact = unit_rows(wide, 3.0)
        torch.testing.assert_close(u, exact.float(), rtol=1e-6, atol=1e-6)
        small = 1e-6 if scale < 1e-38 else 1.0  # or the gradient overflows
        grad = small * rows(40, 9, seed=3)
        (ours,) = torch.autograd.grad(u, leaf, grad)
        (true,) = torch.autograd.grad(exact, wide, grad.double())
        assert (ours[7] == 0).all()
        size = z.double().norm(dim=1, keepdim=True) / small
        torch.testing.assert_close(ours * size, true * size, rtol=1e-5, atol=1e-5)


def test_pairs_give_each_view_its_gradient_and_no_other():
    z1, z2 = views(17, 6)
    grad_r, grad_products = rows(34, 6, seed=4), rows(34, 1, seed=5)[:, 0]
    for wanted in ((True, True), (True, False), (False, True)):
        for given in ((grad_r, grad_products), (grad_r, None), (None, grad_products)):
            found = []
            for dtype in (torch.float32, torch.float64):
                both = [
                    z.to(dtype).requires_grad_(w) for z, w in zip((z1, z2), wanted, strict=True)
                ]
                outputs = unit_pairs(*both, 1.7)
                pairs = [
                    (o, g.to(dtype)) for o, g in zip(outputs, given, strict=True) if g is not None
                ]
                used, weights = zip(*pairs, strict=True)
                asked = [z for z, w in zip(both, wanted, strict=True) if w]
                found.append([g.double() for g in torch.autograd.grad(used, asked, weights)])
            for ours, true in zip(*found, strict=True):
                torch.testing.assert_close(ours, true, rtol=1e-5, atol=1e-6)


def test_in_one_dimension_the_gradient_is_exactly_zero():
    z = rows(20, 1).requires_grad_()
    other = rows(20, 1, seed=1).requires_grad_()
    r, products = unit_pairs(z, other, 0.3**-0.5)
    ((r * rows(40, 1, seed=2)).sum() + (products * 0.37).sum()).backward()
    assert (z.grad == 0).all()
    assert (other.grad == 0).all()
