"""Argument checks and the reduction: each says what was received and what to do."""

from numbers import Real

import torch
from torch import Tensor

from cosloss.ops.transformed import transformed

REDUCTIONS = ("none", "mean", "sum")


def check_reduction(reduction: str) -> None:
    """Raise ValueError unless reduction is one of REDUCTIONS."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")


def check_floating(**tensors: Tensor) -> None:
    """Raise TypeError for anything that is not a real floating-point tensor."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor; got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must have a real floating-point dtype; got {tensor.dtype}")


def check_pairs(**pair: Tensor) -> None:
    """Raise unless the two tensors are floating point, of one shape (N, D) with N >= 1."""
    check_floating(**pair)
    (name1, x1), (name2, x2) = pair.items()
    if x1.ndim != 2 or x1.shape != x2.shape:
        raise ValueError(
            f"{name1} and {name2} must both have shape (N, D), row i of each of the same item; "
            f"got {tuple(x1.shape)} and {tuple(x2.shape)}"
        )
    if x1.shape[0] == 0:
        raise ValueError(f"{name1} and {name2} must have at least one row; got an empty batch")


def check_views(z1: Tensor, z2: Tensor) -> None:
    """Raise unless z1 and z2 are two floating-point views of the same N >= 1 items, (N, D)."""
    check_pairs(z1=z1, z2=z2)


def check_number(**numbers: float | Tensor) -> None:
    """Raise unless these are numbers or 0-d tensors."""
    for name, number in numbers.items():
        if isinstance(number, Tensor):
            if number.ndim != 0:
                raise ValueError(
                    f"{name} must be a number or a 0-d tensor; got shape {tuple(number.shape)}"
                )
        elif not isinstance(number, (Real, torch.SymInt, torch.SymFloat)):
            raise TypeError(f"{name} must be a number or a 0-d tensor; got {type(number).__name__}")


def check_temperature(temperature: float | Tensor) -> None:
    """Raise unless temperature is a positive number or a 0-d tensor.

    A tensor's sign is looked at only where that does not wait for a device.
    """
    check_number(temperature=temperature)
    if isinstance(temperature, Tensor) and (
        temperature.device.type != "cpu" or transformed(temperature)
    ):
        return
    if not temperature > 0:
        raise ValueError(f"temperature must be positive; got {float(temperature)}")


def check_groups(ignore: Tensor | None, n: int) -> None:
    """Raise unless ignore is None or holds one group id per item."""
    if ignore is not None and (ignore.shape != (n,) or ignore.is_floating_point()):
        raise ValueError(
            f"ignore must hold one integer group id per item, shape ({n},); "
            f"got {ignore.dtype} of shape {tuple(ignore.shape)}"
        )


def check_weight(weight: Tensor | None, n: int) -> None:
    """Raise unless weight is None or holds one number per item."""
    if weight is not None and weight.shape != (n,):
        raise ValueError(
            f"weight must hold one number per item, shape ({n},); got {tuple(weight.shape)}"
        )


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """The loss itself ("none"), its sum, or its mean."""
    if reduction == "mean":
        return loss.mean()
    if reduction == "sum":
        return loss.sum()
    return loss


def joined(z1: Tensor, z2: Tensor) -> Tensor:
    """Both views as one (2N, D) tensor of their promoted dtype."""
    dtype = torch.promote_types(z1.dtype, z2.dtype)
    return torch.cat([z1.to(dtype), z2.to(dtype)])
