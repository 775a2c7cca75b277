"""The private interfaces of torch that `cosloss.modes` uses: there, meaning what they did."""

import operator
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import vmap

from cosloss import modes

PRIVATE = (
    "torch._C._current_graph_task_id",
    "torch._C._will_engine_execute_node",
    "torch.autograd._get_sequence_nr",
    "torch.Tensor._use_count",
    "torch._C._are_functorch_transforms_active",
    "torch._C._dispatch_keys",
    "torch._C.DispatchKey.Python",
    "torch._C._functorch.is_functorch_wrapped_tensor",
    "torch._C._functorch.is_legacy_batchedtensor",
    "torch._C._is_alias_of",
    "torch._C._is_tracing",
    "torch._C._set_grad_enabled",
    "torch._C._len_torch_dispatch_stack",
    "torch.autograd.forward_ad._current_level",
    "torch.fx.experimental.proxy_tensor.get_proxy_mode",
)


@pytest.mark.parametrize("name", PRIVATE)
def test_torch_has_it(name):
    import torch.fx.experimental.proxy_tensor

    assert operator.attrgetter(name.removeprefix("torch."))(torch) is not None


def test_no_other_file_uses_one():
    library = Path(modes.__file__).parent
    private = ("torch._C", "forward_ad._", "_functorch", "autograd._get", "_use_count")
    users = {
        str(path.relative_to(library))
        for path in library.rglob("*.py")
        if any(name in path.read_text() for name in private)
    }
    # the gradient check shares no code with what it judges, and looks for a call of one by itself
    assert users == {"modes.py", "gradient_check/stop_gradients.py"}


def test_what_each_question_answers():
    x = torch.ones(2)
    seen = {}

    def look(name, tensor=x):
        seen[name] = (
            modes.differentiates_itself(tensor),
            modes.in_memory([tensor], {torch.float32}),
            modes.plain([tensor]),
            modes.readable(tensor),
        )

    look("nothing")
    look("parameter", torch.nn.Parameter(x))
    look("meta", x.to("meta"))
    look("negated", torch.ones(2, dtype=torch.cfloat).conj().imag)
    with torch.inference_mode():
        look("inference", torch.ones(2))
    vmap(lambda y: look("unrelated vmap") or y)(x)
    vmap(lambda y: look("batched", y) or y)(torch.ones(3, 2))
    with forward_ad.dual_level():
        look("level")
        look("tangent", forward_ad.make_dual(x, x))
    assert seen == {
        "nothing": (False, True, True, True),
        "parameter": (False, True, True, True),
        "meta": (True, False, True, False),
        "negated": (False, False, True, True),
        "inference": (False, True, True, True),
        "unrelated vmap": (True, False, True, True),
        "batched": (True, False, False, False),
        "level": (False, False, False, True),
        "tangent": (True, False, False, True),
    }
    assert modes.autocast_dtype(x) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert modes.autocast_dtype(x) is torch.bfloat16
        with modes.without_autocast(x):
            assert modes.autocast_dtype(x) is None
    assert modes.autocast_dtype(x.to("meta")) is None


TF32 = {
    "the first interface": "torch.backends.cuda.matmul.allow_tf32 = True",
    "by name": "torch.set_float32_matmul_precision('high')",
    "of products": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "of everything": "torch.backends.fp32_precision = 'tf32'",
}


def test_tf32_is_seen_by_whichever_interface_it_was_allowed():
    """Each in a process of its own: torch refuses some getters after some setters."""
    lines = ["import os, torch", "from cosloss.modes import multiplies_tf32"]
    for setting in TF32.values():
        child = f"    {setting}\n    os._exit(0 if multiplies_tf32() else 1)"
        lines += ["if (child := os.fork()) == 0:", child]
        lines += ["assert os.waitpid(child, 0)[1] == 0", "assert not multiplies_tf32()"]
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
