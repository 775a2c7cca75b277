"""Stop-gradients held fast, so that finite differences see what autograd is meant to see.

A function that detaches a value, takes it as a number, or computes it under no_grad, means it as a
constant. Here these values are kept from one call, and given again in the calls nearby. A custom
Function, whose forward also runs without gradients, is left to itself: its backward is judged.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

STOPS = frozenset((Tensor.detach, Tensor.item, Tensor.tolist, Tensor.__float__, Tensor.__int__))
HIDDEN = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
Place = tuple[str, str, int]  # file, function, line
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


class StopGradients:
    """A function whose constants are those of its first call.

    Attributes:
        places: the lines that make constants of what requires a gradient, as "file:line".
    """

    def __init__(self, fn: Callable[[Any], Any]) -> None:
        self.fn = fn
        self.places: list[str] = []
        self._values: list[Any] | None = None

    def __call__(self, inputs: Any) -> Any:
        mode = _Hold(self._values)
        with mode:
            found = self.fn(inputs)
        if self._values is None:
            self._values = mode.seen
            self.places = [f"{Path(file).name}:{line}" for file, _, line in mode.places]
        return found


class _Hold(TorchFunctionMode):
    def __init__(self, values: list[Any] | None) -> None:
        super().__init__()
        self.values = values
        self.seen: list[Any] = []
        self.places: dict[Place, None] = {}
        self.constant = False  # within torch.no_grad(), outside a custom Function

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
        stops = func in STOPS or func == _DATA
        if not (stops and torch.is_grad_enabled()) and not self.constant:
            return func(*args, **kwargs)
        if self.values is None and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            self.places.setdefault(calling_line())
        return self._hold(lambda: func(*args, **kwargs))

    def _hold(self, compute: Callable[[], Any]) -> Any:
        found = compute()
        place = len(self.seen)
        if not isinstance(found, (Tensor, float, int, list)) or isinstance(found, bool):
            return found
        if self.values is not None and place < len(self.values):
            kept = self.values[place]
            if (
                isinstance(found, Tensor)
                and isinstance(kept, Tensor)
                and (found.shape == kept.shape and found.dtype == kept.dtype)
            ):
                found = kept.clone()
            elif type(found) is type(kept):
                found = kept
        self.seen.append(found.clone() if isinstance(found, Tensor) else found)
        return found


def calling_line() -> Place:
    """The innermost line that is neither torch's nor ours."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((*HIDDEN, "<")):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_code.co_name, frame.f_lineno
