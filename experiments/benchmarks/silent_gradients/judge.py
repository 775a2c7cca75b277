"""Is a case's gradient right? Finite differences of the case itself, and its twin, in float64."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from experiments.benchmarks.silent_gradients.cases import Case, clone

DIRECTIONS = 8
STEP = 1e-5


def gradient(
    case: Case, function: Callable[..., Any], dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """The gradients of the encoder's output and the module's parameters, as training has them."""
    dtype = torch.float32 if case.single else dtype
    function, h, state = _prepared(case, function, dtype)
    torch.manual_seed(0)
    value = case.value(function, h.requires_grad_())
    leaves = {"h": h} | state
    if not value.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if g is None else g.to_dense() if g.is_sparse else g
        for (name, leaf), g in zip(leaves.items(), found, strict=True)
    }


def twin_gradient(case: Case) -> dict[str, Tensor]:
    """The twin's in float64; it takes the module's parameters as further arguments."""
    _function, h, state = _prepared(case, case.make(), torch.float64)
    h.requires_grad_()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    value = case.finish(case.twin(*case.arguments(h, generator), *state.values()))
    leaves = {"h": h} | state
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if g is None else g
        for (name, leaf), g in zip(leaves.items(), found, strict=True)
    }


def worst_slope(case: Case, function: Callable[..., Any]) -> float:
    """The largest error of a slope along random directions, over the slope to be expected."""
    if case.single:
        return 0.0
    if case.twin and getattr(case, "tolerance", 0) > 1e-5:
        return 0.0  # low precision has no finite differences: the twin judges
    grads = gradient(case, function)
    if any(not g.isfinite().all() for g in grads.values()):
        return float("inf")
    prepared, h, state = _prepared(case, function, torch.float64)
    points = {"h": h} | state
    worst = 0.0
    for seed in range(DIRECTIONS):
        for name, point in points.items():
            generator = torch.Generator().manual_seed(seed)
            v = torch.randn(point.shape, generator=generator, dtype=torch.float64)
            # two steps, extrapolated: the error is of fourth order
            wide, near = (_slope(case, prepared, h, state, name, v, s) for s in (2 * STEP, STEP))
            slope = (4 * near - wide) / 3
            size = max(float(g.norm()) for g in grads.values())
            error = abs(slope - float((grads[name] * v).sum()))
            worst = max(worst, error / max(float(grads[name].norm()), 1e-4 * size, 1e-12))
    return worst


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference of two sets of gradients; infinite where one is not."""
    size = max(float(g.norm()) for g in expected.values())
    errors = [
        float((found[name].double() - g).norm()) / max(float(g.norm()), 1e-4 * size, 1e-12)
        for name, g in expected.items()
    ]
    return max((e if e == e else float("inf") for e in errors), default=0.0)


def _prepared(
    case: Case, function: Callable[..., Any], dtype: torch.dtype
) -> tuple[Callable[..., Any], Tensor, dict[str, Tensor]]:
    function = clone(function)
    state: dict[str, Tensor] = {}
    if isinstance(function, nn.Module):
        function = function.to(dtype)
        state = dict(function.named_parameters())
    return function, case.sample(torch.float64).to(dtype), state


def _slope(
    case: Case,
    function: Callable[..., Any],
    h: Tensor,
    state: dict[str, Tensor],
    name: str,
    v: Tensor,
    step: float,
) -> float:
    values = []
    for sign in (1, -1):
        moved = copy.deepcopy(function) if isinstance(function, nn.Module) else function
        at = h.detach().clone()
        with torch.no_grad():
            if name == "h":
                at += sign * step * v
            else:
                dict(moved.named_parameters())[name].add_(sign * step * v)
        torch.manual_seed(0)
        values.append(float(case.value(moved, at.requires_grad_()).detach()))
    return (values[0] - values[1]) / (2 * step)
