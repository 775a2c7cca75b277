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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cosloss.arguments import check_callable
from cosloss.gradient_check.calls import (
    copied_inputs,
    full_precision,
    gradients,
    in_float64,
    undisturbed,
)
from cosloss.gradient_check.common_factor import factor_faults
from cosloss.gradient_check.copies import wide_dtype
from cosloss.gradient_check.cotangents import Cotangents
from cosloss.gradient_check.generators import Draw, Draws
from cosloss.gradient_check.layouts import (
    Layout,
    as_it_is,
    contiguous,
    laid_out,
    layout_faults,
    same_memory,
)
from cosloss.gradient_check.module_calls import as_calls
from cosloss.gradient_check.nests import Function, display_name, replace_tensors, tensors_in
from cosloss.gradient_check.noise import noise_budgets
from cosloss.gradient_check.report import GradientReport, discrepancy, row_norms
from cosloss.gradient_check.resolution import resolution
from cosloss.gradient_check.roundings import rounding_moves
from cosloss.modes import multiplies_tf32

SAFETY = 4.0
_seeds = itertools.count(1)
TWIN_SHARE = 1 / 64
SAME_VALUES = 2.0**-20  # between two layouts in float64, as between any sums in another order
CONSTANTS = 64
LARGEST_ROUNDING = 2.0**-12  # of bfloat16, 64 roundings would be a quarter


def compare_gradients(
    fn: Callable[..., Any], twin: Callable[..., Any] | None, *inputs: Any, **options: Any
) -> GradientReport:
    """Compare fn's gradient with its twin's, in the inputs' dtype and in float64.

    Runs under the autocast state of the caller; float64 runs without.

    Args:
        fn: the function whose backward is in question; its outputs are any nest of tensors. Of a
            module the parameters that require a gradient are judged too, as "self.NAME"; it is
            never called itself, a copy is.
        twin: the same function in plain autograd torch operations: a function, which reads a
            module's parameters from that module, or a module with parameters of the same names.
            None for the module's `reference()`, or for fn itself in float64, which shows rounding
            errors but no wrong formula (`check_finite_differences` does).
        inputs: the arguments of both. Tensors may lie in tuples, lists and dicts; those that
            require a gradient are judged, or, where none does, every floating-point one.
        options: keyword arguments of both.

    Returns:
        A `GradientReport`, true if all is right; `print(report)` shows the table.

    Raises:
        TypeError: fn or twin cannot be called.
        ValueError: none of the inputs is a floating-point tensor; a twin module lacks a parameter.

    Example:
        >>> x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        >>> report = compare_gradients(torch.tanh, lambda x: 1 - 2 / (torch.exp(2 * x) + 1), x)
        >>> assert report, report
    """
    check_callable("fn", fn)
    if twin is not None:
        check_callable("twin", twin)
    # new cotangents each time, and the same in the same program
    cotangents = Cotangents(next(_seeds))
    call, twin_call, nest, wanted = as_calls(fn, twin, inputs, options)
    return compare_calls(call, twin_call, nest, wanted, cotangents, layouts=True)


def compare_calls(
    fn: Function,
    twin: Function | None,
    inputs: Any,
    wanted: list[str],
    cotangents: Cotangents,
    analytic: Mapping[str, Tensor] | None = None,
    layouts: bool = False,
) -> GradientReport:
    """The comparison for functions of one nest of inputs.

    `analytic` has fn's value and gradients, as `gradients` returns them, if they are known already,
    and `cotangents` what they were weighted by. With `layouts` fn is tried in other layouts too.
    """
    report = _compare(fn, twin, inputs, wanted, cotangents, analytic)
    if not report and twin is None:
        with undisturbed():
            alike = _drawing_alike(fn, inputs)
        report = _compare(alike, None, inputs, wanted, cotangents, analytic) if alike else report
    if not (report and layouts):
        return report
    with undisturbed():
        u = _unit_roundoff(inputs)
        faults = layout_faults(fn, inputs, wanted, Cotangents(cotangents.seed), u)
    judged = dict(report.inputs)
    for name, text in faults.items():
        found = judged[display_name(name)]
        judged[found.name] = replace(found, passed=False, diagnosis=text)
    return replace(report, inputs=judged)


