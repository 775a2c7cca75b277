"""Every op of the table in every surrounding that `cosloss.verify` tries, on every CPU backend."""

from itertools import product

import pytest
import torch

from cosloss.kernels import dispatch
from cosloss.testing import OPS
from cosloss.testing.surroundings import (
    SURROUNDINGS,
    TOLERANCE,
    default_device,
    export,
    transform,
)
from tests.slow import slow

CASES = list(product(SURROUNDINGS, ("eager", "native"), ("float64", "float32")))
# exporting takes a hundred times as long as the rest
SLOW = [case for case in CASES if case[0] is export and case[1:] != ("native", "float32")]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize(
    ("surrounding", "backend", "dtype"),
    [*(case for case in CASES if case not in SLOW), *slow(*SLOW)],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_an_op_is_itself(surrounding, op, backend, dtype):
    dtype = getattr(torch, dtype)
    with dispatch.use(backend):
        for sample in op.generic():
            found = surrounding(op, sample, dtype, "cpu")
            assert found <= TOLERANCE * torch.finfo(dtype).eps, sample.name


def test_a_loss_that_asks_for_the_default_is_caught():
    class Op:
        @staticmethod
        def function(x):
            return (x * torch.tensor(2.0)).sum()

    from cosloss.testing import Sample

    sample = Sample("", {"x": torch.ones(3, dtype=torch.float64)})
    with pytest.raises(RuntimeError, match="device"):
        default_device(Op, sample, torch.float64, "cpu")
    assert transform(Op, sample, torch.float64, "cpu") == 0
