"""Where a step stops gradients: its detached values held, but not those on the way to others.

A collective without a gradient is a fault, and detaches what it sends: what enters a collective is
never held, nor what is detached in the lines around one. The losses' own collectives have one.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cosloss.gradient_check.stop_gradients import HIDDEN, Constants, Place, _Hold, calling_line

NEARBY = 10  # lines of one function
TORCH, PACKAGE = HIDDEN
AROUND = (TORCH, *(f"{PACKAGE}{name}{os.sep}" for name in ("watch", "gradient_check")))


class Stops:
    """The values that a step takes as constants: recorded in one call, held in others.

    Attributes:
        places: where they are made, as "file:line".
        blocks: those of them that are made under torch.no_grad().
    """

    def __init__(self) -> None:
        self.values: Constants | None = None
        self.only_blocks = False
        self._made: dict[Place, bool] = {}  # whether under no_grad
        self._sent: list[Place] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """A scope for the call that is recorded."""
        mode = _Located(self, None)
        with _Collectives(self, mode), mode:
            yield
        self.values = mode.seen

    @contextmanager
    def held(self) -> Iterator[None]:
        """A scope for a call that is given the recorded values."""
        with _Located(self, self.values):
            yield

    @property
    def places(self) -> list[str]:
        """Where the values that are held are made."""
        held = [p for p in self._made if self._holds(p)]
        return [f"{Path(file).name}:{line}" for file, _, line in held]

    def _holds(self, place: Place) -> bool:
        if self.only_blocks and not self._made.get(place, False):
            return False
        file, function, line = place
        return not any(
            (file, function) == (f, g) and abs(line - at) <= NEARBY for f, g, at in self._sent
        )


class _Located(_Hold):
    def __init__(self, stops: Stops, values: Constants | None) -> None:
        super().__init__(values)
        self.stops = stops
        self.originals: list[tuple[Any, Place]] = []

    def _hold(self, compute: Callable[[], Any], written: Tensor | None = None) -> Any:
        place = calling_line()
        if self.values is None:
            found = super()._hold(compute, written)
            if self.constant or _carries_gradient(found):
                self.stops._made.setdefault(place, self.constant)
            if not _in_a_loss():
                self.originals.append((found, place))
            return found
        if self.stops._holds(place):
            return super()._hold(compute, written)
        values, self.values = self.values, None
        try:
            return super()._hold(compute, written)
        finally:
            self.values = values


def _carries_gradient(found: Any) -> bool:
    return isinstance(found, (Tensor, float, int, list))


class _Collectives(TorchDispatchMode):
    """Notes where collectives are called, and which constants enter them."""

    def __init__(self, stops: Stops, mode: _Located) -> None:
        super().__init__()
        self.stops = stops
        self.mode = mode

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and not _in_a_loss():
            self.stops._sent.append(calling_line())
            sent = {t.untyped_storage().data_ptr() for t in _tensors(args)}
            for made, place in self.mode.originals:
                if isinstance(made, Tensor) and made.untyped_storage().data_ptr() in sent:
                    self.stops._sent.append(place)
        return func(*args, **(kwargs or {}))


def _in_a_loss() -> bool:
    """Whether the innermost line that is neither torch's nor a check's is of this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(AROUND):
        frame = frame.f_back
    return frame.f_code.co_filename.startswith(PACKAGE)


def _tensors(nest: Any) -> Iterator[Tensor]:
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, (list, tuple)):
        for item in nest:
            yield from _tensors(item)
