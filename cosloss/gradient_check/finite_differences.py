"""A function's gradient against finite differences, at its inputs and at a generic point."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cosloss.gradient_check.calls import (
    Function,
    full_precision,
    in_float64,
    map_tensors,
    sample_rows,
    tensors_in,
    undisturbed,
)
from cosloss.gradient_check.generators import Draw
from cosloss.gradient_check.module_calls import as_calls
from cosloss.gradient_check.point import DEFAULT, FiniteDifferences, check_point, largest

DEGENERATE = 1e-4
_seeds = itertools.count(1)


@dataclass(frozen=True)
class FiniteDifferenceReport:
    """The worst errors over both points, and the verdict; true where all is right.

    `skipped` says that no verdict was reached, and `reason` why. `degenerate` says that the
    gradient at the live point is zero beside that at the generic one (collapsed embeddings):
    nothing about the formula can be seen there.
    """

    passed: bool
    max_abs_error: float
    max_rel_error: float
    degenerate: bool
    reason: str
    skipped: bool = False

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        return self.reason


def check_finite_differences(
    fn: Callable[..., Any],
    *inputs: Any,
    how: FiniteDifferences = DEFAULT,
    seed: int | None = None,
    **options: Any,
) -> FiniteDifferenceReport:
    """Compare fn's gradient with finite differences, in float64, at the inputs and elsewhere.

    Args:
        fn: a function of tensors that computes in float64 (or at least float32) where they do.
        inputs: its arguments. Tensors that require a gradient are judged, or, where none does,
            every floating-point one; of a module its parameters too.
        how: which checks, and how many.
        seed: of the directions, the cotangents and the generic point; None for new ones each time.
        options: keyword arguments of fn.

    Returns:
        A `FiniteDifferenceReport`, true if all is right.

    Raises:
        ValueError: none of the inputs is a floating-point tensor.

    Example:
        >>> x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        >>> assert check_finite_differences(torch.tanh, x)
    """
    call, _, nest, wanted = as_calls(fn, None, inputs, options)
    return check_calls(call, nest, wanted, how, next(_seeds) if seed is None else seed)


def check_calls(
    fn: Function,
    inputs: Any,
    wanted: list[str],
    how: FiniteDifferences = DEFAULT,
    seed: int = 0,
    surrogate: Function | None = None,
    rows: int | None = None,
) -> FiniteDifferenceReport:
    """The check for a function of one nest of inputs.

    Where a gradient is a surrogate by intent (a straight-through estimator), finite differences do
    not apply, and `surrogate`, a function whose autograd gradient it must be, takes their place.
    """
    if rows is not None:
        sampled = sample_rows(inputs, wanted, rows, Draw(seed))
        if sampled is not inputs:
            few = check_calls(fn, sampled, wanted, how, seed, surrogate)
            if not few.skipped:
                return few
    tensors = tensors_in(inputs)
    broken = [name for name in wanted if not tensors[name].isfinite().all()]
    if broken:
        reason = f"{broken[0]}: the loss was called with NaN or inf"
        return FiniteDifferenceReport(False, math.nan, math.nan, False, reason, skipped=True)
    with undisturbed(), full_precision(inputs):
        draw = Draw(seed)
        live = in_float64(inputs)
        if how.unit_rows:
            live = map_tensors(lambda n, t: _unit_rows(t, draw) if n in wanted else t, live)
        generic = map_tensors(lambda n, t: _generic(t, draw) if n in wanted else t, live)
        try:
            points = [
                check_point(fn, point, wanted, how, surrogate, draw) for point in (live, generic)
            ]
        except Exception as error:  # a function may raise anything
            said = (str(error).splitlines() or [type(error).__name__])[0]
            reason = f"the check cannot run in float64: {said}"
            return FiniteDifferenceReport(False, math.nan, math.nan, False, reason, skipped=True)
    degenerate = points[0].slope <= DEGENERATE * points[1].slope
    problems = [
        f"{point.problem} at {where} point"
        for point, where in zip(points, ("the live", "a generic"), strict=True)
        if point.problem
    ]
    notes = problems or [f"finite differences agree to {largest(p.relative for p in points):.1e}"]
    if degenerate:
        notes.append("the live point is degenerate: its gradient is zero (collapsed embeddings?)")
    return FiniteDifferenceReport(
        passed=not problems,
        max_abs_error=largest(p.absolute for p in points),
        max_rel_error=largest(p.relative for p in points),
        degenerate=degenerate,
        reason="; ".join(notes),
    )


def _unit_rows(x: Tensor, draw: Draw) -> Tensor:
    """x with rows of length 1; a zero row has no direction, and gets a random one."""
    if x.ndim < 2:
        return x
    norm = x.norm(dim=-1, keepdim=True)
    random = draw.normal(x)
    return torch.where(norm > 0, x / norm, random / random.norm(dim=-1, keepdim=True))


def _generic(x: Tensor, draw: Draw) -> Tensor:
    """A random point like x: of x's sign and in [0, 1] if x is; of x's row lengths otherwise."""
    if x.numel() and x.min() >= 0:
        return (0.05 + 0.9 * draw.uniform(x)) * x.max().clamp(min=1e-3, max=1.0)
    random = draw.normal(x)
    if x.ndim < 2:
        return random * x.square().mean().sqrt()
    return random / random.norm(dim=-1, keepdim=True) * x.norm(dim=-1, keepdim=True)
