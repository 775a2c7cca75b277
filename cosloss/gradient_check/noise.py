"""Rounding noise told from faults: noise changes when the inputs move by a rounding, faults stay.

Where terms cancel, a bias before a batch norm, a difference of close numbers, an SSIM, the gradient
that is left has errors that have nothing to do with its size. They are known by being random: over
inputs x (1 + 4 u s), s random signs, and scales of the incoming gradient, they average out, while
what a wrong formula adds is the same.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cosloss.gradient_check.calls import (
    Cotangents,
    Function,
    change_each,
    full_precision,
    gradients,
    in_float64,
)
from cosloss.gradient_check.generators import Draw
from cosloss.gradient_check.layouts import Layout, as_it_is, laid_out

POINTS = 4
MOVE = 4.0
# of the mean of 5 errors, in units of their spread: 0.5 where they are independent
AVERAGED = 1.0
SAFETY = 4.0
CANCELLING = 64.0


def noise_budgets(
    fn: Function,
    twin: Function | None,
    inputs: Any,
    wanted: list[str],
    cotangents: Cotangents,
    u: float,
    errors: Mapping[str, Tensor],
    layout: Layout = as_it_is,
) -> dict[str, float]:
    """What each gradient's error may be as noise, as a norm; 0 where it is no noise.

    With a twin it is at most four times the largest error of the twin; without one it is at most 64
    roundings at the scale of the largest gradient. A function must give the same bits twice.
    """
    draw = Draw(cotangents.seed + 1)
    ours: list[dict[str, Tensor]] = []
    peers: list[dict[str, Tensor]] = []

    def moved(t: Tensor) -> Tensor:
        # by two to four of its roundings: by one, half of the entries stay where they are
        return (t.detach() * (1 + MOVE * u * draw.signs(t.real))).to(t.dtype)

    for _ in range(POINTS):

        def nearby(name: str, t: Tensor) -> Tensor:
            return moved(t) if name in wanted else t

        point = change_each(nearby, inputs)
        # constants, a mean's 1 / N, are rounded alike at every point, but not at every scale
        factor = (9 + draw.below(7)) / 8
        weights = cotangents.scaled(factor)
        with full_precision(inputs):
            exact = laid_out(in_float64(point), layout)
            truth = gradients(twin or fn, exact, wanted, weights.laid_out(layout))
        ours.append(_errors(gradients(fn, point, wanted, weights), truth, factor))
        if twin:
            peers.append(_errors(gradients(twin, point, wanted, weights), truth, factor))
    again = _errors(gradients(fn, point, wanted, weights), truth, factor)
    # a gradient that cancels is rounded at the scale of the others, which do not
    scale = max(truth[name].square().mean().sqrt().item() for name in wanted) / factor
    budgets = {}
    for name in wanted:
        found = torch.stack([errors[name], *(error[name] for error in ours)])
        mean = found.mean(0)
        spread = (found - mean).square().mean(0).sum().sqrt().item()
        random = bool(mean.norm() <= AVERAGED * spread) and torch.equal(again[name], ours[-1][name])
        limit = min(SAFETY * spread, CANCELLING * u * scale * errors[name].numel() ** 0.5)
        if twin:
            limit = SAFETY * max(peer[name].norm().item() for peer in peers)
        budgets[name] = limit if random and limit == limit else 0.0
    return budgets


def _errors(
    found: Mapping[str, Tensor], truth: Mapping[str, Tensor], factor: float
) -> dict[str, Tensor]:
    return {name: (found[name] - truth[name]) / factor for name in truth}
