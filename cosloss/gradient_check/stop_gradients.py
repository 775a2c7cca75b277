"""Stop-gradients held fast, so that finite differences see what autograd is meant to see.

A function that detaches a value, takes it as a number, or computes it under no_grad, means it as a
constant. Here these values are kept from one call, and given again in the calls nearby. A custom
Function, whose forward also runs without gradients, is left to itself: its backward is judged.

What is written into a tensor behind autograd's back, a clamp under no_grad, changes its value and
not its gradient: to autograd a constant was added, which is what is kept. An embedding's row for
padding has no gradient by its definition.
"""

import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

STOPS = frozenset((Tensor.detach, Tensor.item, Tensor.tolist, Tensor.__float__, Tensor.__int__))
# functions of torch's in whose names these stand hide a stop from a mode: they hand themselves over
HIDE = frozenset(("detach", "no_grad", "_no_grad_embedding_renorm_"))
ASK = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
WRITES = frozenset(f"__i{n}__" for n in ("add", "sub", "mul", "truediv", "pow")) | {"__setitem__"}
# torch's folder and this package's
HIDDEN = tuple(f"{x}{os.sep}" for x in (Path(torch.__file__).parent, Path(__file__).parents[1]))
Place = tuple[str, str, int]  # file, function, line
Site = tuple[CodeType, int]  # a function's code, and the instruction of it
Constants = dict[Site, list[Any]]  # what each makes, in turn: a call may pass by some of them
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


class StopGradients:
    """A function whose constants are those of its first call.

    Attributes:
        places: the lines that make constants of what requires a gradient, as "file:line".
    """

    def __init__(self, fn: Callable[[Any], Any]) -> None:
        self.fn = fn
        self.places: list[str] = []
        self._values: Constants | None = None

    def __call__(self, inputs: Any) -> Any:
        mode = _Hold(self._values)
        with mode:
            found = self.fn(inputs)
        if self._values is None:
            self._values = mode.seen
            self.places = [f"{Path(file).name}:{line}" for file, _, line in mode.places]
        return found


class _Hold(TorchFunctionMode):
    def __init__(self, values: Constants | None) -> None:
        super().__init__()
        self.values = values
        self.seen: Constants = {}
        self.places: dict[Place, None] = {}
        self.constant = False  # within torch.no_grad(), outside a custom Function
        self.aliases: dict[int, tuple[Tensor, Tensor]] = {}  # a detached tensor, and of which

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled:
            entering = not args[0]
            # a Function's forward runs without gradients too, and asks for it otherwise
            if entering and torch.is_grad_enabled():
                self.constant = True
            elif not entering:
                self.constant = False
            return func(*args, **kwargs)
        if _hides_a_stop(func):
            with self:
                return _opened(func)(*args, **kwargs)
        embeds = func is torch.embedding and torch.is_grad_enabled()
        padding = _padding(*args, **kwargs) if embeds else None
        if padding is not None:
            self._note(args)
            found = func(*args, **kwargs)
            kept = self._hold(lambda: found.detach())
            return torch.where(padding.unsqueeze(-1), kept, found)
        stops = func in STOPS or func == _DATA
        written = self._written(func, args)
        if not (stops and torch.is_grad_enabled()) and not self.constant and written is None:
            return func(*args, **kwargs)
        self._note(args)
        found = self._hold(lambda: func(*args, **kwargs), written)
        if isinstance(found, Tensor) and (func is Tensor.detach or func == _DATA):
            self.aliases[id(found)] = found, args[0]
        return found

    def _note(self, args: Any) -> None:
        if self.values is None and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            self.places.setdefault(calling_line())

    def _written(self, func: Any, args: Any) -> Tensor | None:
        """The tensor with a gradient into which an operation writes behind autograd's back."""
        name = getattr(func, "__name__", "")
        in_place = name in WRITES or (name.endswith("_") and not name.endswith("__"))
        if not in_place or not args or not isinstance(args[0], Tensor):
            return None
        found = self.aliases.get(id(args[0]), (None, args[0] if self.constant else None))[1]
        return found if found is not None and found.requires_grad else None

    def _hold(self, compute: Callable[[], Any], written: Tensor | None = None) -> Any:
        if written is not None:
            before = written.detach().clone()
            found = compute()
            kept = self._kept(written.detach() - before)
            change = before + kept - written.detach()
            written.data.add_(change)
            alias = found if isinstance(found, Tensor) else written
            if alias.data_ptr() != written.data_ptr():  # its values were held, in a copy
                alias.data.copy_(written)
            return found
        return self._kept(compute())

    def _kept(self, found: Any) -> Any:
        if not isinstance(found, (Tensor, float, int, list)) or isinstance(found, bool):
            return found
        site = _site()
        seen = self.seen.setdefault(site, [])
        values = () if self.values is None else self.values.get(site, ())
        if len(seen) < len(values):
            kept = values[len(seen)]
            if not isinstance(found, Tensor):
                found = kept if type(found) is type(kept) else found
            elif isinstance(kept, Tensor):
                alike = (found.shape, found.dtype) == (kept.shape, kept.dtype)
                found = kept.clone() if alike else found
        seen.append(found.clone() if isinstance(found, Tensor) else found)
        return found


def _hides_a_stop(func: Any) -> bool:
    return (
        isinstance(func, FunctionType)
        and func.__module__ == "torch.nn.functional"
        and not HIDE.isdisjoint(func.__code__.co_names)
    )


@cache
def _opened(func: FunctionType) -> Callable[..., Any]:
    """A function of torch's whose body a mode sees, where the function hands itself over whole."""
    asked = dict.fromkeys(ASK, lambda *_: False)
    opened = FunctionType(
        func.__code__,
        {**func.__globals__, **asked},
        func.__name__,
        func.__defaults__,
        func.__closure__,
    )
    opened.__kwdefaults__ = func.__kwdefaults__
    return opened


def _padding(
    weight: Tensor, index: Tensor, padding_idx: int = -1, *_: Any, **_options: Any
) -> Tensor | None:
    """Where an embedding is asked for the row that has no gradient by its definition."""
    if padding_idx < 0 or not weight.requires_grad:
        return None
    found = index == padding_idx
    return found if found.any() else None


def _site() -> Site:
    """The instruction that the mode was asked about."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _Hold.__torch_function__.__code__:
        frame = frame.f_back
    asked = None if frame is None else frame.f_back
    assert asked is not None
    return asked.f_code, asked.f_lasti


def calling_line() -> Place:
    """The innermost line that is neither torch's nor ours."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((*HIDDEN, "<")):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_code.co_name, frame.f_lineno
