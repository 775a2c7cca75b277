"""The compiled engine, judged by the eager one in float64."""

from unittest import mock

import pytest
import torch

from cosloss.criteria import CosineEmbedding, CrossEntropy, SigmoidContrast
from cosloss.kernels import tiles
from cosloss.kernels.eager import in_batch as eager
from cosloss.kernels.native import in_batch
from cosloss.problem import Mask, PositiveMask, Problem

CRITERIA = {
    "exp": CrossEntropy(10.0),
    "logsumexp": CrossEntropy(),
    "softplus": SigmoidContrast(),
    "hinge": CosineEmbedding(0.1, 7),
}


def rows(count, columns, seed=0):
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))


def problem(n, m, d):
    """Rows, columns (None: the rows), with logits of a few units."""
    r = 1.5 * rows(n, d) / d**0.25
    return r, None if m is None else 1.5 * rows(m, d, seed=1) / d**0.25


def excluded(how, n, m):
    if how == "groups":
        return Mask(groups=(torch.arange(n) % 6, torch.arange(m) % 6))
    if how == "classes":
        ids = (torch.arange(n) % 6, torch.arange(m) % 6), (torch.arange(n) % 4, torch.arange(m) % 4)
        return Mask((0,), *ids)
    return Mask((0, n // 2, -(n // 2)))


def assert_as_eager(r, c, bias, matrix, needs=(True, True, True), dtype=torch.float32):
    """Statistics and gradients, from tiles that are kept, not kept, and computed again.

    They may err as much as the eager engine's in float32; where bfloat16 is multiplied, by its
    roundings of the weights.
    """
    narrow = dtype == torch.bfloat16
    # what is judged is not the rounding of the inputs
    r, c = r.to(dtype), None if c is None else c.to(dtype)

    def run(engine, dtype, kept_bytes=0):
        given = [None if x is None else x.to(dtype) for x in (r, c)]
        given.append(None if bias is None else bias.to(torch.promote_types(dtype, torch.float32)))
        total = engine.forward(*given, matrix)
        grad = torch.linspace(0.37, 1.1, total.shape[0]).double()  # no sum cancels
        d_pos_logit = None if matrix.positives is None else 0.02 * grad.flip(0)
        asked = {"d_stat": grad, "stat": total, "needs": needs, "d_pos_logit": d_pos_logit}
        again = engine.backward(*given, matrix, **asked)
        positive = torch.zeros_like(total)
        with mock.patch.object(tiles, "KEPT_BYTES", kept_bytes):
            same, grad_positive, at_once = engine.forward_backward(
                *given, matrix, weights=grad, positive=positive, needs=needs
            )
        return [total, *again, same, grad_positive, *at_once]

    exact, plain = run(eager, torch.float64), run(eager, torch.float32)
    for kept_bytes in (0, 2**28):
        found = run(in_batch, dtype, kept_bytes)
        for k, (ours, theirs, true) in enumerate(zip(found, plain, exact, strict=True)):
            assert (ours is None) == (true is None)
            if true is not None:
                size = true.abs().max().clamp_min(1e-6)
                budget = 3 * (theirs - true).abs().max() + 1e-6 * size
                budget += 8e-3 * size if narrow and k not in (0, 4) else 0
                assert (ours - true).abs().max() <= budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pairs", ["diagonals", "groups", "classes"])
@pytest.mark.parametrize("kind", CRITERIA)
def test_symmetric(build, kind, pairs, dtype):
    for n, d in ((1, 1), (2, 33), (64, 32), (65, 5), (150, 40), (333, 7)):
        r, _ = problem(n, None, d)
        matrix = Problem(CRITERIA[kind], excluded(pairs, n, n), True)
        assert_as_eager(r, None, None, matrix, (True, False, False), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("two_way", [True, False], ids=["two-way", "one-way"])
@pytest.mark.parametrize("kind", CRITERIA)
def test_rows_and_columns(build, kind, two_way, dtype):
    for n, m, pairs in ((1, 1, "groups"), (3, 200, "diagonals"), (257, 31, "classes")):
        r, c = problem(n, m, 37)
        matrix = Problem(CRITERIA[kind], excluded(pairs, n, m), two_way)
        bias = torch.tensor(-0.3)
        for needs in ((True, True, True), (False, False, True), (False, True, False)):
            assert_as_eager(r, c, bias, matrix, needs, dtype)


@pytest.mark.parametrize("blocks", range(1, 10))
def test_any_number_of_blocks(blocks):
    """Odd and even tournaments, more rows than columns and fewer; rows longer than a panel."""
    r, c = problem(64 * blocks - 5, 64 * 3, 600)
    matrix = Problem(CRITERIA["exp"], Mask((0,)), True)
    assert_as_eager(0.3 * r, None, None, matrix, (True, False, False))
    assert_as_eager(0.3 * r, 0.3 * c, None, matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("two_way", [True, False], ids=["two-way", "one-way"])
@pytest.mark.parametrize("kind", CRITERIA)
def test_few_rows_have_copies_of_their_sums(kind, two_way, dtype):
    """As many copies as blocks of columns, fewer, and a number that does not divide them."""
    for n, m in ((1, 130), (40, 450), (150, 1100), (260, 1290)):
        r, c = problem(n, m, 10)
        matrix = Problem(CRITERIA[kind], Mask((0, -3)), two_way)
        for needs in ((True, True, True), (True, False, False), (False, True, False)):
            assert_as_eager(r, c, None, matrix, needs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pairs", ["diagonals", "classes"])
@pytest.mark.parametrize("kind", ["exp", "logsumexp"])
def test_positives_have_weights_of_their_own(build, kind, pairs, dtype):
    for n, m in ((1, None), (70, None), (333, None), (90, 200), (150, 1100)):
        r, c = problem(n, m, 10)
        losses, m = n + (m or 0), m or n
        positives = PositiveMask(torch.arange(n) % 4, torch.arange(m) % 4, torch.ones(losses))
        matrix = Problem(CRITERIA[kind], excluded(pairs, n, m), True, positives=positives)
        assert_as_eager(r, c, None, matrix, dtype=dtype)


@pytest.mark.parametrize("shift", [-300.0, 300.0])
@pytest.mark.parametrize("m", [90, 1100], ids=["many rows", "few rows"])
def test_logits_of_any_size(shift, m):
    r, c = problem(100, m, 10)
    matrix = Problem(CRITERIA["logsumexp"], Mask((0,)), True)
    total = in_batch.forward(r, c, None, matrix)
    shifted = in_batch.forward(r, c, torch.tensor(shift), matrix)
    torch.testing.assert_close(shifted, total + shift, rtol=0, atol=3e-5)


@pytest.mark.parametrize("kind", CRITERIA)
def test_blocks_of_the_largest_size(kind):
    r, c = problem(300, 32 * 256 + 40, 3)
    matrix = Problem(CRITERIA[kind], Mask((1,)), True)
    assert_as_eager(r, c, None, matrix)
    assert_as_eager(c, r, None, matrix, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", CRITERIA)
@pytest.mark.parametrize("columns", [90, 700], ids=["many rows", "few rows"])
def test_a_nan_reaches_what_meets_it_and_nothing_else(kind, dtype, columns):
    r, c = problem(80, columns, 9)
    r[3, 2] = torch.nan
    r, c = r.to(dtype), c.to(dtype)
    matrix = Problem(CRITERIA[kind], Mask((1,)), True)
    total = in_batch.forward(r, c, None, matrix)
    meets = torch.ones(80 + columns, dtype=torch.bool)
    meets[:80], meets[3], meets[80 + 4] = False, True, False
    assert torch.equal(total.isnan(), meets)
    grad = torch.ones(80 + columns).double() * ~meets
    grad[3] = 0.5
    total = total.nan_to_num()
    grad_r, grad_c, _ = in_batch.backward(
        r, c, None, matrix, d_stat=grad, stat=total, needs=(True,) * 3
    )
    assert grad_r.isnan().any(1).nonzero().tolist() == [[3]]
    assert grad_c.isnan().any(1).all()


def test_a_row_without_pairs_has_total_and_gradient_zero():
    r, c = problem(20, 9, 6)
    groups = torch.arange(20) % 3, torch.zeros(9, dtype=torch.int32)
    for kind, loss in CRITERIA.items():
        matrix = Problem(loss, Mask(groups=groups), False)
        total = in_batch.forward(r, c, None, matrix)
        without = total[groups[0] == 0]
        assert (without < -1e300).all() if "exp" in kind else (without == 0).all()
        ones = torch.ones(20).double()
        grad, _, _ = in_batch.backward(
            r, c, None, matrix, d_stat=ones, stat=total, needs=(True, False, False)
        )
        assert (grad[groups[0] == 0] == 0).all()
        assert (grad[groups[0] == 1].abs().sum(1) > 0).all()


@pytest.mark.parametrize("kind", CRITERIA)
def test_the_number_of_threads_changes_no_bit_where_rows_are_few(kind):
    r, c = problem(150, 1100, 20)
    matrix = Problem(CRITERIA[kind], Mask((1,)), True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 8, 8):
            torch.set_num_threads(threads)
            total = in_batch.forward(r, c, None, matrix)
            ones = torch.ones_like(total)
            results.append(
                [
                    total,
                    *in_batch.backward(
                        r, c, None, matrix, d_stat=ones, stat=total, needs=(True,) * 3
                    )[:2],
                ]
            )
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
