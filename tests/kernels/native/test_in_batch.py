"""The compiled engine, judged by the eager one in float64."""

from dataclasses import replace

import pytest
import torch

from cosloss import functional, reference
from cosloss.kernels import dispatch
from cosloss.kernels.eager import in_batch as eager
from cosloss.kernels.eager import tiles, walk
from cosloss.kernels.eager.cross_entropy import CrossEntropy
from cosloss.kernels.eager.in_batch_cosine_embedding import CosineEmbedding
from cosloss.kernels.eager.sigmoid_contrastive import SigmoidContrast
from cosloss.kernels.eager.tiles import Excluded, Positives
from cosloss.kernels.eager.walk import Matrix
from cosloss.kernels.native import in_batch
from cosloss.kernels.native import unit_rows as native_rows

TILE_LOSSES = {
    "exp": CrossEntropy(10.0),
    "logsumexp": CrossEntropy(),
    "softplus": SigmoidContrast(),
    "hinge": CosineEmbedding(0.1, 7),
}
LABELS = torch.arange(400) % 4
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


def problem(n, m, d):
    """Rows, columns (None: the rows), with logits of a few units."""
    r = 1.5 * rows(n, d) / d**0.25
    return r, None if m is None else 1.5 * rows(m, d, seed=1) / d**0.25


