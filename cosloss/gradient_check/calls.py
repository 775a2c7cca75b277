"""Calling a function of nested inputs at a point of one's choice, and its gradient there."""

import copy
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Function = Callable[[Any], Any]


def map_tensors(change: Callable[[str, Tensor], Any], value: Any, name: str = "") -> Any:
    """`value` with `change(name, tensor)` in place of every tensor in its tuples, lists and dicts.

    Example:
        >>> map_tensors(lambda name, x: name, {"a": torch.ones(1), "b": (torch.ones(1), 2)})
        {'a': 'a', 'b': ('b.0', 2)}
    """
    if isinstance(value, Tensor):
        return change(name, value)
    below = f"{name}." if name else ""
    if isinstance(value, Mapping):
        changed: Any = copy.copy(value)
        for key, item in value.items():
            changed[key] = map_tensors(change, item, f"{below}{key}")
        return changed
    if isinstance(value, (tuple, list)):
        items = [map_tensors(change, item, f"{below}{i}") for i, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def tensors_in(value: Any) -> dict[str, Tensor]:
    """Every tensor in nested tuples, lists and dicts, by its name."""
    found: dict[str, Tensor] = {}
    map_tensors(found.__setitem__, value)
    return found


def replace_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """`value` with the tensors of those names in place of its own."""
    return map_tensors(lambda name, tensor: tensors.get(name, tensor), value)


def named_arguments(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """A call's arguments as one nest, {"args": {name: value}, "kwargs": {name: value}}.

    Example:
        >>> named_arguments(lambda x, *rest: x, (1, 2), {"k": 3})
        {'args': {'x': 1, '1': 2}, 'kwargs': {'k': 3}}
    """
    try:
        called = fn.forward if isinstance(fn, nn.Module) else fn
        parameters = list(inspect.signature(called).parameters.values())
    except ValueError:  # a builtin
        parameters = []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names += map(str, range(len(names), len(args)))
    return {"args": dict(zip(names, args, strict=False)), "kwargs": dict(kwargs)}


def on_nest(fn: Callable[..., Any]) -> Function:
    """fn as a function of the nest that `named_arguments` makes."""
    return lambda inputs: fn(*inputs["args"].values(), **inputs["kwargs"])


def display_name(name: str) -> str:
    """The name of an input as a person knows it: without the part of the nest it lies in."""
    return name.removeprefix("args.").removeprefix("kwargs.")


def judged_inputs(inputs: Any) -> list[str]:
    """Names of the floating-point tensors that require a gradient, or of all where none does.

    Raises:
        ValueError: there is no floating-point tensor among the inputs.
    """
    floating = {n: t for n, t in tensors_in(inputs).items() if t.is_floating_point()}
    if not floating:
        raise ValueError("none of the inputs is a floating-point tensor")
    return [n for n, t in floating.items() if t.requires_grad] or list(floating)


def sample_rows(inputs: Any, wanted: Sequence[str], rows: int | None, offset: int = 0) -> Any:
    """The inputs with at most `rows` rows of every tensor that has the batch's length.

    The batch's length is that of the longest tensor in `wanted`; the rows lie evenly, from `offset`
    on. Views; the order of rows is kept, so that pairs, labels and targets stay together.
    """
    tensors = tensors_in(inputs)
    batch = max((len(tensors[name]) for name in wanted if tensors[name].ndim), default=0)
    if rows is None or batch <= rows:
        return inputs
    step = batch // rows

    def sample(name: str, t: Tensor) -> Tensor:
        return t[offset % step :: step][:rows] if t.ndim and len(t) == batch else t

    return map_tensors(sample, inputs)


def cotangent(output: Tensor) -> Tensor:
    """A generic gradient on an output, exact in every floating-point dtype.

    It is never 1, so that a backward which leaves out the incoming gradient is seen.
    """
    if output.ndim == 0:
        return torch.full_like(output, 0.375)
    position = torch.arange(output.numel(), device=output.device)
    return ((position * 5 % 16 - 7.5) / 8).to(output.dtype).reshape(output.shape)


def outputs_of(result: Any) -> list[Tensor]:
    """The tensors of a function's result through which a gradient flows."""
    return [t for t in tensors_in(result).values() if t.requires_grad and t.is_floating_point()]


def gradients(fn: Function, inputs: Any, wanted: Sequence[str]) -> dict[str, Tensor]:
    """The gradients of fn(inputs), weighted by `cotangent`, on the inputs `wanted`, in float64.

    They are computed in the inputs' own dtypes, on detached copies. Under "value" stand all
    outputs, as one vector.
    """
    copies = map_tensors(lambda name, t: t.detach().clone(), inputs)
    leaves = {n: t.requires_grad_() for n, t in tensors_in(copies).items() if n in wanted}
    return backward(fn(copies), leaves)


def backward(result: Any, leaves: Mapping[str, Tensor], keep: bool = False) -> dict[str, Tensor]:
    """As `gradients`, from a result whose graph exists; `keep` leaves the graph for another use."""
    outputs = outputs_of(result)
    if not outputs:
        raise ValueError("the result does not depend on its inputs by autograd")
    weights = [cotangent(output) for output in outputs]

    def grad(scale: float, keep: bool) -> list[Tensor]:
        scaled = [weight * scale for weight in weights]
        with without_autocast(outputs):  # a training loop calls backward outside of it
            found = torch.autograd.grad(
                outputs, list(leaves.values()), scaled, retain_graph=keep, allow_unused=True
            )
        return [
            torch.zeros_like(leaf) if g is None else g.detach()
            for leaf, g in zip(leaves.values(), found, strict=True)
        ]

    scale = 1.0
    if any(t.dtype == torch.float16 for t in (*outputs, *leaves.values())):
        # float16 gradients underflow without the loss scale that training uses
        largest = max(float(g.abs().max()) for g in grad(1.0, True) if g.numel())
        resolved = 0 < largest < math.inf
        scale = 2.0 ** min(max(-math.frexp(largest)[1], -14), 14) if resolved else 2.0**12
    found = grad(scale, keep)
    value = torch.cat([output.detach().double().flatten() for output in outputs])
    return {
        "value": value,
        **{name: g.double() / scale for name, g in zip(leaves, found, strict=True)},
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
def without_autocast(inputs: Any) -> Iterator[None]:
    """A scope in which autocast is off on the inputs' devices."""
    with ExitStack() as stack:
        for kind in {t.device.type for t in tensors_in(inputs).values()}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def full_precision(inputs: Any) -> Iterator[None]:
    """A scope without autocast, in which compiled functions run as they are written."""
    with without_autocast(inputs), ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled; the import takes a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
