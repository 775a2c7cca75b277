"""A gradient against finite differences in float64, at one point.

Along a random direction d of length 1, <g, d> is compared with (f(x + h d) - f(x - h d)) / 2h. With
n entries sqrt(n) <e, d> estimates |e|, so a few directions measure the error of the whole gradient
and a wrong entry does not hide. torch.autograd.gradcheck then tries the same point: its fast mode
on all entries, and its slow mode on a block of them.

A failure is confirmed nearby, since a kink of the function lies at single points, and with larger
steps, since a function may compute in float32 whatever its inputs are. Outputs that are infinite, a
mask of -inf, are left out. A point is not in the function's domain where an output is NaN, or where
the gradient of the finite ones is not finite, or a step makes more that are not.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError

from cosloss.arguments import check_count, check_flags
from cosloss.gradient_check.calls import as_real, gradients
from cosloss.gradient_check.cotangents import Cotangents
from cosloss.gradient_check.domain import (
    DomainError,
    size_of_value,
    weighted_gradients,
    weighted_value,
)
from cosloss.gradient_check.fresh_graphs import with_fresh_graphs
from cosloss.gradient_check.generators import Draw
from cosloss.gradient_check.nests import (
    Function,
    change_each,
    display_name,
    replace_tensors,
    tensors_in,
)
from cosloss.gradient_check.stop_gradients import StopGradients

STEP = 1e-6
# of rows of length 1: the truncation h^2 f'''/6 and the rounding 2^-53 |f| / h stay well below
RELATIVE = 1e-5
ROUNDING = 1e-8
# gradcheck sees so many outputs one by one, or so many random sums of more
OUTPUTS, SUMS = 64, 4
NEARBY = 2  # points that are tried where one fails


@dataclass(frozen=True)
class FiniteDifferences:
    """How to check.

    Args:
        directions: random directions per input and point.
        slow_entries: entries per input that gradcheck tries one by one, a random block; 0 for none.
        unit_rows: rescale rows to length 1 first: the gradient of a cosine shrinks like 1/|x|, and
            an error would drown in any absolute tolerance.
        forward_ad: compare forward-mode derivatives too.
        second_order: run gradgradcheck too.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: directions is not positive, or slow_entries negative.
    """

    directions: int = 4
    slow_entries: int = 16
    unit_rows: bool = True
    forward_ad: bool = False
    second_order: bool = False

    def __post_init__(self) -> None:
        check_count("directions", self.directions)
        check_count("slow_entries", self.slow_entries, 0)
        check_flags(
            unit_rows=self.unit_rows, forward_ad=self.forward_ad, second_order=self.second_order
        )


DEFAULT = FiniteDifferences()


@dataclass(frozen=True)
class PointReport:
    """What was found at one point.

    `slope` estimates the norm of the true gradient; `constants` are the lines that stop gradients,
    if it is right with these alone.
    """

    problem: str
    absolute: float
    relative: float
    slope: float
    constants: tuple[str, ...] = ()


def check_point(
    fn: Function,
    point: Any,
    wanted: list[str],
    how: FiniteDifferences,
    surrogate: Function | None,
    draw: Draw,
) -> PointReport:
    """The check, repeated if it fails: with stop-gradients held, and nearby.

    A gradient that is the function's own derivative is right, whatever the function detaches on its
    way. One that stops on purpose is the derivative with those values held constant. A move leaves
    a kink behind, and no wrong formula.
    """
    if surrogate is None:
        plain = _at(fn, point, wanted, how, None, draw)
        if not plain.problem:
            return plain
    return with_stops(fn, point, wanted, draw, partial(_at, how=how, surrogate=surrogate))


def with_stops(
    fn: Function,
    point: Any,
    wanted: list[str],
    draw: Draw,
    look: Callable[..., PointReport],
) -> PointReport:
    """What `look` finds with fn's stop-gradients held, at the point or else nearby."""
    held = StopGradients(fn)
    first = found = look(held, point, wanted, draw=draw)
    for _ in range(NEARBY):
        # no kink excuses a gradient that is NaN or infinite
        if not found.problem or not math.isfinite(first.absolute):
            break
        found = look(StopGradients(fn), nearby(point, wanted, draw), wanted, draw=draw)
    return first if found.problem else replace(found, constants=tuple(held.places))


