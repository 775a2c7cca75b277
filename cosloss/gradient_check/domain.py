"""Values and gradients where a function is defined: outputs that are infinite are left out."""

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor

from cosloss.gradient_check.calls import as_real, copied_inputs, gradients, outputs_of
from cosloss.gradient_check.cotangents import Cotangents
from cosloss.gradient_check.generators import Draw
from cosloss.gradient_check.nests import Function


class DomainError(ValueError):
    """The function has no finite value, or no slope, at a point."""


def weighted_gradients(
    fn: Function, point: Any, wanted: list[str], draw: Draw
) -> tuple[Cotangents, Mapping[str, Tensor]]:
    """Generic weights of the outputs, zero on those that are infinite, and the gradients.

    Raises:
        DomainError: an output is NaN; with these left out the gradients are not finite, or nothing
            is left.
    """
    cotangents = Cotangents(draw.below(2**31))
    grads = gradients(fn, point, wanted, cotangents)
    if grads["value"].isfinite().all():
        return cotangents, grads
    outputs = outputs_of(fn(copied_inputs(point, wanted)[0]))
    left_out = {name: t.detach().isinf() for name, t in outputs.items()}
    cotangents = cotangents.without(left_out)
    grads = gradients(fn, point, wanted, cotangents)
    nothing = all(marked.all() for marked in left_out.values())
    finite = all(grads[name].isfinite().all() for name in wanted)
    if nothing or not finite or grads["value"].isnan().any():
        raise DomainError("it returns NaN or infinity")
    return cotangents, grads


def size_of_value(grads: Mapping[str, Tensor]) -> float:
    """The sum of the outputs' magnitudes, those left out that are not finite."""
    return float(grads["value"].abs().nan_to_num(0.0, posinf=0.0).sum())


def weighted_value(
    fn: Function, inputs: Any, wanted: Container[str], cotangents: Cotangents
) -> float:
    """The outputs' sum, weighted by `cotangents`."""
    outputs = outputs_of(fn(copied_inputs(inputs, wanted)[0]))
    weights = cotangents.on(outputs)
    pairs = ((as_real(o), as_real(c)) for o, c in zip(outputs.values(), weights, strict=True))
    # an output without a weight may be infinite
    return float(sum(torch.where(c == 0, 0.0, o * c).sum() for o, c in pairs))
