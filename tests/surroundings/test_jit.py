"""torch.jit: scripting is refused by name; tracing too, where it would be wrong."""

from functools import partial

import pytest
import torch

from cosloss import functional, losses
from tests.surroundings.calls import CALLS, IN_BATCH, arguments, error

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.jit's own deprecation
MODULES = {name: getattr(losses, name) for name in losses.__all__}
MODULES["MemoryBank"] = partial(losses.MemoryBank, 4, 3)


@pytest.mark.parametrize("name", MODULES)
def test_scripting(name):
    module = MODULES[name]
    for given in (module(), torch.nn.Sequential(torch.nn.Linear(3, 3), module())):
        with pytest.raises(RuntimeError, match=f"does not support {name}: use"):
            torch.jit.script(given)


@pytest.mark.parametrize("name", CALLS)
def test_tracing(name):
    def call(a, b):
        rows = {k: x.detach()[: len(a)] for k, x in arguments().items() if k in "ywgl"}
        return CALLS[name].function(functional, arguments() | rows | {"a": a, "b": b})

    a, b = torch.randn(2, 6, 8)
    if name in IN_BATCH:
        with pytest.raises(RuntimeError, match="would fix an in-batch loss to this batch size"):
            torch.jit.trace(call, (a, b))
    elif name != "cosine_embedding":  # whose target is a constant of this trace
        traced = torch.jit.trace(call, (a, b))
        a, b = torch.randn(2, 4, 8)
        assert error([traced(a, b)], [call(a, b)]) == 0