def _compare(
    fn: Function,
    twin: Function | None,
    inputs: Any,
    wanted: list[str],
    cotangents: Cotangents,
    analytic: Mapping[str, Tensor] | None,
) -> GradientReport:
    dtypes = {name: t.dtype for name, t in tensors_in(inputs).items()}
    with undisturbed():
        ours = analytic or gradients(fn, inputs, wanted, cotangents)
        autograd = gradients(twin, inputs, wanted, cotangents) if twin else None
        u = _unit_roundoff(inputs)
        with full_precision(inputs):
            # contiguous: what reads memory in order is right there
            layout: Layout = contiguous
            weights = cotangents.laid_out(layout)
            # made anew where it is needed: it is twice as large as the inputs
            spent = all(dtypes[name] != wide_dtype(dtypes[name]) for name in wanted)
            wide = laid_out(in_float64(inputs), layout)
            truth = gradients(twin or fn, wide, wanted, weights, spent)
            del wide
            if not _same_values(truth, ours) and not same_memory(inputs, cotangents):
                # a mask that is drawn in memory's order, or as_strided: its values go by layout
                kept = gradients(twin or fn, in_float64(inputs), wanted, cotangents)
                if not _same_values(truth, kept):
                    layout = as_it_is
                    weights, truth = cotangents, kept
            budgets = {n: _budget(g, u, autograd[n] if autograd else g) for n, g in truth.items()}
            errors = _Errors(ours, truth)  # one at a time: each is as large as an input
            excess: Mapping[str, Tensor] = errors
            if not all(_within(errors[n], budgets[n]) for n in wanted):
                exact = laid_out(in_float64(inputs), layout)
                draw = Draw(cotangents.seed)
                rows = {name: torch.zeros_like(row_norms(g)) for name, g in truth.items()}
                nearby = dict.fromkeys(truth, 0.0)
                for size in (u, min(64 * u, LARGEST_ROUNDING), min(64 * u, LARGEST_ROUNDING)):
                    for point in _rounded(exact, size, wanted, draw):
                        # one at a time: each is as large as all inputs and outputs
                        moved = gradients(twin or fn, point, wanted, weights)
                        for name, g in truth.items():
                            move = moved[name] - g
                            rows[name] = torch.maximum(rows[name], row_norms(move))
                            if size == u:
                                nearby[name] = max(nearby[name], move.norm().item())
                unresolved = resolution(twin or fn, exact, wanted, weights)
                doubt = gradients(twin or fn, exact, wanted, weights.doubted(draw))
                del exact
                excess = {name: _excess(errors[name], rows[name]) for name in truth}
                for name, g in truth.items():
                    budgets[name] += SAFETY * (nearby[name] + (doubt[name] - g).norm().item())
                    budgets[name] += unresolved.get(name, 0.0)
        if not all(_within(excess[n], budgets[n]) for n in wanted):
            floors = noise_budgets(fn, twin, inputs, wanted, cotangents, u, errors, layout)
            budgets |= {name: budgets[name] + floor for name, floor in floors.items()}
        if twin is None and not all(_within(excess[n], budgets[n]) for n in wanted):
            with full_precision(inputs):
                exact = laid_out(in_float64(inputs), layout)
                own = rounding_moves(fn, exact, wanted, weights, u, truth)
            for name, g in truth.items():
                norm = g.norm().item()
                # constants within a kernel cannot be rounded from without
                within = min(CONSTANTS * u, max(u, LARGEST_ROUNDING)) * norm
                rounded = min(own.get(name, 0.0), TWIN_SHARE * norm)
                budgets[name] += max(within, SAFETY * rounded)
        factors: dict[str, str] = {}
        if twin and autograd and all(_within(excess[n], budgets[n]) for n in wanted):
            found = (ours, autograd, truth)
            factors = factor_faults(fn, twin, inputs, wanted, cotangents, u, found)
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
    for name, text in factors.items():
        one = reports[display_name(name)]
        reports[one.name] = replace(one, passed=False, diagnosis=f"{one.name}: {text}")
    value = reports.pop("value")
    allowance = (
        f"Allowed: {SAFETY:g} times the unit roundoff {u:.1e} of the coarsest format at work, plus "
        "the twin's own error, plus what rounding the inputs does to the gradient."
    )
    return GradientReport(reports, value, allowance)


class _Errors(Mapping[str, Tensor]):
    """Ours less the truth, by name."""

    def __init__(self, ours: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> None:
        self.ours, self.truth = ours, truth

    def __getitem__(self, name: str) -> Tensor:
        return self.ours[name] - self.truth[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.truth)

    def __len__(self) -> int:
        return len(self.truth)


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


def _same_values(truth: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> bool:
    value, other = truth["value"], found["value"]
    return value.shape == other.shape and bool((value - other).norm() <= SAME_VALUES * value.norm())


def _within(error: Tensor, budget: float) -> bool:
    norm = error.norm()
    return bool(norm <= budget) and bool(norm.isfinite())


def _excess(error: Tensor, moved: Tensor) -> Tensor:
    """The part of each row's error that is beyond the row's moves."""
    rows = row_norms(error)
    return torch.where(rows.isfinite(), (rows - moved).clamp_min(0), rows)


def _unit_roundoff(inputs: Any) -> float:
    """That of the coarsest floating-point format at work: an input's, autocast's or TF32."""
    tensors = [t for t in tensors_in(inputs).values() if t.is_floating_point() or t.is_complex()]
    dtypes = {t.dtype for t in tensors}
    for kind in {t.device.type for t in tensors}:
        if torch.is_autocast_enabled(kind):
            dtypes.add(torch.get_autocast_dtype(kind))
        if kind == "cuda" and multiplies_tf32():
            dtypes.add(torch.float16)  # TF32 keeps as many bits as float16
    return max(torch.finfo(dtype).eps for dtype in dtypes) / 2


def _rounded(inputs: Any, size: float, wanted: list[str], draw: Draw) -> Iterator[Any]:
    """The inputs with every entry moved by `size` of itself at random, and by the opposite.

    Of two opposite moves one takes a nearby kink's other side.
    """
    tensors = tensors_in(inputs)
    signs = {name: draw.signs(tensors[name]) for name in wanted}
    for way in (size, -size):
        moved = {n: t.addcmul(t, signs[n], value=way) for n, t in tensors.items() if n in signs}
        yield replace_tensors(inputs, moved)
