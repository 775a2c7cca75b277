"""The engine in tiles of any shape: rows unlike columns, more or fewer of them than chunks."""

import itertools

import pytest
import torch
import triton
import triton.language as tl

from cosloss.kernels.eager import in_batch as eager
from cosloss.kernels.triton import block_shapes, card, in_batch, tile
from cosloss.kernels.triton.block_shapes import Shape
from cosloss.problem import Mask, PositiveMask, Problem
from tests.kernels.triton.engine import CRITERIA, assert_gradients, problem, single, use_shapes
from tests.slow import slow

pytestmark = [
    pytest.mark.usefixtures("triton_backend"),  # every output is NaN before it is written
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, in the interpreter
]

ROWS, COLUMNS = 140, 130  # whose columns one processor deals to one program, 200 to two
SHAPES = ((32, (64, 32)), (64, (32, 64)), (32, (16, 64)), (64, (64, 16)))
FORMS = ("symmetric", "positives", "two-way, bias", "one-way, groups")


def posed(form, kind):
    """Rows, columns, bias, and the problem of that form."""
    criterion = CRITERIA[kind]
    ids = torch.arange(ROWS) % 7
    if form == "symmetric":
        return *problem(ROWS, None), None, Problem(criterion, Mask((0, 70, -70)), True)
    if form == "positives":
        mask = Mask((0,), (ids // 2, ids // 2), (ids, ids))
        of_class = PositiveMask(ids, ids, torch.ones(ROWS))
        return *problem(ROWS, None), None, Problem(criterion, mask, True, positives=of_class)
    r, c = problem(ROWS, COLUMNS)
    if form == "two-way, bias":
        return r, c, torch.tensor(-0.3).double(), Problem(criterion, Mask((0, 3)), True)
    return r, c, None, Problem(criterion, Mask((), (ids, torch.arange(COLUMNS) % 5)), False)


def cases():
    """Every form of every kind in every tile, of which few are not slow."""
    for i, (kind, form) in enumerate(itertools.product(CRITERIA, FORMS)):
        if form == "positives" and kind not in ("exp", "logsumexp"):
            continue
        for j, (shape, processors) in enumerate(itertools.product(SHAPES, (1, 200))):
            case = kind, form, shape, processors
            yield from [case] if (i + i // 4) % 8 == j else slow(case)


@pytest.mark.parametrize(("kind", "form", "shape", "processors"), [*cases()])
def test_statistics_and_gradients(kind, form, shape, processors, monkeypatch):
    monkeypatch.setattr(card, "INTERPRETER", card.INTERPRETER._replace(processors=processors))
    forward, backward = shape
    use_shapes(monkeypatch, whole=True, forward=forward, backward=backward)
    r, c, bias, matrix = posed(form, kind)
    found = in_batch.forward(*single(r, c, bias), matrix)
    exact = eager.forward(r, c, bias, matrix)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=2e-5)
    assert_gradients(r, c, bias, matrix, (True, c is not None, bias is not None))


@pytest.mark.parametrize("form", FORMS)
def test_exponentials_by_polynomial(form, monkeypatch):
    def shapes(table, d, size, card):
        return [Shape((32,), 4, 1, 0, polynomial=2)]

    with monkeypatch.context() as patched:
        use_shapes(patched, whole=True)
        patched.setattr(block_shapes, "fitting", shapes)
        r, c, bias, matrix = posed(form, "exp")
        found = in_batch.forward(*single(r, c, bias), matrix)
    exact = eager.forward(r, c, bias, matrix)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)


@triton.jit
def exponentials_kernel(x, result, POLYNOMIAL: tl.constexpr):
    at = tl.arange(0, 32)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(result + at, tile.exponentials(tl.load(x + at), POLYNOMIAL))


def test_a_polynomial_is_as_exact_as_an_exponential():
    x = torch.linspace(-86, 86, 32 * 64).view(32, 64)
    special = torch.tensor([-torch.inf, -1e30, -88.1, 0.0, torch.nan])
    x[0, :5], x[1, -5:] = special, special  # by the one and by the other
    found = torch.empty_like(x)
    exponentials_kernel[(1,)](x, found, 2)
    exact = x.double().exp()
    by_polynomial = torch.arange(64) // 8 % 2 == 0
    assert found[:, by_polynomial].ne(torch.empty_like(x).copy_(exact)[:, by_polynomial]).any()
    # the exponent's product with log2 e is rounded
    torch.testing.assert_close(
        found.double(), exact, rtol=3e-7 + 86 * 2**-24, atol=2**-126, equal_nan=True
    )
    assert torch.equal(found[0, :2], torch.zeros(2))
    at_small = x.abs() < 1
    torch.testing.assert_close(found[at_small].double(), exact[at_small], rtol=3e-7, atol=0)
