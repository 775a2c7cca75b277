"""Calling a function of nested inputs at a point of one's choice, and its gradient there."""

import copy
import dataclasses
import inspect
import math
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cosloss.gradient_check.copies import copy_tensor, wide_dtype
from cosloss.gradient_check.generators import Draw, Generators, generators_kept

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


class Cotangents:
    """The gradients on a function's outputs: recorded ones, or generic ones of a seed.

    Args:
        seed: of the generic ones, `Draw.cotangent`; every call's outputs get the same.
        recorded: gradients by the outputs' names.
        doubts: how far off each recorded one may be, by name: the roundings of a difference.
    """

    def __init__(
        self,
        seed: int,
        recorded: Mapping[str, Tensor] | None = None,
        doubts: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.seed = seed
        self.recorded = recorded
        self.doubts = doubts or {}
        self.factor = 1.0
        self.layout: Callable[[Tensor], Tensor] | None = None
        self.left_out: Mapping[str, Tensor] = {}

    def laid_out(self, layout: Callable[[Tensor], Tensor]) -> "Cotangents":
        """The same numbers, each gradient as `layout` puts it into memory."""
        changed = copy.copy(self)
        changed.layout = layout
        return changed

    def without(self, left_out: Mapping[str, Tensor]) -> "Cotangents":
        """The same, but zero on the entries of outputs that are marked, by the outputs' names."""
        changed = copy.copy(self)
        changed.left_out = left_out
        return changed

    def scaled(self, factor: float) -> "Cotangents":
        """All of them times a factor; of k/8, k below 16, generic ones stay exact."""
        recorded = self.recorded
        if recorded is not None:
            recorded = {n: (t * factor).to(t.dtype) for n, t in recorded.items()}
        scaled = copy.copy(self)
        scaled.recorded = recorded
        scaled.factor = self.factor * factor
        return scaled

    def doubted(self, draw: Draw) -> "Cotangents":
        """Other gradients that may as well be the right ones."""
        if not self.doubts or self.recorded is None:
            return self
        moved = {n: draw.signs(t.real) * self.doubts[n] for n, t in self.recorded.items()}
        changed = copy.copy(self)
        changed.recorded = {n: t + moved[n] for n, t in self.recorded.items()}
        return changed

    def on(self, outputs: Mapping[str, Tensor]) -> list[Tensor]:
        """One gradient per output.

        Raises:
            ValueError: the outputs are not those of the recorded gradients.
        """
        weights = self._on(outputs)
        if self.left_out:
            weights = [
                weight.masked_fill(self.left_out[name], 0) if name in self.left_out else weight
                for name, weight in zip(outputs, weights, strict=True)
            ]
        return weights if self.layout is None else [self.layout(weight) for weight in weights]

    def _on(self, outputs: Mapping[str, Tensor]) -> list[Tensor]:
        if self.recorded is None:
            draw = Draw(self.seed)
            return [draw.cotangent(output) * self.factor for output in outputs.values()]
        found: Mapping[str, Tensor | None] = self.recorded
        if not self.recorded.keys() <= outputs.keys():
            if len(self.recorded) != len(outputs):
                raise ValueError(
                    f"the twin has {len(outputs)} outputs through which gradients flow, "
                    f"the function {len(self.recorded)}"
                )
            found = dict(zip(outputs, self.recorded.values(), strict=True))
        weights = []
        for name, output in outputs.items():
            weight = found.get(name)
            if weight is None:
                weight = torch.zeros_like(output)
            elif weight.numel() != output.numel():
                raise ValueError(
                    f"the twin's output has shape {tuple(output.shape)}, "
                    f"the function's {tuple(weight.shape)}"
                )
            if weight.shape != output.shape:
                weight = weight.reshape(output.shape)
            # a backward may write into what it is given
            same = weight.dtype == output.dtype
            weights.append(copy_tensor(weight) if same else weight.to(output.dtype))
        return weights


def outputs_of(result: Any) -> dict[str, Tensor]:
    """The tensors of a function's result through which a gradient flows, by name."""
    found = tensors_in(result).items()
    return {n: t for n, t in found if t.requires_grad and (t.is_floating_point() or t.is_complex())}


class _Fresh(torch.autograd.Function):
    """The identity, as a copy of its own: a function may write into what it is called with.

    Of what nobody reads afterwards, `spent`, not a copy but the memory itself.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, spent: bool) -> Tensor:
        if not spent or x.layout is not torch.strided or type(x) is not Tensor:
            return copy_tensor(x)
        # a tensor of its own, no view: autograd lets nobody write into those of a Function
        alias = torch.empty(0, dtype=x.dtype, device=x.device)
        return alias.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def copied_inputs(
    inputs: Any, wanted: Container[str], spent: bool = False
) -> tuple[Any, dict[str, Tensor]]:
    """Copies to call a function with, and the leaves behind those of the names `wanted`.

    Of inputs that nobody reads afterwards, `spent`, no copies but the tensors themselves.
    """
    leaves: dict[str, Tensor] = {}

    def copied(name: str, t: Tensor) -> Tensor:
        if name not in wanted:
            return copy_tensor(t)
        if name.startswith("self."):  # parameters are leaves, what a function is called with is not
            leaves[name] = copy_tensor(t).requires_grad_()
            return leaves[name]
        leaf = copy_tensor(t) if t.is_inference() else t.detach()
        leaves[name] = leaf.requires_grad_()
        return _Fresh.apply(leaves[name], spent)

    return change_each(copied, inputs), leaves


class Gradients(Mapping[str, Tensor]):
    """Gradients by name, and "value"; kept as narrow as they came, and given in float64.

    Complex ones are given as pairs of real numbers.

    Args:
        tensors: by name; "value" is the outputs.
        scale: what the gradients are divided by.
    """

    def __init__(self, tensors: Mapping[str, Tensor | list[Tensor]], scale: float = 1.0) -> None:
        self._tensors = tensors
        self._scale = scale

    def __getitem__(self, name: str) -> Tensor:
        found = self._tensors[name]
        if isinstance(found, list):
            flat = [as_real(t).flatten() for t in found]
            return flat[0] if len(flat) == 1 else torch.cat(flat)
        return as_real(found) if self._scale == 1.0 else as_real(found) / self._scale

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def gradients(
    fn: Function, inputs: Any, wanted: Sequence[str], cotangents: Cotangents, spent: bool = False
) -> Gradients:
    """The gradients of fn(inputs), weighted by `cotangents`, on the inputs `wanted`.

    They are computed in the inputs' own dtypes, on detached copies, or, of inputs that are `spent`,
    on themselves. Under "value" stand all outputs, as one vector.
    """
    copies, leaves = copied_inputs(inputs, wanted, spent)
    return backward(fn(copies), leaves, cotangents)


def backward(result: Any, leaves: Mapping[str, Tensor], cotangents: Cotangents) -> Gradients:
    """As `gradients`, from a result whose graph exists."""
    outputs = outputs_of(result)
    if not outputs:
        raise ValueError("the result does not depend on its inputs by autograd")
    recorded = cotangents.recorded
    if recorded is not None and recorded.keys() <= outputs.keys():
        # an argument that is handed through is no output of the recorded call
        outputs = {name: outputs[name] for name in outputs if name in recorded}
    weights = cotangents.on(outputs)
    made_up = recorded is None
    half = any(t.dtype == torch.float16 for t in (*outputs.values(), *leaves.values()))
    # float16 gradients underflow without the loss scale that training uses
    scale = _float16_scale(outputs, leaves, weights) if half and made_up else 1.0
    scaled = [weight * scale for weight in weights] if scale != 1.0 else weights
    with without_autocast(outputs):  # a training loop calls backward outside of it
        found = torch.autograd.grad(
            list(outputs.values()), list(leaves.values()), scaled, allow_unused=True
        )
    grads = {
        # a function may hand back a buffer that it uses again
        name: torch.zeros_like(leaf) if g is None else copy_tensor(g)
        for (name, leaf), g in zip(leaves.items(), found, strict=True)
    }
    return Gradients({"value": [t.detach() for t in outputs.values()], **grads}, scale)


def as_real(t: Tensor, detach: bool = True) -> Tensor:
    """A dense float64 tensor, detached or not; a complex one with a last dimension of 2."""
    t = t.detach() if detach else t
    t = t if t.layout is torch.strided else t.to_dense()
    return (
        torch.view_as_real(t.to(torch.complex128).resolve_conj()) if t.is_complex() else t.double()
    )


def _float16_scale(
    outputs: Mapping[str, Tensor], leaves: Mapping[str, Tensor], weights: list[Tensor]
) -> float:
    # a shared graph would not survive a Function that writes into what it saved: by the outputs
    largest = max((float(w.abs().max()) for w in weights if w.numel()), default=1.0)
    entries = max((leaf.numel() for leaf in leaves.values()), default=1)
    scalar = all(output.ndim == 0 for output in outputs.values())
    return (
        2.0 ** round(math.log2(min(2.0**14, max(1.0, entries**0.5)) / largest)) if scalar else 1.0
    )


def in_float64(inputs: Any) -> Any:
    """The inputs detached, floating-point tensors as float64, complex ones as complex128."""

    def widen(name: str, t: Tensor) -> Tensor:
        return copy_tensor(t, wide_dtype(t.dtype)) if t.dtype != wide_dtype(t.dtype) else t.detach()

    return change_each(widen, inputs)


@contextmanager
def undisturbed() -> Iterator[None]:
    """A scope with gradients on and outside inference mode that leaves the generators as found."""
    with generators_kept(), torch.inference_mode(False), torch.enable_grad():
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
