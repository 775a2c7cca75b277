"""`python -m cosloss.verify` goes through the Triton kernels where they are the backend."""

import pytest

from cosloss import verify
from cosloss.kernels.triton import cosine_similarity, in_batch
from cosloss.testing import OPS

pytestmark = [
    pytest.mark.usefixtures("triton_backend"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, in the interpreter
]


@pytest.mark.parametrize(
    ("name", "kernels"),
    [("cosine_similarity", cosine_similarity), ("sigmoid_contrastive_loss", in_batch)],
)
def test_verify_judges_the_kernels(name, kernels, monkeypatch):
    op = next(op for op in OPS if op.name == name)
    generic = [*op.generic()][:1]
    monkeypatch.setattr(type(op), "budget", lambda *arguments, own=op.budget: own(arguments[1]))
    small = type(op)(op.name, op.function, op.twin, lambda: generic, lambda dtype: generic)
    assert verify.verify([small], ["float16"], show=lambda line: None)
    right = kernels.backward
    monkeypatch.setattr(
        kernels,
        "backward",
        lambda *arguments, **keywords: tuple(
            None if g is None else 1.1 * g for g in right(*arguments, **keywords)
        ),
    )
    lines = []
    assert not verify.verify([small], ["float16"], show=lines.append)
    assert "FAIL at" in lines[1]
