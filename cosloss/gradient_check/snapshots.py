"""The state of a training step, put back: tensors, containers and attributes, in place."""

import io
import random
import types
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cosloss.gradient_check.copies import BY_REFERENCE

LIMIT = 2 << 30  # bytes of tensors that are neither parameters nor buffers
ATOMS = (type(None), bool, int, float, complex, str, bytes, type, types.ModuleType, io.IOBase)
# what a step does not change, or may not be put back behind its owner's back
LEFT_ALONE = (
    *(f"{name}." for name in BY_REFERENCE),
    "cosloss.watch.",
    "cosloss.callbacks.",
    "torch._dynamo.",
    "torch.distributed.",
    "torch.optim.",
    "torch.utils.data.",
    "torch.utils.tensorboard.",
)


class Snapshot:
    """The contents of all that can be reached from some objects.

    Tensors, NumPy arrays, lists, dicts, sets, deques, generators of random numbers, objects with
    attributes, and what a function closes over. Hooks of modules, gradients, and the programs
    around a module, its trainer or its loggers, are left alone.

    Args:
        roots: modules, functions, and nests of these and of tensors.

    Raises:
        ValueError: an iterator is reached, which cannot be wound back, or too much memory.

    Example:
        >>> queue = [torch.zeros(2)]
        >>> before = Snapshot(queue)
        >>> queue[0].add_(1); queue.append("next")
        tensor([1., 1.])
        >>> before.restore()
        >>> queue
        [tensor([0., 0.])]
    """

    def __init__(self, *roots: Any) -> None:
        self._bytes = 0
        self._seen: dict[int, Any] = {}
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._undo: list[Callable[[], None]] = []
        self._waiting = list(roots)
        while self._waiting:
            value = self._waiting.pop()
            if not isinstance(value, ATOMS) and id(value) not in self._seen:
                self._seen[id(value)] = value
                self._keep(value)

    def restore(self) -> None:
        """Put everything back, each object's identity included."""
        for undo in self._undo:
            undo()
        for live, kept in self._tensors:
            # not the tensor itself: its version counter stays, and graphs that saved it
            live.data.copy_(kept)

    def _keep(self, value: Any) -> None:
        kind = type(value)
        path = f"{kind.__module__}."
        if isinstance(value, Tensor):
            self._keep_tensor(value)
        elif isinstance(value, torch.Generator):
            state = value.get_state()
            self._undo.append(lambda: (value.set_state(state), None)[1])
        elif isinstance(value, random.Random):
            self._undo.append(partial(value.setstate, value.getstate()))
        elif path.startswith("numpy."):
            self._keep_numpy(value)
        elif hasattr(kind, "__next__"):
            raise ValueError(
                f"it draws from an iterator ({kind.__name__}), which cannot be put back"
            )
        elif path.startswith(LEFT_ALONE):
            return
        elif isinstance(value, (list, deque)):
            self._keep_sequence(value)
        elif isinstance(value, dict):
            self._keep_dict(value)
        elif isinstance(value, set):
            self._keep_set(value)
        elif isinstance(value, (tuple, frozenset)):
            self._waiting.extend(value)
        elif isinstance(value, types.MethodType):
            self._waiting += [value.__self__, value.__func__]
        elif isinstance(value, partial):
            self._waiting += [value.func, value.args, value.keywords]
        elif isinstance(value, types.FunctionType):
            self._keep_function(value)
        elif hasattr(value, "__dict__"):
            self._keep_dict(vars(value), isinstance(value, nn.Module))

    def _keep_tensor(self, t: Tensor) -> None:
        whole = t.layout is torch.strided and not t.is_meta and not t.is_inference()
        if not whole or any(s == 0 and n > 1 for n, s in zip(t.shape, t.stride(), strict=True)):
            return
        if not isinstance(t, (nn.Parameter, nn.Buffer)):
            self._bytes += t.numel() * t.element_size()
            if self._bytes > LIMIT:
                raise ValueError(f"its state is larger than {LIMIT >> 30} GiB")
        self._tensors.append((t, t.detach().clone()))

    def _keep_numpy(self, value: Any) -> None:
        if hasattr(value, "bit_generator"):
            generator, state = value.bit_generator, value.bit_generator.state
            self._undo.append(lambda: setattr(generator, "state", state))
        elif hasattr(value, "get_state") and hasattr(value, "set_state"):
            self._undo.append(partial(value.set_state, value.get_state()))
        elif getattr(value, "ndim", 0) and value.flags.writeable:
            self._bytes += value.nbytes
            if self._bytes > LIMIT:
                raise ValueError(f"its state is larger than {LIMIT >> 30} GiB")
            kept = value.copy()
            self._undo.append(lambda: value.__setitem__(..., kept))

    def _keep_sequence(self, value: Any) -> None:
        items = list(value)
        self._waiting.extend(items)

        def undo() -> None:
            value.clear()
            value.extend(items)

        self._undo.append(undo)

    def _keep_set(self, value: set[Any]) -> None:
        items = set(value)

        def undo() -> None:
            value.clear()
            value.update(items)

        self._undo.append(undo)

    def _keep_dict(self, value: dict[Any, Any], of_module: bool = False) -> None:
        items = dict(value)
        self._waiting.extend(
            item for key, item in items.items() if not (of_module and "_hooks" in str(key))
        )

        def undo() -> None:
            same = len(value) == len(items) and all(
                mine is theirs and value[mine] is items[theirs]
                for mine, theirs in zip(value, items, strict=True)
            )
            if not same:
                value.clear()
                value.update(items)

        self._undo.append(undo)

    def _keep_function(self, value: types.FunctionType) -> None:
        self._waiting.append(value.__defaults__)
        for cell in value.__closure__ or ():
            try:
                contents = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
            self._waiting.append(contents)
            self._undo.append(partial(setattr, cell, "cell_contents", contents))
