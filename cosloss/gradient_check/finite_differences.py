"""A function's gradient against finite differences, at its inputs and at a generic point."""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cosloss.arguments import check_callable, check_count, check_kind
from cosloss.gradient_check.calls import full_precision, in_float64, undisturbed
from cosloss.gradient_check.domain import DomainError
from cosloss.gradient_check.generators import Draw
from cosloss.gradient_check.module_calls import as_calls
from cosloss.gradient_check.nests import (
    Function,
    display_name,
    map_tensors,
    replace_tensors,
    sample_rows,
    tensors_in,
)
from cosloss.gradient_check.point import (
    DEFAULT,
    FiniteDifferences,
    PointReport,
    check_point,
    largest,
)
from cosloss.gradient_check.single_precision import check_lines, narrower

DEGENERATE = 1e-4
SHARES = (1.0, 0.1, 0.01)  # of the way to the generic point
TAKEN = "right if it is meant to take as constant what is made at "
_seeds = itertools.count(1)


@dataclass(frozen=True)
class FiniteDifferenceReport:
    """The worst errors over both points, and the verdict; true where all is right.

    `skipped` says that no verdict was reached, and `reason` why. `degenerate` says that the
    gradient at the live point is zero beside that at the generic one (collapsed embeddings):
    nothing about the formula can be seen there. `constants` are the lines at which the function
    stops gradients ("file:line"), if the gradient is right with these alone: as that of a function
    for which the values that are detached there, or taken as numbers, are constants.
    """

    passed: bool
    max_abs_error: float
    max_rel_error: float
    degenerate: bool
    reason: str
    skipped: bool = False
    constants: tuple[str, ...] = ()

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
        TypeError: fn cannot be called, how or seed is of another kind.
        ValueError: seed is negative, or none of the inputs is a floating-point tensor.

    Example:
        >>> x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        >>> assert check_finite_differences(torch.tanh, x)
    """
    check_callable("fn", fn)
    check_kind("how", how, FiniteDifferences, "a FiniteDifferences(...)")
    if seed is not None:
        check_count("seed", seed, 0)
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
        return _not_checked(f"{broken[0]}: the loss was called with NaN or inf")
    with undisturbed(), full_precision(inputs):
        report = _in_widest(fn, inputs, wanted, how, seed, surrogate)
        normalised = {} if report or report.skipped or surrogate else _logarithms(tensors, wanted)
        if normalised:

            def behind(given: Any) -> Any:
                made = {
                    n: given_n.log_softmax(normalised[n])
                    for n, given_n in tensors_in(given).items()
                    if n in normalised
                }
                return fn(replace_tensors(given, made))

            if _in_widest(behind, inputs, wanted, how, seed, None):
                names = ", ".join(map(display_name, normalised))
                return _not_checked(
                    f"{names}: its gradient is right behind a log_softmax alone, which takes away "
                    "what it is off by, as that of torch's ctc_loss is"
                )
    return report


def _in_widest(
    fn: Function,
    inputs: Any,
    wanted: list[str],
    how: FiniteDifferences,
    seed: int,
    surrogate: Function | None,
) -> FiniteDifferenceReport:
    """The check in float64, or, where that is refused, in the widest dtype that is not."""

    def exactly(point: Any, draw: Draw) -> PointReport:
        return check_point(fn, point, wanted, how, surrogate, draw)

    def roughly(point: Any, draw: Draw) -> PointReport:
        return check_lines(fn, point, wanted, how.directions, draw)

    refused: list[str] = []
    widened = [(in_float64(inputs), exactly)]
    if surrogate is None and not (how.forward_ad or how.second_order):
        widened += [(given, roughly) for given in narrower(inputs)]
    for given, judge in widened:
        draw = Draw(seed)
        try:
            points = _judged(given, wanted, how, draw, judge)
        except DomainError as error:
            return _not_checked(str(error))
        except Exception as error:  # a function may raise anything
            refused.append((str(error).splitlines() or [type(error).__name__])[0])
            continue
        dtype = next((t.dtype for n, t in tensors_in(given).items() if n in wanted))
        where = (
            f" in {str(dtype).removeprefix('torch.')}, since it refuses float64" if refused else ""
        )
        return _report(points, where)
    return _not_checked(f"the check cannot run in float64: {'; '.join(dict.fromkeys(refused))}")


def _judged(
    live: Any,
    wanted: list[str],
    how: FiniteDifferences,
    draw: Draw,
    judge: Callable[[Any, Draw], PointReport],
) -> list[PointReport]:
    """What a judge says at the inputs, and at a generic point if there is one in the domain.

    Rows of length 1 may lie outside of it, as a random matrix does that is to be positive definite:
    then the rows stay as they are, and the generic point comes nearer, or is left out.
    """
    rows = map_tensors(lambda n, t: _unit_rows(t, draw) if n in wanted else t, live)
    try:
        found = [judge(rows if how.unit_rows else live, draw)]
    except Exception:
        if not how.unit_rows:
            raise
        found = [judge(live, draw)]
        rows = live
    generic = map_tensors(lambda n, t: _generic(t, draw) if n in wanted else t, rows)
    tensors = tensors_in(generic)
    for share in SHARES:

        def between(name: str, t: Tensor, share: float = share) -> Tensor:
            return torch.lerp(t, tensors[name], share) if name in wanted else t

        point = generic if share == 1 else map_tensors(between, rows)
        try:
            return [*found, judge(point, draw)]
        except Exception:  # a function may raise anything
            continue
    return found


def _report(points: list[PointReport], where: str) -> FiniteDifferenceReport:
    degenerate = points[0].slope <= DEGENERATE * points[-1].slope and len(points) > 1
    problems = [
        f"{point.problem} at {place} point"
        for point, place in zip(points, ("the live", "a generic"), strict=False)
        if point.problem
    ]
    agree = f"finite differences{where} agree to {largest(p.relative for p in points):.1e}"
    notes = problems or [agree]
    constants = tuple(dict.fromkeys(place for p in points for place in p.constants))
    if constants and not problems:
        notes.append(f"{TAKEN}{', '.join(constants)}")
    if degenerate:
        notes.append("the live point is degenerate: its gradient is zero (collapsed embeddings?)")
    return FiniteDifferenceReport(
        passed=not problems,
        max_abs_error=largest(p.absolute for p in points),
        max_rel_error=largest(p.relative for p in points),
        degenerate=degenerate,
        reason="; ".join(notes),
        constants=() if problems else constants,
    )


def _not_checked(reason: str) -> FiniteDifferenceReport:
    return FiniteDifferenceReport(False, math.nan, math.nan, False, reason, skipped=True)


def _logarithms(tensors: Mapping[str, Tensor], wanted: list[str]) -> dict[str, int]:
    """The inputs that are logarithms of probabilities, and along which dimension they add up."""
    found = {}
    for name in wanted:
        x = tensors[name].detach()
        for dim in range(x.ndim - 1, -1, -1):
            if x.shape[dim] > 1 and x.is_floating_point():
                total = x.double().logsumexp(dim)
                if bool((total.abs() <= 8 * torch.finfo(x.dtype).eps * x.shape[dim]).all()):
                    found[name] = dim
                    break
    return found


def _unit_rows(x: Tensor, draw: Draw) -> Tensor:
    """x with rows of length 1; a zero row has no direction, and gets a random one."""
    if x.ndim < 2:
        return x
    norm = x.norm(dim=-1, keepdim=True)
    random = draw.normal(x)
    return torch.where(norm > 0, x / norm, random / random.norm(dim=-1, keepdim=True))


def _generic(x: Tensor, draw: Draw) -> Tensor:
    """A random point like x: of x's sign and in [0, 1] if x is; of x's row lengths otherwise."""
    if not x.is_complex() and x.numel() and x.min() >= 0:
        return (0.05 + 0.9 * draw.uniform(x)) * x.max().clamp(min=1e-3, max=1.0)
    random = draw.normal(x)
    if x.ndim < 2:
        return random * x.abs().square().mean().sqrt()
    return random / random.norm(dim=-1, keepdim=True) * x.norm(dim=-1, keepdim=True)