def excluded(how, n, m):
    if how == "groups":
        return Excluded(groups=(torch.arange(n) % 6, torch.arange(m) % 6))
    if how == "classes":
        ids = (torch.arange(n) % 6, torch.arange(m) % 6), (torch.arange(n) % 4, torch.arange(m) % 4)
        return Excluded((0,), *ids)
    return Excluded((0, n // 2, -(n // 2)))


def assert_as_eager(r, c, bias, matrix, needs=(True, True, True)):
    """Totals and gradients, from kept tiles and from tiles computed again.

    They may err as much as the eager engine's in float32; where bfloat16 is multiplied, by its
    roundings of the weights.
    """
    narrow = matrix.dtype == torch.bfloat16
    if narrow:  # what is judged is not the rounding of the inputs
        r, c = r.bfloat16().float(), None if c is None else c.bfloat16().float()

    def run(engine, dtype, keep=False):
        chosen = replace(matrix, dtype=matrix.dtype if engine is in_batch else dtype)
        given = [None if x is None else x.to(dtype) for x in (r, c, bias)]
        total, ticket = engine.forward(*given, chosen, keep)
        assert (ticket is not None) == keep
        grad = torch.linspace(0.37, 1.1, total.shape[0]).double()  # no sum cancels
        pulls = None if matrix.positives is None else 0.02 * grad.flip(0)
        return [total, *engine.backward(grad, total, *given, chosen, ticket, needs, pulls)]

    exact, plain = run(eager, torch.float64), run(eager, torch.float32)
    for keep in (True, False):
        found = run(in_batch, torch.float32, keep)
        for ours, theirs, true in zip(found, plain, exact, strict=True):
            assert (ours is None) == (true is None)
            if true is not None:
                size = true.abs().max().clamp_min(1e-6)
                budget = 3 * (theirs - true).abs().max() + 1e-6 * size
                budget += 8e-3 * size if narrow and ours is not found[0] else 0
                assert (ours - true).abs().max() <= budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pairs", ["diagonals", "groups", "classes"])
@pytest.mark.parametrize("kind", TILE_LOSSES)
def test_symmetric(build, kind, pairs, dtype):
    for n, d in ((1, 1), (2, 33), (64, 32), (65, 5), (150, 40), (333, 7)):
        r, _ = problem(n, None, d)
        matrix = Matrix(TILE_LOSSES[kind], excluded(pairs, n, n), True, dtype)
        assert_as_eager(r, None, None, matrix, (True, False, False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("two_way", [True, False], ids=["two-way", "one-way"])
@pytest.mark.parametrize("kind", TILE_LOSSES)
def test_rows_and_columns(build, kind, two_way, dtype):
    for n, m, pairs in ((1, 1, "groups"), (3, 200, "diagonals"), (257, 31, "classes")):
        r, c = problem(n, m, 37)
        matrix = Matrix(TILE_LOSSES[kind], excluded(pairs, n, m), two_way, dtype)
        bias = torch.tensor(-0.3)
        for needs in ((True, True, True), (False, False, True), (False, True, False)):
            assert_as_eager(r, c, bias, matrix, needs)


@pytest.mark.parametrize("blocks", range(1, 10))
def test_any_number_of_blocks(blocks):
    """Odd and even tournaments, more rows than columns and fewer; rows longer than a panel."""
    r, c = problem(64 * blocks - 5, 64 * 3, 600)
    matrix = Matrix(TILE_LOSSES["exp"], Excluded((0,)), True, torch.float32)
    assert_as_eager(0.3 * r, None, None, matrix, (True, False, False))
    assert_as_eager(0.3 * r, 0.3 * c, None, matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("two_way", [True, False], ids=["two-way", "one-way"])
@pytest.mark.parametrize("kind", TILE_LOSSES)
def test_few_rows_have_copies_of_their_sums(kind, two_way, dtype):
    """As many copies as blocks of columns, fewer, and a number that does not divide them."""
    for n, m in ((1, 130), (40, 450), (150, 1100), (260, 1290)):
        r, c = problem(n, m, 10)
        matrix = Matrix(TILE_LOSSES[kind], Excluded((0, -3)), two_way, dtype)
        for needs in ((True, True, True), (True, False, False), (False, True, False)):
            assert_as_eager(r, c, None, matrix, needs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pairs", ["diagonals", "classes"])
@pytest.mark.parametrize("kind", ["exp", "logsumexp"])
def test_positives_have_weights_of_their_own(build, kind, pairs, dtype):
    for n, m in ((1, None), (70, None), (333, None), (90, 200), (150, 1100)):
        r, c = problem(n, m, 10)
        m = m or n
        positives = Positives(torch.arange(n) % 4, torch.arange(m) % 4, torch.ones(n))
        matrix = Matrix(TILE_LOSSES[kind], excluded(pairs, n, m), True, dtype, positives)
        assert_as_eager(r, c, None, matrix)


@pytest.mark.parametrize("shift", [-300.0, 300.0])
@pytest.mark.parametrize("m", [90, 1100], ids=["many rows", "few rows"])
def test_logits_of_any_size(shift, m):
    r, c = problem(100, m, 10)
    matrix = Matrix(TILE_LOSSES["logsumexp"], Excluded((0,)), True, torch.float32)
    total, _ = in_batch.forward(r, c, None, matrix, False)
    shifted, _ = in_batch.forward(r, c, torch.tensor(shift), matrix, False)
    torch.testing.assert_close(shifted, total + shift, rtol=0, atol=3e-5)


@pytest.mark.parametrize("kind", TILE_LOSSES)
def test_blocks_of_the_largest_size(kind):
    r, c = problem(300, 32 * 256 + 40, 3)
    matrix = Matrix(TILE_LOSSES[kind], Excluded((1,)), True, torch.float32)
    assert_as_eager(r, c, None, matrix)
    matrix = Matrix(TILE_LOSSES[kind], Excluded((1,)), True, torch.bfloat16)
    assert_as_eager(c, r, None, matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", TILE_LOSSES)
@pytest.mark.parametrize("columns", [90, 700], ids=["many rows", "few rows"])
def test_a_nan_reaches_what_meets_it_and_nothing_else(kind, dtype, columns):
    r, c = problem(80, columns, 9)
    r[3, 2] = torch.nan
    matrix = Matrix(TILE_LOSSES[kind], Excluded((1,)), True, dtype)
    total, ticket = in_batch.forward(r, c, None, matrix, True)
    meets = torch.ones(80 + columns, dtype=torch.bool)
    meets[:80], meets[3], meets[80 + 4] = False, True, False
    assert torch.equal(total.isnan(), meets)
    grad = torch.ones(80 + columns).double() * ~meets
    grad[3] = 0.5
    total = total.nan_to_num()
    grad_r, grad_c, _ = in_batch.backward(grad, total, r, c, None, matrix, ticket, (True,) * 3)
    assert grad_r.isnan().any(1).nonzero().tolist() == [[3]]
    assert grad_c.isnan().any(1).all()


def test_a_row_without_pairs_has_total_and_gradient_zero():
    r, c = problem(20, 9, 6)
    groups = torch.arange(20) % 3, torch.zeros(9, dtype=torch.int32)
    for kind, loss in TILE_LOSSES.items():
        matrix = Matrix(loss, Excluded(groups=groups), False, torch.float32)
        total, _ = in_batch.forward(r, c, None, matrix, False)
        without = total[groups[0] == 0]
        assert (without < -1e300).all() if "exp" in kind else (without == 0).all()
        ones = torch.ones(20).double()
        grad, _, _ = in_batch.backward(ones, total, r, c, None, matrix, None, (True, False, False))
        assert (grad[groups[0] == 0] == 0).all()
        assert (grad[groups[0] == 1].abs().sum(1) > 0).all()


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
@pytest.mark.parametrize("shape", [(2048, 128), (256, 2048)], ids=str)
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


@pytest.mark.parametrize("kind", TILE_LOSSES)
def test_the_number_of_threads_changes_no_bit_where_rows_are_few(kind):
    r, c = problem(150, 1100, 20)
    matrix = Matrix(TILE_LOSSES[kind], Excluded((1,)), True, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 8, 8):
            torch.set_num_threads(threads)
            total, _ = in_batch.forward(r, c, None, matrix, False)
            ones = torch.ones_like(total)
            results.append(
                [total, *in_batch.backward(ones, total, r, c, None, matrix, None, (True,) * 3)[:2]]
            )
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


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


@pytest.mark.parametrize("planted", ["across", "down", "take", "kept", "rows", "products"])
def test_a_wrong_kernel_is_caught(planted, monkeypatch):
    """Each is used by a loss: as it is wrong, some gradient is."""

    if planted in ("rows", "products"):
        backward = native_rows.backward

        def off(grad_r, grad_products, *others, **keywords):
            grads = {"rows": grad_r, "products": grad_products}
            if grads[planted] is not None:
                grads[planted] = 1.001 * grads[planted]
            return backward(*grads.values(), *others, **keywords)

        monkeypatch.setattr(native_rows, "backward", off)
    elif planted == "take":
        take = in_batch._Gradients.take
        monkeypatch.setattr(
            in_batch._Gradients,
            "take",
            lambda self, grad, *others: take(self, 1.001 * grad, *others),
        )
    elif planted == "kept":
        held = walk.workspace.held
        off = {torch.float32: 1.001, torch.float64: 1.0}  # not what is judged by
        monkeypatch.setattr(walk.workspace, "held", lambda: held() * off[held().dtype])
    else:
        packed = getattr(in_batch, f"_{planted}")
        monkeypatch.setattr(in_batch, f"_{planted}", lambda x: packed(x) * 1.001)
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
