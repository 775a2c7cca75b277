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

from cosloss.gradient_check.calls import full_precision, gradients, in_float64
from cosloss.gradient_check.cotangents import Cotangents
from cosloss.gradient_check.generators import Draw
from cosloss.gradient_check.layouts import Layout, as_it_is, laid_out
from cosloss.gradient_check.nests import Function, change_each

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
    spreads = {name: _Spread(errors[name]) for name in wanted}
    peers = dict.fromkeys(wanted, 0.0)

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
        ours = gradients(fn, point, wanted, weights)
        for name in wanted:
            spreads[name].add((ours[name] - truth[name]) / factor)
        if twin:
            peer = gradients(twin, point, wanted, weights)
            for name in wanted:
                peers[name] = max(peers[name], float((peer[name] - truth[name]).norm()) / factor)
    again = gradients(fn, point, wanted, weights)
    # a gradient that cancels is rounded at the scale of the others, which do not
    scale = max(truth[name].square().mean().sqrt().item() for name in wanted) / factor
    budgets = {}
    for name, found in spreads.items():
        random = found.averages_out and torch.equal(again[name], ours[name])
        limit = min(SAFETY * found.spread, CANCELLING * u * scale * truth[name].numel() ** 0.5)
        if twin:
            limit = SAFETY * peers[name]
        budgets[name] = limit if random and limit == limit else 0.0
    return budgets


class _Spread:
    """The mean of several errors and how far they are from it, entry by entry."""

    def __init__(self, first: Tensor) -> None:
        self.count = 1
        self.mean = first.clone()
        self.squares = torch.zeros_like(first)

    def add(self, error: Tensor) -> None:
        """Take one more, as Welford does."""
        self.count += 1
        delta = error - self.mean
        self.mean += delta / self.count
        self.squares += delta * (error - self.mean)

    @property
    def spread(self) -> float:
        """The root of the variance, as a norm over all entries."""
        return float((self.squares.sum() / self.count).sqrt())

    @property
    def averages_out(self) -> bool:
        """Whether the mean is no longer than errors that are independent leave it."""
        return bool(self.mean.norm() <= AVERAGED * self.spread)
