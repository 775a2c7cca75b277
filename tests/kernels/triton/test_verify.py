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
    ("name", "kernels", "function"),
    [
        ("cosine_similarity", cosine_similarity, "backward"),
        ("sigmoid_contrastive_loss", in_batch, "input_grads"),
    ],
)
def test_verify_judges_the_kernels(name, kernels, function, monkeypatch):
    op = next(op for op in OPS if op.name == name)
    generic = [*op.generic()][:1]
    monkeypatch.setattr(type(op), "budget", lambda *arguments, own=op.budget: own(arguments[1]))
    small = type(op)(op.name, op.function, op.twin, lambda: generic, lambda dtype: generic)
    assert verify.verify([small], ["float16"], show=lambda line: None)
    right = getattr(kernels, function)

    def wrong(*arguments, **keywords):
        found = right(*arguments, **keywords)
        if function == "backward":
            return tuple(None if g is None else 1.1 * g for g in found)
        return found._replace(sources=[1.1 * g for g in found.sources])

    monkeypatch.setattr(kernels, function, wrong)
    lines = []
    assert not verify.verify([small], ["float16"], show=lines.append)
    assert "FAIL at" in lines[1]
