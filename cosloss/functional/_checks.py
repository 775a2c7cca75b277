"""Argument checks and the reduction: each says what was received and what to do."""

import sys
from numbers import Real

import torch
from torch import Tensor

from cosloss.modes import PLAIN, readable, recording

# torch.SymInt and SymFloat are numbers under torch.compile and torch.export
NUMBERS = (Real, torch.SymInt, torch.SymFloat)
REDUCTIONS = ("none", "mean", "sum")


def check_reduction(reduction: str) -> None:
    """Raise ValueError unless reduction is one of REDUCTIONS."""
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        received = repr(reduction) if isinstance(reduction, (str, Real)) else type(reduction)
        raise ValueError(
            f"reduction must be one of {', '.join(REDUCTIONS)}; got {received} "
            "(the options after it are given by name)"
        )


def check_margin(margin: float) -> None:
    """Raise unless margin is a number in [-1, 1]."""
    if not isinstance(margin, NUMBERS):
        raise TypeError(f"margin must be a number; got {type(margin).__name__}")
    if not -1 <= margin <= 1:
        raise ValueError(f"margin must be in [-1, 1]; got {margin}")


def check_negative_weight(negative_weight: float) -> None:
    """Raise unless negative_weight is a positive number."""
    if not isinstance(negative_weight, NUMBERS):
        raise TypeError(f"negative_weight must be a number; got {type(negative_weight).__name__}")
    if not negative_weight > 0:
        raise ValueError(f"negative_weight must be positive; got {negative_weight}")


def check_eps(eps: float) -> None:
    """Raise RuntimeError, as torch does, unless eps is a number of at least 0."""
    if not isinstance(eps, NUMBERS):
        raise TypeError(f"eps must be a number; got {type(eps).__name__}")
    if not eps >= 0:
        raise RuntimeError(f"eps must be non-negative; got {eps}")


def check_flags(**flags: bool) -> None:
    """Raise TypeError for an option that is neither True nor False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False; got {flag!r}")


def check_tensor(**tensors: Tensor) -> None:
    """Raise TypeError for anything that is not a tensor of this process."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor; got {type(tensor).__name__}")
        if type(tensor) not in PLAIN:
            check_local(tensor, name)


def check_local(x: Tensor, name: str) -> None:
    """Raise TypeError for a DTensor: its shards are not the rows that a loss compares."""
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(x, distributed.DTensor):
        raise TypeError(
            f"{name} is a DTensor, and these losses take this process's tensors: pass "
            f"{name}.full_tensor(), or {name}.to_local() with gather_distributed=True"
        )


def refuse_tracing() -> None:
    """Raise RuntimeError under torch.jit.trace, which would record this batch's size for good."""
    if recording():
        raise RuntimeError(
            "torch.jit.trace would fix an in-batch loss to this batch size: use torch.export "
            "or torch.compile"
        )


def check_floating(**tensors: Tensor) -> None:
    """Raise TypeError for anything that is not a real floating-point tensor."""
    check_tensor(**tensors)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must have a real floating-point dtype; got {tensor.dtype}")


def check_rows(**tensors: Tensor) -> None:
    """Raise ValueError for embeddings (N, 0), which have no direction."""
    for name, tensor in tensors.items():
        if tensor.shape[-1] == 0:
            raise ValueError(
                f"{name} must have at least one column; got shape {tuple(tensor.shape)}"
            )


def check_pairs(**pair: Tensor) -> None:
    """Raise unless the two tensors are floating point, of one shape (N, D) with N, D >= 1."""
    check_floating(**pair)
    (name1, x1), (name2, x2) = pair.items()
    if x1.ndim != 2 or x1.shape != x2.shape:
        raise ValueError(
            f"{name1} and {name2} must both have shape (N, D), row i of each of the same item; "
            f"got {tuple(x1.shape)} and {tuple(x2.shape)}"
        )
    if x1.shape[0] == 0:
        raise ValueError(f"{name1} and {name2} must have at least one row; got an empty batch")
    check_rows(**pair)


def check_views(z1: Tensor, z2: Tensor) -> None:
    """Raise unless z1 and z2 are two floating-point views of the same N >= 1 items, (N, D)."""
    check_pairs(z1=z1, z2=z2)


def check_number(**numbers: float | Tensor) -> None:
    """Raise unless these are numbers, or tensors of one number."""
    for name, number in numbers.items():
        if isinstance(number, Tensor):
            check_local(number, name)
            if number.shape not in ((), (1,)):
                raise ValueError(
                    f"{name} must be a number or a 0-d tensor; got shape {tuple(number.shape)} "
                    "(of one number, shape (1,) is taken too)"
                )
        elif not isinstance(number, NUMBERS):
            raise TypeError(f"{name} must be a number or a 0-d tensor; got {type(number).__name__}")


def check_temperature(temperature: float | Tensor) -> None:
    """Raise unless temperature is positive: a number, or a tensor of one number.

    A tensor's sign is looked at only where that does not wait for a device.
    """
    check_number(temperature=temperature)
    if isinstance(temperature, Tensor):
        if not readable(temperature):
            return
        temperature = float(temperature.detach())
    if not temperature > 0:
        raise ValueError(f"temperature must be positive; got {temperature}")


def check_groups(ignore: Tensor, n: int) -> None:
    """Raise unless ignore holds one group id per item."""
    check_tensor(ignore=ignore)
    if ignore.shape != (n,) or ignore.is_floating_point():
        raise ValueError(
            f"ignore must hold one integer group id per item, shape ({n},); "
            f"got {ignore.dtype} of shape {tuple(ignore.shape)}"
        )


def check_weight(weight: Tensor, n: int) -> None:
    """Raise unless weight holds one number per item."""
    check_tensor(weight=weight)
    if weight.shape != (n,):
        raise ValueError(
            f"weight must hold one number per item, shape ({n},); got {tuple(weight.shape)}"
        )


def as_number(number: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """A temperature or a bias for embeddings of that dtype: a tensor becomes 0-d and not narrower.

    A narrow parameter is rounded where it is stored, and nowhere after.
    """
    if not isinstance(number, Tensor):
        return number
    wide = torch.promote_types(number.dtype, torch.promote_types(dtype, torch.float32))
    return number.reshape(()).to(wide)


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """The loss itself ("none"), its sum, or its mean."""
    if reduction == "mean":
        return loss.mean()
    if reduction == "sum":
        return loss.sum()
    return loss
