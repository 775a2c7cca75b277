"""A gradient that is too long or too short as a whole, by less than coarse formats round.

Roundings point anywhere: of n entries they leave 1/sqrt(n) along the gradient, so that a common
factor of 1.03 stands out in bfloat16, where each entry may be off by more. It is wrong where it is
beyond four times what the twin's own roundings leave there, what rounding a scale of the inputs
does, and the unit roundoff, at the point and at others beside it alike.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cosloss.gradient_check.calls import full_precision, gradients, in_float64
from cosloss.gradient_check.cotangents import Cotangents
from cosloss.gradient_check.generators import Draw
from cosloss.gradient_check.nests import Function, replace_tensors, tensors_in

COARSE = 2.0**-12  # finer formats round by less than any factor that matters
SAFETY = 4.0
POINTS = 3
MOVE = 4.0


def factor_faults(
    fn: Function,
    twin: Function,
    inputs: Any,
    wanted: list[str],
    cotangents: Cotangents,
    u: float,
    found: tuple[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor]],
) -> dict[str, str]:
    """What is wrong, by the input's name.

    Args:
        fn: a function of the nest `inputs`.
        twin: the same in plain operations.
        inputs: the nest.
        wanted: names of the inputs whose gradients are judged.
        cotangents: on the outputs.
        u: the unit roundoff of the coarsest format at work.
        found: fn's gradients, the twin's, and the twin's in float64.
    """
    if u < COARSE:
        return {}
    measured = {n: [_Beside(*(each[n] for each in found))] for n in wanted}
    suspects = [n for n, (at,) in measured.items() if at.beyond(SAFETY * u)]
    if not suspects:
        return {}
    draw = Draw(cotangents.seed + 3)
    tensors = tensors_in(inputs)
    for _ in range(POINTS):
        moved = {n: _times(tensors[n], 1 + MOVE * u * draw.signs(tensors[n])) for n in suspects}
        point = replace_tensors(inputs, moved)
        three = [gradients(each, point, suspects, cotangents) for each in (fn, twin)]
        with full_precision(inputs):
            three.append(gradients(twin, in_float64(point), suspects, cotangents))
        for name in suspects:
            measured[name].append(_Beside(*(each[name] for each in three)))
    # a rounded temperature, or another scale, acts on all entries alike
    with full_precision(inputs):
        exact = in_float64(inputs)
        scaled = {n: t * (1 + u) for n, t in tensors_in(exact).items() if n in suspects}
        scaled_gradients = gradients(twin, replace_tensors(exact, scaled), suspects, cotangents)
    faults = {}
    for name in suspects:
        scale = abs(_along(scaled_gradients[name], found[2][name]))
        allowed = SAFETY * max(u, scale, *(at.twin for at in measured[name]))
        ours = [at.ours for at in measured[name]]
        alike = all(f > 0 for f in ours) or all(f < 0 for f in ours)
        if alike and all(at.beyond(allowed) for at in measured[name]):
            faults[name] = (
                f"it is {1 + ours[0]:.4g} times the right one, where roundings explain "
                f"{1 + allowed:.4g}"
            )
    return faults


class _Beside:
    """How much of the right gradient is in the errors of fn's and of the twin's."""

    def __init__(self, ours: Tensor, twin: Tensor, truth: Tensor) -> None:
        self.ours, along = _along(ours, truth), abs(_along(twin, truth))
        norm, square = truth.norm(), truth.square()
        # so many entries count: a few that are large are few
        entries = float(square.sum().square() / square.square().sum())
        self.twin = along + float((twin - truth).norm() / norm) / max(entries, 1.0) ** 0.5

    def beyond(self, allowed: float) -> bool:
        """Whether fn's share is beyond this, and beyond what the twin's roundings leave."""
        return abs(self.ours) > allowed and abs(self.ours) > SAFETY * self.twin


def _along(g: Tensor, truth: Tensor) -> float:
    """By which part of itself the truth is too long in g; NaN of a truth that is zero."""
    return float(((g - truth) * truth).sum() / truth.square().sum())


def _times(t: Tensor, factor: Tensor) -> Tensor:
    return (t.detach() * factor).to(t.dtype).requires_grad_(t.requires_grad)
