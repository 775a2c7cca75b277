"""A function's gradient against its twin's, in the same dtype, and against the twin in float64.

The error budget of the gradient on an input is

    16 (|g(x + u x d) - g(x)| + u |g(x)| + e),

g the twin's gradient in float64, u the unit roundoff of the coarsest dtype at work, d random signs,
and e the error of the twin's own gradient in the training dtype, of which at most |g| / 64 counts:
a good algorithm errs as if its input had been rounded, or as the plain torch code does.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cosloss.gradient_check.calls import (
    differentiable,
    full_precision,
    gradients,
    in_float64,
    map_tensors,
    tensors_in,
    undisturbed,
)
from cosloss.gradient_check.report import GradientReport, InputReport

SAFETY = 16.0


def compare_gradients(
    fn: Callable[..., Any], twin: Callable[..., Any] | None, *inputs: Any, **options: Any
) -> GradientReport:
    """Compare fn's gradient with its twin's, in the inputs' dtype and in float64.

    Args:
        fn: the function whose backward is in question; its outputs are any tensors.
        twin: the same function in plain autograd torch operations; None for fn itself in float64.
        inputs: the arguments of both. Tensors may lie in tuples, lists and dicts; those that
            require a gradient are judged, or, where none does, every floating-point one.
        options: keyword arguments of both.

    Returns:
        A `GradientReport`; `report.passed` is the verdict, `print(report)` the table.

    Raises:
        ValueError: there is no input to differentiate by.

    Example:
        >>> x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        >>> compare_gradients(torch.tanh, lambda x: 1 - 2 / (torch.exp(2 * x) + 1), x).passed
        True
    """
    wanted = differentiable(inputs) or {
        name: t for name, t in tensors_in(inputs).items() if t.is_floating_point()
    }
    if not wanted:
        raise ValueError("none of the inputs is a floating-point tensor")
    return compare_calls(
        lambda x: fn(*x, **options),
        None if twin is None else lambda x: twin(*x, **options),
        inputs,
        list(wanted),
    )


def compare_calls(
    fn: Callable[[Any], Any],
    twin: Callable[[Any], Any] | None,
    inputs: Any,
    wanted: list[str],
    analytic: tuple[float, dict[str, Tensor]] | None = None,
) -> GradientReport:
    """The comparison on functions of one nest of inputs; `analytic` if it is known already."""
    truth_of = partial(gradients, twin or fn, wanted=wanted)
    with undisturbed(inputs):
        value, ours = analytic or gradients(fn, inputs, wanted)
        autograd = gradients(twin, inputs, wanted) if twin else None
        u = _unit_roundoff(inputs)
        with full_precision(inputs):
            exact = in_float64(inputs)
            true_value, truth = truth_of(exact)
            moved_value, moved = truth_of(_rounded(exact, u, wanted))
    scale = max(abs(true_value), torch.finfo(torch.float64).tiny)
    twin_value = abs(autograd[0] - true_value) if autograd else 0.0
    value_budget = abs(moved_value - true_value) + u * scale + min(twin_value, scale / 64)
    reports = {
        name: _judge(
            name,
            ours[name],
            autograd[1][name] if autograd else None,
            truth[name],
            moved[name],
            u,
            tensors_in(inputs)[name].dtype,
        )
        for name in wanted
    }
    return GradientReport(
        inputs=reports,
        value=value,
        value_vs_float64=abs(value - true_value) / scale,
        value_budget=SAFETY * value_budget / scale,
        reason=f"the budget is {SAFETY:g} times the effect of rounding the inputs at {u:.1e}, "
        "or of the twin's own error",
    )


def _judge(
    name: str,
    ours: Tensor,
    autograd: Tensor | None,
    truth: Tensor,
    moved: Tensor,
    u: float,
    dtype: torch.dtype,
) -> InputReport:
    norm = truth.norm().item()
    scale = norm or torch.finfo(torch.float64).tiny
    error = (ours - truth).norm().item()
    twin_error = (autograd - truth).norm().item() if autograd is not None else float("nan")
    budget = (moved - truth).norm().item() + u * norm
    if autograd is not None:
        budget += min(twin_error, norm / 64)
    peer = truth if autograd is None else autograd
    ulps = (ours - truth).abs() / _ulp(truth, dtype)
    rows = (ours - truth).reshape(len(ours), -1) if ours.ndim else ours - truth
    row_error = rows.norm(dim=-1) if ours.ndim else rows.abs()
    return InputReport(
        name=name,
        relative=(ours - peer).norm().item() / (peer.norm().item() or scale),
        max_abs=(ours - peer).abs().max().item(),
        cosine_distance=_cosine_distance(ours, peer),
        analytic_vs_float64=error / scale,
        autograd_vs_float64=twin_error / scale,
        ulp_p50=ulps.quantile(0.5).item(),
        ulp_p99=ulps.quantile(0.99).item(),
        budget=SAFETY * budget / scale,
        passed=error <= SAFETY * budget,
        row_error=row_error,
    )


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


def _rounded(inputs: Any, u: float, wanted: list[str]) -> Any:
    """The inputs with every entry moved by one rounding, up or down at random."""

    def move(name: str, x: Tensor) -> Tensor:
        if name not in wanted:
            return x
        sign = torch.randint(0, 2, x.shape, device=x.device) * 2 - 1
        return x + u * x * sign

    return map_tensors(move, inputs)


def _ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Spacing of `dtype`'s numbers at x, at least that of its subnormal numbers."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(x).exponent - 1
    spacing = torch.ldexp(torch.full_like(x, info.eps), exponent)
    return spacing.clamp_min(info.tiny * info.eps)


def _cosine_distance(a: Tensor, b: Tensor) -> float:
    """1 - <a, b> / (|a| |b|), as half the squared distance of the directions; 0 if both are 0."""
    length_a, length_b = a.norm(), b.norm()
    if length_a == 0 and length_b == 0:
        return 0.0
    return ((a / length_a - b / length_b).square().sum() / 2).item()