def nearby(point: Any, wanted: list[str], draw: Draw) -> Any:
    """The point with a move of a thousandth, which leaves a kink behind."""

    def move(name: str, t: Tensor) -> Tensor:
        if name not in wanted:
            return t
        way = draw.normal(t)
        if not t.is_complex() and t.numel() and t.min() >= 0:  # zero may be where its domain ends
            way = way.abs()
        return t + 1e-3 * t.abs().square().mean().sqrt() * way

    return change_each(move, point)


def _at(
    fn: Function,
    point: Any,
    wanted: list[str],
    how: FiniteDifferences,
    surrogate: Function | None,
    draw: Draw,
) -> PointReport:
    cotangents, grads = weighted_gradients(fn, point, wanted, draw)
    if surrogate is not None:
        return _beside(grads, gradients(surrogate, point, wanted, cotangents), wanted)
    worst = PointReport("", 0.0, 0.0, 0.0)
    exact = True
    for name in wanted:
        for _ in range(how.directions):
            error, size, allowed, precise = _along(fn, point, name, grads, cotangents, draw)
            exact = exact and precise
            relative = error / size if size > ROUNDING else 0.0
            problem = ""
            if not math.isfinite(error):
                problem = f"{display_name(name)}: the gradient is NaN or infinite, the value is not"
            elif not error <= allowed:
                problem = (
                    f"{display_name(name)}: the gradient is off by {relative:.1e} of its norm, "
                    f"by finite differences (allowed {allowed / max(size, ROUNDING):.0e})"
                )
            worst = PointReport(
                worst.problem or problem,
                largest((worst.absolute, error)),
                largest((worst.relative, relative)),
                largest((worst.slope, size)),
            )
    if worst.problem or not exact:
        return worst
    value = max(1.0, size_of_value(grads))
    problem = _torch_gradcheck(
        fn, point, wanted, how, worst.slope, value, draw, cotangents.left_out
    )
    return PointReport(problem, worst.absolute, worst.relative, worst.slope)


def _along(
    fn: Function,
    point: Any,
    name: str,
    grads: Mapping[str, Tensor],
    cotangents: Cotangents,
    draw: Draw,
) -> tuple[float, float, float, bool]:
    """Estimated error, size and allowed error of one gradient's norm, and whether f is precise."""
    x, grad = tensors_in(point)[name], grads[name]
    root = math.sqrt(x.numel())
    direction = draw.normal(x)
    direction /= direction.norm()
    # a step in proportion to the rows' length, which is 1 unless the caller wants otherwise
    step = STEP * (float(x.norm()) / math.sqrt(len(x) if x.ndim > 1 else x.numel()) or 1.0)

    def slope(step: float) -> float:
        up = weighted_value(
            fn, replace_tensors(point, {name: x + step * direction}), grads, cotangents
        )
        return (
            up
            - weighted_value(
                fn, replace_tensors(point, {name: x - step * direction}), grads, cotangents
            )
        ) / (2 * step)

    analytic, numeric = float((grad * as_real(direction)).sum()), slope(step)
    if not math.isfinite(numeric):
        raise DomainError("its value is NaN or infinite near its inputs")
    size = max(float(grad.norm()), abs(numeric) * root)
    noise = ROUNDING * max(1.0, size_of_value(grads)) * STEP / step
    allowed = RELATIVE * size + noise * root
    error = abs(analytic - numeric) * root
    if not error > allowed:
        return error, size, allowed, True
    # how well can the slope be known? Small steps show f's own noise, and each pair of steps the
    # truncation; the best step has the least of both
    steps = [step * 10**k for k in range(6)]
    slopes = [numeric, *(slope(h) for h in steps[1:])]
    changes = [abs(a - b) for a, b in pairwise(slopes)]
    # a value in float32 beside a large constant does not change at all in the smallest steps
    level = next((i for i, s in enumerate(slopes) if s != 0), 0)
    rounding = max(change * h for change, h in zip(changes[: level + 2], steps, strict=False))
    uncertain, numeric = min(
        (change + 3 * rounding / h, s)
        for change, h, s in zip(changes, steps[1:], slopes[1:], strict=True)
    )
    size = max(float(grad.norm()), abs(numeric) * root)
    # an uncertainty beyond a tenth of the gradient decides nothing, and excuses nothing
    allowed += min(3 * uncertain * root, 0.1 * size)
    return abs(analytic - numeric) * root, size, allowed, uncertain * root <= RELATIVE * size


