"""A loss module as a pure function of its inputs, its parameters among them."""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from cosloss.gradient_check.calls import named_arguments, on_nest, tensors_in


class PureLoss:
    """A module, and its twin, as functions of one nest of inputs, which leave the module as it is.

    inputs = {"args": {name: value}, "kwargs": {name: value}, "self": {name: tensor}}, the last the
    module's parameters and buffers: they are replaced for the time of a call only, so that a call
    changes no buffer and runs in any dtype. The module's own hooks do not fire. A loss that gathers
    from other processes (`gather_distributed`) is called in its local form.

    The twin is `twin`, or else the module's `reference()`, or else None. It takes the loss's
    arguments, and sees the parameters that it reads from the module replaced as well.
    """

    def __init__(self, module: nn.Module, twin: Callable[..., Any] | None = None) -> None:
        self.gathers = bool(getattr(module, "gather_distributed", False))
        if self.gathers:
            module = copy.copy(module)
            module.gather_distributed = False  # type: ignore[assignment]
        # torch.compile wraps a module: parameters have their names from within
        self.module: Any = getattr(module, "_orig_mod", module)
        self.given_twin = twin
        if twin is None and hasattr(self.module, "reference"):
            twin = self._reference
        self._twin_state = twin.state_dict() if isinstance(twin, nn.Module) else {}
        self._call = _caller(self.module, module.forward)
        self.twin = None if twin is None else _caller(self.module, twin)

    def __call__(self, inputs: dict[str, Any]) -> Any:
        return self._call(inputs)

    @property
    def title(self) -> str:
        """The class of the module, or the name of the function that one stands for."""
        own = vars(self.module).get("forward")
        return type(self.module).__name__ if own is None else getattr(own, "__name__", str(own))

    def _reference(self, *args: Any, **kwargs: Any) -> Any:
        # asked for at each call: it may read parameters, which are replaced meanwhile
        return self.module.reference()(*args, **kwargs)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The nest of a call's arguments, without the module's parameters."""
        return named_arguments(self.module.forward, args, kwargs)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The rest of the nest: the parameters and buffers of the module, and of a twin module."""
        state = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        return {"self": state, "twin": dict(self._twin_state)}


def _caller(module: nn.Module, function: Callable[..., Any]) -> Callable[[dict[str, Any]], Any]:
    holder = _Holder(module, function)
    buffers = {name for name, _ in module.named_buffers()}

    def call(inputs: dict[str, Any]) -> Any:
        # a buffer that the loss counts in is new in each call, so that calls are alike
        state = {
            f"module.{name}": t.clone() if name in buffers else t
            for name, t in tensors_in(inputs.get("self", {})).items()
        }
        if isinstance(function, nn.Module):
            state |= {f"function.{n}": t for n, t in tensors_in(inputs.get("twin", {})).items()}
        if not state:
            return on_nest(function)(inputs)
        return functional_call(holder, state, tuple(inputs["args"].values()), inputs["kwargs"])

    return call


class _Holder(nn.Module):
    """Calls a function while functional_call has a module's parameters replaced."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)
