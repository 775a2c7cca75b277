"""A function's gradient against its twin's, in the same dtype, and against the twin in float64.

The error budget of the gradient g (the twin's, in float64) on an input is

    4 (u |g| + min(e, |g| / 64)),

u the unit roundoff of the coarsest format at work and e the error of the twin's own gradient in the
training dtype. A gradient beyond it may still be as good as any: where rounding the inputs moves g,
no algorithm can do better. So 4 |g(x (1 + u s)) - g(x)| is added, s random signs, and a row's
error is first reduced by what roundings of 64 u move that row, which excuses hinges and comparisons
that fall to the other side. Last, what float64 itself cannot resolve is added: see `resolution`;
and, without a twin, what the function's own roundings do: see `roundings`.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cosloss.gradient_check.calls import (
    Cotangents,
    Function,
    copied_inputs,
    display_name,
    full_precision,
    gradients,
    in_float64,
    judged_inputs,
    map_tensors,
    named_arguments,
    on_nest,
    replace_tensors,
    tensors_in,
    undisturbed,
)
from cosloss.gradient_check.copies import copy_tensor
from cosloss.gradient_check.generators import Draw, Draws
from cosloss.gradient_check.noise import noise_budgets
from cosloss.gradient_check.report import GradientReport, discrepancy, row_norms
from cosloss.gradient_check.resolution import resolution
from cosloss.gradient_check.roundings import rounding_moves

SAFETY = 4.0
_seeds = itertools.count(1)
TWIN_SHARE = 1 / 64
CONSTANTS = 64
LARGEST_ROUNDING = 2.0**-12  # of bfloat16, 64 roundings would be a quarter


def compare_gradients(
    fn: Callable[..., Any], twin: Callable[..., Any] | None, *inputs: Any, **options: Any
) -> GradientReport:
    """Compare fn's gradient with its twin's, in the inputs' dtype and in float64.

    Runs under the autocast state of the caller; float64 runs without.

    Args:
        fn: the function whose backward is in question; its outputs are any nest of tensors.
        twin: the same function in plain autograd torch operations; None for fn itself in float64,
            which shows rounding errors but no wrong formula (`check_finite_differences` does).
        inputs: the arguments of both. Tensors may lie in tuples, lists and dicts; those that
            require a gradient are judged, or, where none does, every floating-point one.
        options: keyword arguments of both.

    Returns:
        A `GradientReport`, true if all is right; `print(report)` shows the table.

    Raises:
        ValueError: none of the inputs is a floating-point tensor.

    Example:
        >>> x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        >>> report = compare_gradients(torch.tanh, lambda x: 1 - 2 / (torch.exp(2 * x) + 1), x)
        >>> assert report, report
    """
    nest = named_arguments(fn, inputs, options)
    nest = map_tensors(lambda n, t: copy_tensor(t).requires_grad_(t.requires_grad), nest)
    # new cotangents each time, and the same in the same program
    cotangents = Cotangents(next(_seeds))
    twin_call = on_nest(twin) if twin else None
    return compare_calls(on_nest(fn), twin_call, nest, judged_inputs(nest), cotangents)


def compare_calls(
    fn: Function,
    twin: Function | None,
    inputs: Any,
    wanted: list[str],
    cotangents: Cotangents,
    analytic: dict[str, Tensor] | None = None,
) -> GradientReport:
    """The comparison for functions of one nest of inputs.

    `analytic` has fn's value and gradients, as `gradients` returns them, if they are known already,
    and `cotangents` what they were weighted by.
    """
    report = _compare(fn, twin, inputs, wanted, cotangents, analytic)
    if report or twin is not None:
        return report
    with undisturbed():
        alike = _drawing_alike(fn, inputs)
    return _compare(alike, None, inputs, wanted, cotangents, analytic) if alike else report


def _compare(
    fn: Function,
    twin: Function | None,
    inputs: Any,
    wanted: list[str],
    cotangents: Cotangents,
    analytic: dict[str, Tensor] | None,
) -> GradientReport:
    dtypes = {name: t.dtype for name, t in tensors_in(inputs).items()}
    with undisturbed():
        ours = analytic or gradients(fn, inputs, wanted, cotangents)
        autograd = gradients(twin, inputs, wanted, cotangents) if twin else None
        u = _unit_roundoff(inputs)
        with full_precision(inputs):
            exact = in_float64(inputs)
            truth = gradients(twin or fn, exact, wanted, cotangents)
            budgets = {n: _budget(g, u, autograd[n] if autograd else g) for n, g in truth.items()}
            errors = {name: ours[name] - truth[name] for name in truth}
            excess = dict(errors)
            if not all(_within(errors[n], budgets[n]) for n in wanted):
                draw = Draw(cotangents.seed)
                moved = [
                    gradients(twin or fn, point, wanted, cotangents)
                    for size in (u, min(64 * u, LARGEST_ROUNDING), min(64 * u, LARGEST_ROUNDING))
                    for point in _rounded(exact, size, wanted, draw)
                ]
                unresolved = resolution(twin or fn, exact, wanted, cotangents)
                doubt = gradients(twin or fn, exact, wanted, cotangents.doubted(draw))
                for name, g in truth.items():
                    moves = [m[name] - g for m in moved]
                    budgets[name] += SAFETY * max(m.norm().item() for m in moves[:2])
                    excess[name] = _excess(errors[name], moves)
                    budgets[name] += SAFETY * (doubt[name] - g).norm().item()
                    budgets[name] += unresolved.get(name, 0.0)
        if not all(_within(excess[n], budgets[n]) for n in wanted):
            floors = noise_budgets(fn, twin, inputs, wanted, cotangents, u, errors)
            budgets |= {name: budgets[name] + floor for name, floor in floors.items()}
        if twin is None and not all(_within(excess[n], budgets[n]) for n in wanted):
            with full_precision(inputs):
                own = rounding_moves(fn, exact, wanted, cotangents, u, truth)
            for name, g in truth.items():
                norm = g.norm().item()
                # constants within a kernel cannot be rounded from without
                within = min(CONSTANTS * u, max(u, LARGEST_ROUNDING)) * norm
                rounded = min(own.get(name, 0.0), TWIN_SHARE * norm)
                budgets[name] += max(within, SAFETY * rounded)
    coarsest = max((dtypes[name] for name in wanted), key=lambda dtype: torch.finfo(dtype).eps)
    reports = {
        display_name(name): discrepancy(
            display_name(name),
            ours[name],
            autograd[name] if autograd else None,
            truth[name],
            dtypes.get(name, coarsest),
            budgets[name],
            passed=name == "value" or _within(excess[name], budgets[name]),
        )
        for name in truth
    }
    value = reports.pop("value")
    allowance = (
        f"Allowed: {SAFETY:g} times the unit roundoff {u:.1e} of the coarsest format at work, plus "
        "the twin's own error, plus what rounding the inputs does to the gradient."
    )
    return GradientReport(reports, value, allowance)


def _drawing_alike(fn: Function, inputs: Any) -> Function | None:
    """fn, whose draws in float64 are those of the inputs' precision; None if it draws none."""
    draws = Draws()
    with draws.recorded():
        fn(copied_inputs(inputs, ())[0])

    def call(given: Any) -> Any:
        with draws.replayed():
            return fn(given)

    return call if draws.dtypes else None


