"""The loss under observation: where it is found, and what it was called with."""

import copy
import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cosloss.gradient_check.calls import map_tensors, tensors_in

ATTRIBUTES = ("loss", "loss_fn", "criterion")
Target = str | nn.Module | Mapping[str, str | nn.Module] | None


def find_losses(model: nn.Module, target: Target) -> dict[str, nn.Module]:
    """The loss modules to observe, by the name that stands in the tags.

    Raises:
        ValueError: nothing is found, or what is found is not an nn.Module.
    """
    if target is None:
        for name in ATTRIBUTES:
            if isinstance(getattr(model, name, None), nn.Module):
                return {name: getattr(model, name)}
        raise ValueError(
            f"{type(model).__name__} has no module named {', '.join(ATTRIBUTES)}; "
            'say where the loss is: target="path.to.module"'
        )
    if isinstance(target, nn.Module):
        target = {type(target).__name__: target}
    if isinstance(target, str):
        target = {target: target}
    found = {}
    for name, where in target.items():
        module = operator.attrgetter(where)(model) if isinstance(where, str) else where
        if not isinstance(module, nn.Module):
            raise ValueError(f"{where} is a {type(module).__name__}; it must be an nn.Module")
        found[name] = module
    return found


class PureLoss:
    """A loss module as a function of one nest of inputs, which leaves the module as it is.

    inputs = {"parameters": {name: tensor}, "arguments": {name: value}}. Parameters and buffers are
    replaced for the time of a call only; hooks on the module do not fire; a loss that gathers from
    other processes is called in its local form.
    """

    def __init__(self, module: nn.Module, twin: Callable[..., Any] | None = None) -> None:
        if getattr(module, "gather_distributed", False):
            module = copy.copy(module)
            module.gather_distributed = False  # type: ignore[assignment]
        self.module = module
        original = getattr(module, "_orig_mod", module)
        if twin is None and hasattr(original, "reference"):
            twin = _ReferenceOf(original)
        self.twin = None if twin is None else self._caller(twin)
        parameters = inspect.signature(original.forward).parameters
        self.names = [n for n, p in parameters.items() if p.kind is not p.VAR_POSITIONAL]

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The nest of inputs of a call of the module."""
        state = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        named = [*self.names, *(f"input{i}" for i in range(len(self.names), len(args)))]
        return {"state": state, "args": dict(zip(named, args, strict=False)), "kwargs": kwargs}

    def __call__(self, inputs: dict[str, Any]) -> Any:
        return self._caller(self.module.forward)(inputs)

    def _caller(self, function: Callable[..., Any]) -> Callable[[dict[str, Any]], Any]:
        holder = _Holder(self.module, function)

        def call(inputs: dict[str, Any]) -> Any:
            state = {f"module.{name}": t for name, t in inputs["state"].items()}
            return functional_call(holder, state, tuple(inputs["args"].values()), inputs["kwargs"])

        return call


class _Holder(nn.Module):
    """Calls a function while functional_call has the module's parameters replaced."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self.function = (function,)  # in a tuple: a module assigned here would be registered

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function[0](*args, **kwargs)


class _ReferenceOf:
    """The module's twin, asked for at each call, so that it sees the parameters of that moment."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.reference()(*args, **kwargs)


@dataclass
class Observation:
    """One call of the loss: a sample of its rows, and the autocast state it ran under."""

    inputs: dict[str, Any]
    wanted: list[str]
    autocast: dict[str, torch.dtype]


def observe(inputs: dict[str, Any], rows: int | None, offset: int) -> Observation | None:
    """Copies of `rows` rows of every input that has the batch's length; None if nothing is sought.

    The rows lie evenly in the batch, from `offset` on; rows=None is the whole batch.
    """
    tensors = tensors_in(inputs)
    wanted = [n for n, t in tensors.items() if t.requires_grad and t.is_floating_point()]
    if not any(not name.startswith("state.") for name in wanted):
        return None
    batch = max((len(tensors[n]) for n in wanted if tensors[n].ndim), default=1)
    step = max(batch // rows, 1) if rows else 1
    count = rows or batch

    def sample(name: str, t: Tensor) -> Tensor:
        requires_grad = t.requires_grad
        if t.ndim and len(t) == batch and not name.startswith("state."):
            t = t[offset % step :: step][:count]
        return t.detach().clone().requires_grad_(requires_grad)

    kinds = {t.device.type for t in tensors.values()}
    autocast = {k: torch.get_autocast_dtype(k) for k in kinds if torch.is_autocast_enabled(k)}
    return Observation(map_tensors(sample, inputs), wanted, autocast)
