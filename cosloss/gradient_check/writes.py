"""Whether a call writes over what it is given."""

from typing import Any

import torch
from torch import Tensor

from cosloss.gradient_check.calls import outputs_of, undisturbed
from cosloss.gradient_check.copies import copy_tensor
from cosloss.gradient_check.cotangents import Cotangents
from cosloss.gradient_check.nests import Function, change_each, display_name


def overwrites(fn: Function, inputs: Any, wanted: list[str]) -> str:
    """What a call of fn, or its backward, writes over: an argument or the incoming gradient."""
    given: dict[str, Tensor] = {}

    def handed(name: str, t: Tensor) -> Tensor:
        copied = copy_tensor(t)
        given[name] = copied
        # behind a node, as in training: into a leaf nothing may be written
        return copied.requires_grad_().view_as(copied) if name in wanted else copied

    with undisturbed():
        copies = change_each(handed, inputs)
        before = {name: copy_tensor(t) for name, t in given.items()}
        outputs = outputs_of(fn(copies))
        incoming = Cotangents(0).on(outputs)
        kept = [copy_tensor(g) for g in incoming]
        leaves = [given[name] for name in wanted]
        torch.autograd.grad(list(outputs.values()), leaves, incoming, allow_unused=True)
    for name, t in before.items():
        if differ(given[name], t):
            return f"the call, or its backward, writes over its argument {display_name(name)}"
    written = any(map(differ, incoming, kept))
    return "its backward writes over its incoming gradient" if written else ""


def differ(a: Tensor, b: Tensor) -> Tensor:
    """Whether any number is another, NaN counted as equal; without waiting for a device."""
    return ((a != b) & ~((a != a) & (b != b))).any()
