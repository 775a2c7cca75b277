"""Nests of inputs: tensors in tuples, lists and dicts, by name."""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cosloss.gradient_check.generators import Draw, Generators

Function = Callable[[Any], Any]


def map_tensors(change: Callable[[str, Tensor], Any], value: Any, name: str = "") -> Any:
    """`value` with `change(name, tensor)` in place of every tensor in its tuples, lists and dicts.

    Example:
        >>> map_tensors(lambda name, x: name, {"a": torch.ones(1), "b": (torch.ones(1), 2)})
        {'a': 'a', 'b': ('b.0', 2)}
    """
    changed: Any
    if isinstance(value, Tensor):
        return change(name, value)
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, Mapping)):
        changed = copy.copy(value)
        for field in dataclasses.fields(value):
            item = map_tensors(change, getattr(value, field.name), _below(name, field.name))
            object.__setattr__(changed, field.name, item)
        return changed
    if isinstance(value, Mapping):
        changed = copy.copy(value)
        for key, item in value.items():
            changed[key] = map_tensors(change, item, _below(name, key))
        return changed
    if isinstance(value, (tuple, list)):
        items = [map_tensors(change, item, _below(name, i)) for i, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _below(name: str, key: Any) -> str:
    return f"{name}.{key}" if name else str(key)


def change_each(change: Callable[[str, Tensor], Tensor], value: Any) -> Any:
    """As `map_tensors`; a tensor that stands in several places is changed once, and stays one."""
    changed: dict[int, Tensor] = {}

    def once(name: str, t: Tensor) -> Tensor:
        if id(t) not in changed:
            changed[id(t)] = change(name, t)
        return changed[id(t)]

    return map_tensors(once, value)


def tensors_in(value: Any) -> dict[str, Tensor]:
    """Every tensor in nested tuples, lists and dicts, by its name."""
    found: dict[str, Tensor] = {}
    map_tensors(found.__setitem__, value)
    return found


def replace_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """`value` with the tensors of those names in place of its own, wherever these stand."""
    return change_each(lambda name, tensor: tensors.get(name, tensor), value)


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
    """fn as a function of the nest that `named_arguments` makes; it always draws the same."""
    generators = Generators()

    def call(inputs: Any) -> Any:
        generators.restore()
        return fn(*inputs["args"].values(), **inputs["kwargs"])

    return call


def display_name(name: str) -> str:
    """The name of an input as a person knows it: without the part of the nest it lies in."""
    return name.removeprefix("args.").removeprefix("kwargs.")


def judged_inputs(inputs: Any) -> list[str]:
    """Names of the floating-point tensors that require a gradient, or of all where none does.

    Raises:
        ValueError: there is no floating-point tensor among the inputs.
    """
    tensors = tensors_in(inputs).items()
    floating = {n: t for n, t in tensors if t.is_floating_point() or t.is_complex()}
    if not floating:
        raise ValueError("none of the inputs is a floating-point tensor")
    return [n for n, t in floating.items() if t.requires_grad] or list(floating)


def sample_rows(inputs: Any, wanted: Sequence[str], rows: int, draw: Draw) -> Any:
    """The inputs with `rows` rows of the batch, drawn at random; as they are if unsure.

    Every tensor argument with dimensions, and every list of arguments, must be as long as every
    other: then their rows are one batch's. Parameters and buffers are never sampled. The order of
    rows is kept, so that pairs, labels and targets stay together.
    """
    called = {key: inputs[key] for key in ("args", "kwargs") if key in inputs} or inputs
    lengths = {len(t) for t in tensors_in(called).values() if t.ndim}
    lists = [v for part in called.values() for v in _lists(part)]
    whole = len(lengths | {len(v) for v in lists}) != 1
    batch = min(lengths, default=0)
    if whole or batch <= rows or not any(n for n in wanted if not n.startswith("self.")):
        return inputs
    chosen = torch.randperm(batch, generator=draw.generator, device="cpu")[:rows].sort().values

    def sample(name: str, t: Tensor) -> Tensor:
        rows_of = t[chosen.to(t.device)] if t.ndim else t
        return rows_of.detach().requires_grad_(t.requires_grad)

    return {**inputs, **change_each(sample, _sample_lists(called, chosen.tolist()))}


def _lists(value: Any) -> list[list[Any]]:
    """The lists among arguments whose items are not tensors."""
    items = value.values() if isinstance(value, Mapping) else [value]
    return [v for v in items if isinstance(v, list) and not any(isinstance(i, Tensor) for i in v)]


def _sample_lists(called: Any, chosen: list[int]) -> Any:
    def few(value: Any) -> Any:
        return [value[i] for i in chosen] if any(value is v for v in _lists(value)) else value

    return {
        key: {n: few(v) for n, v in part.items()} if isinstance(part, Mapping) else few(part)
        for key, part in called.items()
    }
