"""A module as a pure function of its inputs, its parameters and buffers among them."""

import copy
from collections import deque
from collections.abc import Callable
from functools import partial
from types import CellType, FunctionType
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from cosloss.gradient_check.calls import copied_inputs
from cosloss.gradient_check.copies import copy_state
from cosloss.gradient_check.generators import Generators
from cosloss.gradient_check.nests import named_arguments, tensors_in


class PureLoss:
    """A module, and its twin, as functions of one nest of inputs, which leave the module as it is.

    inputs = {"args": {name: value}, "kwargs": {name: value}, "self": {name: tensor}, "twin": ...},
    the last two the tensors that take the places of the module's parameters and buffers, and of a
    twin module's. Each call is of a copy, made for it: what it counts, queues or averages is new
    every time, and the generators draw what they drew at `frozen`. The module's own hooks do not
    fire. A loss that gathers from other processes (`gather_distributed`) is called in its local
    form.

    The twin is `twin`, or else the module's `reference()`, or else None. It takes the loss's
    arguments, and sees the parameters that it reads from the module replaced as well: a function,
    which may have the live module from anywhere, finds the tensors there while it is called.
    """

    def __init__(self, module: nn.Module, twin: Callable[..., Any] | None = None) -> None:
        self.gathers = bool(getattr(module, "gather_distributed", False))
        # torch.compile wraps a module: parameters have their names from within
        self.module: Any = getattr(module, "_orig_mod", module)
        self.given_twin = twin
        self._live = self.module
        self.identity = id(self.module)  # of frozen copies too
        self.generators: Generators | None = None
        has_twin = twin is not None or hasattr(self.module, "reference")
        self.twin: Callable[[dict[str, Any]], Any] | None = self._twin if has_twin else None

    def __call__(self, inputs: dict[str, Any]) -> Any:
        module, _ = self.fresh(inputs)
        return module.forward(*inputs["args"].values(), **inputs["kwargs"])

    def _twin(self, inputs: dict[str, Any]) -> Any:
        module, twin = self.fresh(inputs)
        if isinstance(twin, FunctionType) and inputs.get("self"):
            return call_beside(self._live, inputs["self"], twin, inputs)
        called = module.reference() if twin is None else twin
        return called(*inputs["args"].values(), **inputs["kwargs"])

    def changes_itself(self, inputs: dict[str, Any]) -> bool:
        """Whether a call changes the module's state: buffers, tensors, numbers, lists of them."""
        module, _ = self.fresh(copied_inputs(inputs, ())[0])
        before = _kept(module)
        copied = {name: copy_state(value) for name, value in before.items()}
        module.forward(*inputs["args"].values(), **inputs["kwargs"])
        after = _kept(module)
        return before.keys() != after.keys() or not all(
            _same(copied[name], after[name]) for name in after
        )

    @property
    def title(self) -> str:
        """The class of the module, or the name of the function that one stands for."""
        own = vars(self.module).get("forward")
        return type(self.module).__name__ if own is None else getattr(own, "__name__", str(own))

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The nest of a call's arguments, without the module's parameters."""
        return named_arguments(self.module.forward, args, kwargs)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The rest of the nest: the parameters and buffers of the module, and of a twin module."""
        twin = self.given_twin if isinstance(self.given_twin, nn.Module) else None
        return {"self": tensors_of(self.module), "twin": tensors_of(twin) if twin else {}}

    @property
    def live_parts(self) -> str:
        """Why a copy would not be one: a function that it holds is bound to the module itself."""
        parts = set(self.module.modules()) if isinstance(self.module, nn.Module) else set()
        for part in parts:
            for name, value in vars(part).items():
                cells = value.__closure__ or () if isinstance(value, FunctionType) else ()
                if any(_content(cell) in parts for cell in cells):
                    return f"its `{name}` is a closure over the module itself, which has no copy"
        return ""

    def frozen(self) -> "PureLoss":
        """This loss as it is now: copied, with the generators' states of this moment."""
        frozen = copy.copy(self)
        frozen.generators = Generators()
        # each call has other tensors in the parameters' places: these are never read
        live = [m for m in (self.module, self.given_twin) if isinstance(m, nn.Module)]
        memo = {id(p): p for module in live for p in module.parameters()}
        frozen.module, frozen.given_twin = self._copies(dict[int, Any](memo))
        if self.gathers:
            frozen.module.gather_distributed = False
        frozen.twin = None if self.twin is None else frozen._twin
        return frozen

    def _copies(self, memo: dict[int, Any], wide: bool = False) -> tuple[Any, Any]:
        module = copy_state(self.module, memo, wide)
        memo[id(self.module)] = module  # a twin may be a method of the module
        return module, copy_state(self.given_twin, memo, wide)

    def fresh(self, inputs: dict[str, Any]) -> tuple[Any, Any]:
        """Copies of the module and its twin, made for one call, with the tensors of the nest."""
        memo: dict[int, Any] = {}
        for own, name in ((self.module, "self"), (self.given_twin, "twin")):
            given = inputs.get(name, {})
            if isinstance(own, nn.Module):
                buffers = dict(own.named_buffers())
                for key, tensor in tensors_of(own).items():
                    if key in given:
                        new = given[key].clone() if key in buffers else given[key]
                        memo[id(tensor)] = new
        floating = [t for t in tensors_in(inputs).values() if t.is_floating_point()]
        wide = bool(floating) and all(t.element_size() == 8 for t in floating)
        module, twin = self._copies(memo, wide)
        if self.generators is not None:
            self.generators.restore()
        if self.gathers:
            module.gather_distributed = False
        return module, twin


class _Holder(nn.Module):
    """A module beside what is called, so that functional_call can set the one for the other."""

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held

    def forward(self, called: Callable[[], Any]) -> Any:
        return called()


def call_beside(
    held: nn.Module,
    tensors: dict[str, Tensor],
    called: Callable[..., Any],
    inputs: dict[str, Any],
) -> Any:
    """Call a function with a nest's arguments while a module holds other tensors, by name."""
    parameters = dict(held.named_parameters())
    # a buffer may be written: each call has its own
    given = {f"held.{n}": t if n in parameters else t.clone() for n, t in tensors.items()}
    call = partial(called, *inputs["args"].values(), **inputs["kwargs"])
    return functional_call(_Holder(held), given, (call,))


def _content(cell: CellType) -> Any:
    try:
        found = cell.cell_contents
    except ValueError:  # not yet filled
        return None
    return found if isinstance(found, nn.Module) else None


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters and buffers by name."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _kept(module: Any) -> dict[str, Any]:
    """The plain values that a module and its parts keep, buffers among them, by name."""
    if not isinstance(module, nn.Module):
        return {}
    return dict(module.named_buffers()) | {
        f"{at}.{name}": value
        for at, part in module.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, (Tensor, int, float, list, deque))
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, (list, deque)) and isinstance(b, (list, deque)):
        return len(a) == len(b) and all(map(_same, a, b))
    # what is neither a number nor a tensor is not looked at
    return a == b if isinstance(a, (int, float)) and isinstance(b, (int, float)) else True