def _torch_gradcheck(
    fn: Function,
    point: Any,
    wanted: list[str],
    how: FiniteDifferences,
    size: float,
    value: float,
    draw: Draw,
    left_out: Mapping[str, Tensor],
) -> str:
    """What torch.autograd.gradcheck, and gradgradcheck, have to say: nothing if all is right."""

    inputs = tensors_in(point)

    def check(entries: int | None, fast: bool, second_order: bool) -> None:
        # a few entries of each input vary, or all; the others stay as they are
        sums, weights = Draw(draw.below(2**31)), list[Tensor]()
        parts = {name: _split(inputs[name].detach().flatten(), entries, draw) for name in wanted}
        leaves = [part[1].clone().requires_grad_() for part in parts.values()]

        def outputs(*varied: Tensor) -> tuple[Tensor, ...]:
            given = {
                name: torch.cat([before, x, after]).reshape(inputs[name].shape)
                for (name, (before, _, after)), x in zip(parts.items(), varied, strict=True)
            }
            found = tensors_in(fn(replace_tensors(point, given))).items()
            results = [
                t.masked_fill(left_out[n], 0) if n in left_out else t
                for n, t in found
                if t.is_floating_point() or t.is_complex()
            ]
            if sum(t.numel() for t in results) <= OUTPUTS:
                return tuple(results)
            # gradcheck keeps a row of the Jacobian per entry: of many entries it sees a few sums
            flat = torch.cat([as_real(t, detach=False).flatten() for t in results])
            if not weights:  # drawing them costs more than most functions
                like = flat.detach().float()
                weights.extend(sums.normal(like) for _ in range(SUMS))
            return (torch.stack([(flat * weight).sum() for weight in weights]),)

        first_order = partial(gradcheck, check_forward_ad=how.forward_ad)
        judge = gradgradcheck if second_order else first_order
        once = not (second_order or how.forward_ad)
        atol = 1e-5 * size + 10 * ROUNDING * value
        function = with_fresh_graphs(outputs) if once else outputs
        judge(function, tuple(leaves), atol=atol, rtol=1e-4, fast_mode=fast)

    try:
        check(None, True, False)
        if how.slow_entries:
            check(how.slow_entries, False, False)
        if how.second_order:
            check(None, True, True)
    except GradcheckError as error:
        return "torch.autograd.gradcheck: " + " ".join(str(error).split())[:160]
    return ""


def _split(flat: Tensor, entries: int | None, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """A random block of so many entries, with what is before and after it; None for all."""
    if entries is None or entries >= len(flat):
        return flat[:0], flat, flat[:0]
    start = draw.below(len(flat) - entries + 1)
    return flat[:start], flat[start : start + entries], flat[start + entries :]


def _beside(
    grads: Mapping[str, Tensor], right: Mapping[str, Tensor], wanted: list[str]
) -> PointReport:
    errors = {name: float((grads[name] - right[name]).norm()) for name in wanted}
    sizes = {name: float(right[name].norm()) for name in wanted}
    wrong = [name for name in wanted if not errors[name] <= RELATIVE * sizes[name] + 1e-12]
    problem = (
        f"{display_name(wrong[0])}: the gradient is not the declared surrogate's" if wrong else ""
    )
    relative = largest(errors[n] / sizes[n] if sizes[n] else errors[n] for n in wanted)
    return PointReport(problem, largest(errors.values()), relative, largest(sizes.values()))


def largest(numbers: Any) -> float:
    """The largest, and NaN if any is."""
    numbers = list(numbers)
    return math.nan if any(n != n for n in numbers) else max(numbers, default=0.0)
