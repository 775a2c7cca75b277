"""A function's gradient against central differences, in float64, at live and generic points.

Along a direction d of length 1, with h = 1e-6, <g, d> is compared with
(f(x + h d) - f(x - h d)) / 2h. For random d and n entries, sqrt(n) <e, d> estimates |e|, so the
relative error of the whole gradient is estimated from a few directions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cosloss.gradient_check.calls import (
    cotangent,
    differentiable,
    full_precision,
    gradients,
    in_float64,
    map_tensors,
    replace_tensors,
    tensors_in,
    undisturbed,
)

STEP = 1e-6
# the truncation h^2 f'''/6 and the rounding 2^-53 |f| / h of a sound gradient stay 100 times below
RELATIVE_TOLERANCE = 1e-5
ROUNDING = 1e-8
DEGENERATE = 1e-4


@dataclass(frozen=True)
class FiniteDifferenceReport:
    """Errors of the gradient at the live and at the generic point, and the verdict.

    `degenerate` says that the live gradient is zero beside the generic one: nothing about the
    formula can be seen there.
    """

    passed: bool
    max_abs_error: float
    max_rel_error: float
    degenerate: bool
    reason: str

    def __str__(self) -> str:
        return self.reason


def check_finite_differences(
    fn: Callable[..., Any],
    *inputs: Any,
    directions: int = 4,
    unit_rows: bool = True,
    seed: int = 0,
    **options: Any,
) -> FiniteDifferenceReport:
    """Compare fn's gradient with finite differences, in float64, at the inputs and elsewhere.

    Args:
        fn: a function of tensors that computes in float64 when its inputs are.
        inputs: its arguments. Tensors that require a gradient are judged, or, where none does,
            every floating-point one.
        directions: how many random directions are tried per input and point.
        unit_rows: rescale rows to length 1 first: the gradient of a cosine shrinks like 1/|x|, and
            a fixed step would then say nothing.
        seed: of the directions and of the generic point.
        options: keyword arguments of fn.

    Returns:
        A `FiniteDifferenceReport`.

    Raises:
        ValueError: there is no input to differentiate by.

    Example:
        >>> x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        >>> check_finite_differences(torch.tanh, x).passed
        True
    """
    wanted = differentiable(inputs) or {
        name: t for name, t in tensors_in(inputs).items() if t.is_floating_point()
    }
    if not wanted:
        raise ValueError("none of the inputs is a floating-point tensor")
    return check_calls(
        lambda x: fn(*x, **options), inputs, list(wanted), directions, unit_rows, seed
    )


def check_calls(
    fn: Callable[[Any], Any],
    inputs: Any,
    wanted: list[str],
    directions: int = 4,
    unit_rows: bool = True,
    seed: int = 0,
) -> FiniteDifferenceReport:
    """The check on a function of one nest of inputs."""
    with undisturbed(inputs), full_precision(inputs):
        torch.manual_seed(seed)
        live = in_float64(inputs)
        if unit_rows:
            live = map_tensors(lambda n, t: _unit_rows(t) if n in wanted else t, live)
        generic = map_tensors(lambda n, t: _generic(t) if n in wanted else t, live)
        at_live = _confirmed(fn, live, wanted, directions)
        at_generic = _confirmed(fn, generic, wanted, directions)
    worst_abs = max(at_live.absolute, at_generic.absolute)
    worst_rel = max(at_live.relative, at_generic.relative)
    degenerate = at_live.slope < DEGENERATE * at_generic.slope
    passed = at_live.passed and at_generic.passed
    where = "at the live point" if not at_live.passed else "at a generic point"
    reason = (
        f"finite differences agree to {worst_rel:.1e}"
        if passed
        else f"finite differences {where} differ by {worst_rel:.1e} of the gradient, "
        f"allowed {RELATIVE_TOLERANCE:.0e}"
    )
    if degenerate:
        reason += "; the live point is degenerate, every gradient is zero there (collapsed rows?)"
    return FiniteDifferenceReport(passed, worst_abs, worst_rel, degenerate, reason)


@dataclass(frozen=True)
class _Point:
    passed: bool
    absolute: float
    relative: float
    slope: float


def _confirmed(fn: Callable[[Any], Any], point: Any, wanted: list[str], directions: int) -> _Point:
    """The check, repeated nearby if it fails: a kink of the function is left behind by a move."""
    first = found = _at(fn, point, wanted, directions)
    for _ in range(2):
        if found.passed:
            return found
        nearby = map_tensors(
            lambda n, t: t + 1e-3 * torch.randn_like(t) if n in wanted else t, point
        )
        found = _at(fn, nearby, wanted, directions)
    return found if found.passed else first


def _at(fn: Callable[[Any], Any], point: Any, wanted: list[str], directions: int) -> _Point:
    value, grads = gradients(fn, point, wanted)
    inputs = tensors_in(point)
    passed, absolute, relative, slope = True, 0.0, 0.0, 0.0
    for name in wanted:
        x, grad = inputs[name], grads[name]
        root = x.numel() ** 0.5
        for _ in range(directions):
            d = torch.randn_like(x)
            d /= d.norm()
            up = _value(fn, replace_tensors(point, {name: x + STEP * d}))
            down = _value(fn, replace_tensors(point, {name: x - STEP * d}))
            numeric = (up - down) / (2 * STEP)
            error = abs(float((grad * d).sum()) - numeric) * root
            size = max(float(grad.norm()), abs(numeric) * root)
            allowed = RELATIVE_TOLERANCE * size + ROUNDING * max(1.0, abs(value)) * root
            passed = passed and error <= allowed
            absolute = max(absolute, error)
            relative = max(relative, error / size if size > ROUNDING else 0.0)
            slope = max(slope, abs(numeric) * root)
    return _Point(passed, absolute, relative, slope)


def _value(fn: Callable[[Any], Any], inputs: Any) -> float:
    with torch.no_grad():
        outputs = [t for t in tensors_in(fn(inputs)).values() if t.is_floating_point()]
        return float(sum((o * cotangent(o)).sum() for o in outputs))


def _unit_rows(x: Tensor) -> Tensor:
    if x.ndim < 2:
        return x
    norm = x.norm(dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, 1)


def _generic(x: Tensor) -> Tensor:
    """A random point like x: unit rows if x has rows; of x's sign, and below 1 if x is."""
    drawn = torch.randn_like(x)
    if x.numel() and x.min() >= 0:
        drawn = 0.05 + 0.9 * torch.rand_like(x)
    elif x.ndim >= 2:
        drawn = _unit_rows(drawn)
    return drawn
