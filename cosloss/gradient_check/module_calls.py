"""A module and its twin as functions of one nest of inputs: arguments, parameters, buffers."""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from cosloss.gradient_check.copies import copy_tensor
from cosloss.gradient_check.module import PureLoss, call_beside, tensors_of
from cosloss.gradient_check.nests import (
    Function,
    judged_inputs,
    map_tensors,
    named_arguments,
    on_nest,
    tensors_in,
)


def as_calls(
    fn: Callable[..., Any], twin: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: Any
) -> tuple[Function, Function | None, dict[str, Any], list[str]]:
    """fn and its twin as functions of one nest, a copy of that nest, and which of it is judged.

    Raises:
        ValueError: none of the inputs is a floating-point tensor.
    """
    if isinstance(fn, nn.Module):
        call, twin_call, nest = _on_module(fn, twin, args, kwargs)
    else:
        call, twin_call = on_nest(fn), on_nest(twin) if twin else None
        nest = named_arguments(fn, args, kwargs)
    nest = map_tensors(lambda n, t: copy_tensor(t).requires_grad_(t.requires_grad), nest)
    wanted = [f"self.{n}" for n, t in nest.get("self", {}).items() if t.requires_grad]
    arguments = {key: nest[key] for key in ("args", "kwargs")}
    if not wanted or _floating(arguments):
        wanted = judged_inputs(arguments) + wanted
    return call, twin_call, nest, wanted


def _on_module(
    module: nn.Module, twin: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: Any
) -> tuple[Function, Function | None, dict[str, Any]]:
    """The module and its twin as pure functions, and the nest of inputs that both take.

    A twin reads the parameters in question where it finds them: a function (a closure, a lambda, a
    method of the module) from the module, which holds them while it is called; a module from its
    own parameters of the same names and shapes. Without a twin the module's `reference()` is one.
    """
    if isinstance(twin, nn.Module):
        loss = PureLoss(module).frozen()
        twin_call: Function | None = _TwinModule(loss, module, twin)
    elif twin is not None and getattr(twin, "__self__", None) is not module:
        loss = PureLoss(module).frozen()
        twin_call = _TwinFunction(loss, module, twin)
    else:
        loss = PureLoss(module, twin).frozen()
        twin_call = loss.twin
    return loss, twin_call, loss.arguments(args, kwargs) | loss.state()


def _floating(inputs: Any) -> bool:
    return any(t.is_floating_point() or t.is_complex() for t in tensors_in(inputs).values())


class _TwinModule:
    """A twin module, copied for each call, whose parameters are the judged module's.

    They are the same objects, or have the same names and shapes.

    Raises:
        ValueError: it lacks a parameter that requires a gradient.
    """

    def __init__(self, loss: PureLoss, module: nn.Module, twin: nn.Module) -> None:
        self.loss = loss
        self.twin = twin
        ours, theirs = tensors_of(module), tensors_of(twin)
        names = {id(t): name for name, t in ours.items()}
        by_name = {n: n for n, t in theirs.items() if n in ours and ours[n].shape == t.shape}
        # the twin's name -> the module's
        self.shared = by_name | {n: names[id(t)] for n, t in theirs.items() if id(t) in names}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and name not in self.shared.values():
                raise ValueError(
                    f"the twin has no parameter `{name}` of shape {tuple(parameter.shape)}: rename "
                    "its own, or pass a function that reads the module's"
                )

    def __call__(self, inputs: dict[str, Any]) -> Any:
        given = inputs["self"]
        wide = any(t.element_size() == 8 for t in given.values() if t.is_floating_point())
        twin = copy.deepcopy(self.twin)
        twin = twin.double() if wide else twin
        shared = {theirs: given[ours] for theirs, ours in self.shared.items()}
        return _call(self.loss, twin, shared, twin, inputs)


class _TwinFunction:
    """A function that may read the live module, which has the inputs' tensors meanwhile."""

    def __init__(self, loss: PureLoss, module: nn.Module, twin: Callable[..., Any]) -> None:
        self.loss, self.module, self.twin = loss, module, twin

    def __call__(self, inputs: dict[str, Any]) -> Any:
        return _call(self.loss, self.module, inputs["self"], self.twin, inputs)


def _call(
    loss: PureLoss,
    held: nn.Module,
    tensors: dict[str, Tensor],
    called: Callable[..., Any],
    inputs: dict[str, Any],
) -> Any:
    if loss.generators is not None:
        loss.generators.restore()
    return call_beside(held, tensors, called, inputs)