def _budget(truth: Tensor, u: float, autograd: Tensor) -> float:
    norm = truth.norm().item()
    twin = (autograd - truth).norm().item()
    # a twin that is NaN, or far off, excuses nothing
    return SAFETY * (u * norm + (min(twin, TWIN_SHARE * norm) if twin == twin else 0.0))


def _within(error: Tensor, budget: float) -> bool:
    norm = error.norm()
    return bool(norm <= budget) and bool(norm.isfinite())


def _excess(error: Tensor, moves: list[Tensor]) -> Tensor:
    """The part of each row's error that is beyond the row's moves."""
    rows = row_norms(error)
    moved = torch.stack([row_norms(move) for move in moves]).amax(0)
    return torch.where(rows.isfinite(), (rows - moved).clamp_min(0), rows)


def _unit_roundoff(inputs: Any) -> float:
    """That of the coarsest floating-point format at work: an input's, autocast's or TF32."""
    tensors = [t for t in tensors_in(inputs).values() if t.is_floating_point()]
    dtypes = {t.dtype for t in tensors}
    for kind in {t.device.type for t in tensors}:
        if torch.is_autocast_enabled(kind):
            dtypes.add(torch.get_autocast_dtype(kind))
        if kind == "cuda" and torch.backends.cuda.matmul.allow_tf32:
            dtypes.add(torch.float16)  # TF32 keeps as many bits as float16
    return max(torch.finfo(dtype).eps for dtype in dtypes) / 2


def _rounded(inputs: Any, size: float, wanted: list[str], draw: Draw) -> tuple[Any, Any]:
    """The inputs with every entry moved by `size` of itself at random, and by the opposite.

    Of two opposite moves one takes a nearby kink's other side.
    """
    tensors = tensors_in(inputs)
    moves = {n: size * tensors[n] * draw.signs(tensors[n]) for n in wanted}
    return (
        replace_tensors(inputs, {n: tensors[n] + move for n, move in moves.items()}),
        replace_tensors(inputs, {n: tensors[n] - move for n, move in moves.items()}),
    )
