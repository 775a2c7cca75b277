"""How small a gradient the judge in float64 can tell from zero.

At a point that training has solved, a gradient is what is left of numbers that cancel: a cross
entropy of 1e-19 comes from logits of 200, and float64 rounds it, and its gradient, to noise. The
size of what cancels is that of the same function's gradient at a point that is not solved: at the
same rows, matched otherwise.
"""

from typing import Any

import torch
from torch import Tensor

from cosloss.gradient_check.calls import gradients
from cosloss.gradient_check.cotangents import Cotangents
from cosloss.gradient_check.nests import Function, replace_tensors, tensors_in

ROUNDINGS = 64 * torch.finfo(torch.float64).eps


def resolution(
    judge: Function, exact: Any, wanted: list[str], cotangents: Cotangents
) -> dict[str, float]:
    """The norm up to which the judge's value and each of its gradients may be noise.

    Empty where the rows cannot be matched otherwise.
    """
    tensors = tensors_in(exact)
    moved: dict[str, Tensor] = {}
    for turn, name in enumerate(wanted, 1):
        x = tensors[name]
        if x.ndim and len(x) > 1:
            moved[name] = x.roll(turn, 0)
    try:
        matched = replace_tensors(exact, moved)
        found = gradients(judge, matched, wanted, cotangents) if moved else {}
    except Exception:  # whatever the rows must have in common, they have no longer
        return {}
    sizes = {name: ROUNDINGS * g.norm().item() for name, g in found.items()}
    return {name: size for name, size in sizes.items() if size == size}
