"""Calling a function at a point of one's choice, and asking for its gradient there."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Change = Callable[[str, Tensor], Any]


def map_tensors(change: Change, value: Any, name: str = "") -> Any:
    """`value` with `change(name, tensor)` in place of every tensor in its tuples, lists and dicts.

    Example:
        >>> map_tensors(lambda name, x: name, {"a": torch.ones(1), "b": (torch.ones(1), 2)})
        {'a': 'a', 'b': ('b.0', 2)}
    """
    if isinstance(value, Tensor):
        return change(name, value)
    below = f"{name}." if name else ""
    if isinstance(value, Mapping):
        return {key: map_tensors(change, item, f"{below}{key}") for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [map_tensors(change, item, f"{below}{i}") for i, item in enumerate(value)]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return type(value)(items)
    return value


def tensors_in(value: Any) -> dict[str, Tensor]:
    """Every tensor in nested tuples, lists and dicts, by its name."""
    found: dict[str, Tensor] = {}

    def note(name: str, tensor: Tensor) -> Tensor:
        found[name] = tensor
        return tensor

    map_tensors(note, value)
    return found


def replace_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """`value` with the tensors of those names in place of its own."""
    return map_tensors(lambda name, tensor: tensors.get(name, tensor), value)


def differentiable(inputs: Any) -> dict[str, Tensor]:
    """The floating-point tensors among the inputs that require a gradient, by name."""
    return {
        n: t for n, t in tensors_in(inputs).items() if t.requires_grad and t.is_floating_point()
    }


def outputs_of(result: Any) -> list[Tensor]:
    """The tensors of a function's result through which a gradient flows."""
    return [t for t in tensors_in(result).values() if t.requires_grad and t.is_floating_point()]


def cotangent(output: Tensor, scale: float = 1.0) -> Tensor:
    """A generic gradient on an output, exact in every floating-point dtype.

    It is never 1, so that a backward which leaves out the incoming gradient is seen.
    """
    if output.ndim == 0:
        return torch.full_like(output, 0.375 * scale)
    step = torch.arange(output.numel(), device=output.device)
    return ((step * 5 % 16 - 7.5) / 8 * scale).to(output.dtype).reshape(output.shape)


def gradients(
    function: Callable[[Any], Any], inputs: Any, wanted: Sequence[str], scale: float = 1.0
) -> tuple[float, dict[str, Tensor]]:
    """The weighted sum of function(inputs) and its gradients, in float64, on the inputs `wanted`.

    The gradients are computed in the inputs' own dtypes, on detached copies.
    """
    copies = map_tensors(lambda name, t: t.detach().clone(), inputs)
    leaves = {n: t.requires_grad_() for n, t in tensors_in(copies).items() if n in wanted}
    with torch.enable_grad():
        outputs = outputs_of(function(copies))
    if not outputs:
        raise ValueError(f"no output depends on {', '.join(wanted)} by autograd")
    weights = [cotangent(output, scale) for output in outputs]
    found = torch.autograd.grad(outputs, list(leaves.values()), weights, allow_unused=True)
    value = sum(
        float((o.detach().double() * w.double()).sum())
        for o, w in zip(outputs, weights, strict=True)
    )
    return value / scale, {
        name: (torch.zeros_like(leaf) if grad is None else grad).double() / scale
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }


def in_float64(inputs: Any) -> Any:
    """The inputs detached, every floating-point tensor as float64."""
    return map_tensors(lambda n, t: t.detach().double() if t.is_floating_point() else t, inputs)


@contextmanager
def undisturbed(inputs: Any) -> Iterator[None]:
    """A scope with gradients on and outside inference mode that leaves the generators as found."""
    devices = {t.device for t in tensors_in(inputs).values() if t.device.type == "cuda"}
    with (
        torch.random.fork_rng(devices=list(devices)),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        yield


@contextmanager
def full_precision(inputs: Any) -> Iterator[None]:
    """A scope without autocast, and in which compiled functions run as they are written."""
    kinds = {t.device.type for t in tensors_in(inputs).values()} or {"cpu"}
    with torch.compiler.set_stance("force_eager"):
        enabled = [kind for kind in kinds if torch.is_autocast_enabled(kind)]
        scopes = [torch.autocast(kind, enabled=False) for kind in enabled]
        for scope in scopes:
            scope.__enter__()
        try:
            yield
        finally:
            for scope in reversed(scopes):
                scope.__exit__(None, None, None)
