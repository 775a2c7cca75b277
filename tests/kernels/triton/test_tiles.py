"""The engine in tiles of any shape: rows unlike columns, more or fewer of them than chunks."""

import itertools

import pytest
import torch

from cosloss.kernels.eager import in_batch as eager
from cosloss.kernels.triton import card, in_batch
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
