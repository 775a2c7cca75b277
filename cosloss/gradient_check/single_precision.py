"""Finite differences for functions that refuse float64: in float32, or in their inputs' dtype.

Differences of rounded numbers have noise, so that steps are long, and slopes are measured with
their doubt (`slopes`). Lines go along the gradient itself, where a factor is seen best, and in
random directions, where a term that is missing is.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cosloss.gradient_check.calls import as_real
from cosloss.gradient_check.copies import wide_dtype
from cosloss.gradient_check.cotangents import Cotangents
from cosloss.gradient_check.domain import weighted_gradients, weighted_value
from cosloss.gradient_check.generators import Draw
from cosloss.gradient_check.nests import (
    Function,
    change_each,
    display_name,
    replace_tensors,
    tensors_in,
)
from cosloss.gradient_check.point import PointReport, largest, with_stops
from cosloss.gradient_check.slopes import AGREES, Slope, confirmed, measure

NEAR = 1e-3  # of the input's norm, along the gradient
FAR = 4e-3  # and in a random direction, in which little changes
ROUGH = 0.03  # of a random direction's slope, below which the next step need not be tried


def narrower(inputs: Any) -> list[Any]:
    """The inputs in float32 where they are narrower, and as they are, if that differs."""

    def narrow(t: Tensor) -> bool:
        return t.is_floating_point() and t.dtype.itemsize < 4

    tensors = tensors_in(inputs).values()
    if all(t.dtype == wide_dtype(t.dtype) for t in tensors):
        return []
    single = change_each(lambda n, t: t.detach().float() if narrow(t) else t.detach(), inputs)
    return (
        [single, change_each(lambda n, t: t.detach(), inputs)]
        if any(map(narrow, tensors))
        else [single]
    )


def check_lines(
    fn: Function, point: Any, wanted: list[str], directions: int, draw: Draw
) -> PointReport:
    """The check at a point, in the dtype of its tensors.

    A slope that is off is tried again nearby, since a kink lies at single points.

    Raises:
        ValueError: the slopes say nothing, neither right nor wrong.
    """
    plain = _at(fn, point, wanted, directions, draw)
    if not plain.problem:
        return plain
    return with_stops(fn, point, wanted, draw, partial(_at, directions=directions))


def _at(fn: Function, point: Any, wanted: list[str], directions: int, draw: Draw) -> PointReport:
    cotangents, grads = weighted_gradients(fn, point, wanted, draw)
    tensors = tensors_in(point)
    slopes: dict[str, list[Slope]] = {}
    problem = ""
    for name in wanted:
        x, grad = tensors[name], grads[name]
        size = float(as_real(x).norm()) or 1.0
        steep, random = float(grad.norm()), [draw.normal(x) for _ in range(directions)]
        typical = steep / max(grad.numel(), 1) ** 0.5
        lines = [(grad / steep, NEAR * size, steep, AGREES)] if steep else []
        lines += [(as_real(d / d.norm()), FAR * size, typical, ROUGH) for d in random]
        slopes[name] = []
        for direction, first, scale, agrees in lines:
            line = _Line(fn, point, name, grads, cotangents, direction)
            look = partial(line.slope, first, scale, agrees)
            slope = look()
            slopes[name].append(slope)
            if slope.wrong and not problem and confirmed(slope, look):
                problem = _problem(name, slope)
    # of a gradient that is zero nothing is as long as it should be
    seen = [found for name, found in slopes.items() if float(grads[name].norm())]
    if not problem and not all(found[0].right for found in seen):
        kind = str(tensors[wanted[0]].dtype).removeprefix("torch.")
        raise ValueError(f"in {kind} its noise hides its slope")
    every = [s for found in slopes.values() for s in found if s.right or problem]
    return PointReport(
        problem,
        largest(abs(s.measured - s.expected) for s in every),
        largest(s.error for s in every),
        largest(abs(s.measured) for s in every),
    )


class _Line:
    """The function's value along a line, and the change that the gradient says."""

    def __init__(
        self,
        fn: Function,
        point: Any,
        name: str,
        grads: Mapping[str, Tensor],
        cotangents: Cotangents,
        direction: Tensor,
    ) -> None:
        self.fn = fn
        self.point = point
        self.name = name
        self.grads = grads
        self.cotangents = cotangents
        self.x = tensors_in(point)[name]
        x = self.x
        self.direction = torch.view_as_complex(direction) if x.is_complex() else direction

    def slope(self, first: float, scale: float, agrees: float, steps: float = 1.0) -> Slope:
        """The slope from steps that begin with `steps` times `first`."""
        return measure(self, self(0.0)[0], steps * first, scale, agrees=agrees)

    def __call__(self, t: float) -> tuple[float, float]:
        moved = (self.x + t * self.direction).to(self.x.dtype)
        # what the move is once it is rounded
        change = as_real(moved) - as_real(self.x)
        point = replace_tensors(self.point, {self.name: moved})
        found = weighted_value(self.fn, point, self.grads, self.cotangents)
        return found, float((self.grads[self.name] * change).sum())


def _problem(name: str, slope: Slope) -> str:
    return (
        f"{display_name(name)}: the gradient's slope is {slope.expected:.4g}, where finite "
        f"differences in its precision measure {slope.measured:.4g} (known to {slope.doubt:.1g})"
    )
