"""Checks of arguments: each error is one line that names the argument, what came and what to do."""

import math
import sys
from collections.abc import Collection, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# torch.SymInt and SymFloat are numbers under torch.compile and torch.export
NUMBERS = (Real, torch.SymInt, torch.SymFloat)
LONGEST = 60  # characters of a value that are shown


class TorchArgumentError(ValueError, RuntimeError):
    """What is wrong with a value, where torch's function of the same name raises RuntimeError."""


def described(value: Any) -> str:
    """What an argument is, in a few words: its value if that is short, else its kind and size."""
    if isinstance(value, Tensor):
        where = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}{where}"
    if type(value).__module__ == "numpy" and hasattr(value, "dtype"):
        return f"a numpy {value.dtype} {type(value).__name__} of shape {tuple(value.shape)}"
    if isinstance(value, list | tuple | set | dict):
        return f"a {type(value).__name__} of length {len(value)}"
    if value is None or isinstance(value, bool | torch.dtype | torch.device):
        return repr(value)
    if isinstance(value, str | int | float | complex | Path):
        shown = repr(value)
        return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 3]}..."
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"an object of type {type(value).__name__}"


def is_number(value: Any) -> bool:
    """Whether a value is a number, which a bool is not."""
    kind = type(value)
    return kind is float or (isinstance(value, NUMBERS) and kind is not bool)


def check_number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, above: bool = False
) -> None:
    """Raise unless a value is a finite number from low, or above it, to high.

    Raises:
        TypeError: it is no number, or a bool.
        ValueError: it is out of range.
    """
    if not is_number(value):
        raise TypeError(f"{name} must be a number; got {described(value)}")
    if value <= high and (value > low or (value == low and not above)) and abs(value) != math.inf:
        return
    if value == math.inf or value == -math.inf or value != value:
        asked = "finite"
    elif high < math.inf:
        asked = f"in [{low:g}, {high:g}]"
    elif low == 0:
        asked = "positive" if above else "non-negative"
    else:
        asked = f"at least {low:g}"
    raise ValueError(f"{name} must be {asked}; got {value}")


def check_count(name: str, value: Any, least: int = 1, none: str = "") -> None:
    """Raise unless a value is a whole number of at least `least`, or None where that means `none`.

    Raises:
        TypeError: it is no whole number, or a bool.
        ValueError: it is too small.
    """
    if value is None and none:
        return
    either = f", or None for {none}" if none else ""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number{either}; got {described(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}{either}; got {value}")


def check_choice(name: str, value: Any, choices: Collection[str], hint: str = "") -> None:
    """Raise ValueError unless a value is one of a few words."""
    if not isinstance(value, str) or value not in choices:
        shown = repr(value) if isinstance(value, str) else described(value) + hint
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {shown}")


def check_flags(**flags: Any) -> None:
    """Raise TypeError for an option that is neither True nor False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False; got {described(flag)}")


def check_kind(name: str, value: Any, kinds: Any, text: str) -> None:
    """Raise TypeError unless a value is of one of these types, which `text` names."""
    if not isinstance(value, kinds):
        raise TypeError(f"{name} must be {text}; got {described(value)}")


def check_callable(name: str, value: Any, text: str = "a function or a module") -> None:
    """Raise TypeError unless a value can be called, by something else than a constructor."""
    if not callable(value):
        raise TypeError(f"{name} must be {text}; got {described(value)}")
    if isinstance(value, type) and issubclass(value, torch.nn.Module):
        raise TypeError(f"{name} must be {text}; got {described(value)}: use {value.__name__}()")


def check_tensor(**tensors: Any) -> None:
    """Raise TypeError for anything that is not a tensor of this process."""
    for name, tensor in tensors.items():
        if type(tensor) is Tensor or type(tensor) is torch.nn.Parameter:
            continue
        if not isinstance(tensor, Tensor):
            advice = "" if tensor is None or isinstance(tensor, str | type) else as_tensor(name)
            raise TypeError(f"{name} must be a Tensor; got {described(tensor)}{advice}")
        check_local(tensor, name)


def as_tensor(name: str) -> str:
    """How to make a tensor of what is none."""
    return f": use torch.as_tensor({name})"


def check_local(x: Tensor, name: str) -> None:
    """Raise TypeError for a DTensor: its shards are not the rows that a loss compares."""
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(x, distributed.DTensor):
        raise TypeError(
            f"{name} is a DTensor, and these losses take this process's tensors: pass "
            f"{name}.full_tensor(), or {name}.to_local() with gather_distributed=True"
        )


def check_device(first: str, x: Tensor, second: str, y: Tensor) -> None:
    """Raise unless two tensors are on one device; a single number may be on the CPU.

    Raises:
        TorchArgumentError: they are on two.
    """
    if x.device != y.device and (y.numel() != 1 or y.device.type != "cpu"):
        raise TorchArgumentError(
            f"{first} and {second} must be on one device; got {x.device} and {y.device}: "
            f"use {second}.to({first}.device)"
        )


def check_dtype(name: str, value: Any) -> None:
    """Raise TypeError unless a value is a real floating-point dtype."""
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise TypeError(
            f"{name} must be a floating-point torch.dtype, as torch.float32; got {described(value)}"
        )


def checked_device(name: str, value: Any) -> torch.device:
    """The device of that name.

    Raises:
        TypeError: it is neither a string, nor a number, nor a device.
        ValueError: torch knows no such device.
    """
    check_kind(name, value, (str, int, torch.device), "a device, as 'cpu' or 'cuda:0'")
    if isinstance(value, bool):
        raise TypeError(f"{name} must be a device, as 'cpu' or 'cuda:0'; got {value}")
    try:
        return torch.device(value)
    except RuntimeError:
        raise ValueError(
            f"{name} must be a device, as 'cpu' or 'cuda:0'; got {described(value)}"
        ) from None


def usable_device(name: str, value: Any) -> torch.device:
    """The device of that name, which is there and holds numbers.

    Raises:
        TypeError: it is neither a string, nor a number, nor a device.
        ValueError: torch knows no such device, or this machine has none.
    """
    device = checked_device(name, value)
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        raise ValueError(
            f"{name} must be a device of this machine that computes; got '{device}': use 'cpu'"
        ) from None
    return device


def check_each(name: str, values: Any, kind: Any, text: str) -> None:
    """Raise TypeError unless a value is a sequence of that kind, which `text` names."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a list of {text}; got {described(values)}")
    for value in values:
        if not isinstance(value, kind):
            raise TypeError(f"{name} must hold {text}; got {described(value)} in it")
