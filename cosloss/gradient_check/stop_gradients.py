"""Stop-gradients held fast, so that finite differences see what autograd is meant to see.

A function that detaches a value, takes it as a number, or computes it under no_grad, means it as a
constant. Here these values are kept from one call, and given again in the calls nearby. A custom
Function, whose forward also runs without gradients, is left to itself: its backward is judged.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

STOPS = frozenset((Tensor.detach, Tensor.item, Tensor.tolist, Tensor.__float__, Tensor.__int__))
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


class StopGradients:
    """The constants of a function: recorded in its first call within `held`, replayed in others."""

    def __init__(self) -> None:
        self.values: list[Any] | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """A scope for one call of the function."""
        values = self.values
        mode = _Hold(values)
        with mode:
            yield
        if values is None:
            self.values = mode.seen


class _Hold(TorchFunctionMode):
    def __init__(self, values: list[Any] | None) -> None:
        super().__init__()
        self.values = values
        self.seen: list[Any] = []
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
