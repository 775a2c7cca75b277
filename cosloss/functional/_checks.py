"""The losses' checks of their arguments, and the reduction."""

import math
from typing import NoReturn

import torch
from torch import Tensor

from cosloss.arguments import (
    check_choice,
    check_device,
    check_local,
    check_number,
    check_tensor,
    described,
    is_number,
)
from cosloss.distributed import Gather
from cosloss.modes import readable, recording

REDUCTIONS = ("none", "mean", "sum")
SCALAR = "a number or a 0-d tensor"


def check_reduction(reduction: str) -> None:
    """Raise ValueError unless reduction is one of REDUCTIONS."""
    check_choice("reduction", reduction, REDUCTIONS, " (the options after it are given by name)")


def check_gather(gather_distributed: Gather) -> None:
    """Raise TypeError unless gather_distributed is True, False or "ring"."""
    given = gather_distributed
    if not isinstance(given, bool) and not (isinstance(given, str) and given == "ring"):
        raise TypeError(f"gather_distributed must be True, False or 'ring'; got {described(given)}")


def check_margin(margin: float) -> None:
    """Raise unless margin is a number in [-1, 1]."""
    check_number("margin", margin, -1, 1)


def check_negative_weight(negative_weight: float) -> None:
    """Raise unless negative_weight is a positive number."""
    check_number("negative_weight", negative_weight, 0, above=True)


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
            advice = "" if tensor.is_complex() else f": use {name}.float()"
            raise TypeError(
                f"{name} must have a real floating-point dtype; got {described(tensor)}{advice}"
            )


def check_rows(**tensors: Tensor) -> None:
    """Raise ValueError for embeddings (N, 0), which have no direction."""
    for name, tensor in tensors.items():
        if tensor.shape[-1] == 0:
            raise ValueError(
                f"{name} must have at least one column; got shape {tuple(tensor.shape)}"
            )


def check_pairs(**pair: Tensor) -> None:
    """Raise unless the two tensors are floating point, of one shape (N, D) with N, D >= 1."""
    (name1, x1), (name2, x2) = pair.items()
    if isinstance(x2, Tensor) and x2.ndim == 1 and isinstance(x1, Tensor) and x1.ndim > 1:
        _refuse_labels(name2, x2)
    check_floating(**pair)
    if x1.ndim != 2 or x1.shape != x2.shape:
        raise ValueError(
            f"{name1} and {name2} must both have shape (N, D), row i of each of the same item; "
            f"got {tuple(x1.shape)} and {tuple(x2.shape)}{_to_split(name1, x1)}"
        )
    if x1.shape[0] == 0:
        raise ValueError(f"{name1} and {name2} must have at least one row; got an empty batch")
    if x1.device != x2.device:
        check_device(name1, x1, name2, x2)
    check_rows(**pair)


def _refuse_labels(name: str, labels: Tensor) -> NoReturn:
    raise (ValueError if labels.is_floating_point() else TypeError)(
        f"{name} must have shape (N, D), like the tensor before it; got {described(labels)}: "
        "labels? SupConLoss and sup_con_loss take them"
    )


def _to_split(name: str, x: Tensor) -> str:
    """What to do with views that are stacked, (N, V, D)."""
    if x.ndim != 3:
        return ""
    return f": of views (N, V, D) give {name}[:, 0] and {name}[:, 1]"


def check_views(z1: Tensor, z2: Tensor) -> None:
    """Raise unless z1 and z2 are two floating-point views of the same N >= 1 items, (N, D)."""
    check_pairs(z1=z1, z2=z2)


def check_scalar(name: str, number: float | Tensor, like: Tensor | None = None) -> None:
    """Raise unless this is a finite number, or a tensor of one on the device of `like`."""
    if not isinstance(number, Tensor):
        if not is_number(number):
            raise TypeError(f"{name} must be {SCALAR}; got {described(number)}")
        if number == math.inf or number == -math.inf or number != number:
            raise ValueError(f"{name} must be finite; got {number}")
        return
    check_local(number, name)
    if number.shape not in ((), (1,)):
        raise ValueError(
            f"{name} must be {SCALAR}; got shape {tuple(number.shape)} "
            "(of one number, shape (1,) is taken too)"
        )
    if number.dtype == torch.bool or number.is_complex():
        raise TypeError(f"{name} must be {SCALAR}; got {described(number)}")
    if like is not None:
        check_device("the embeddings", like, name, number)


def check_temperature(temperature: float | Tensor, like: Tensor | None = None) -> None:
    """Raise unless temperature is positive: a number, or a tensor of one on the device of `like`.

    A tensor's sign is looked at only where that does not wait for a device.
    """
    check_scalar("temperature", temperature, like)
    if isinstance(temperature, Tensor):
        if not readable(temperature):
            return
        temperature = float(temperature.detach())
    if not temperature > 0:
        raise ValueError(f"temperature must be positive; got {temperature}")


def check_groups(ignore: Tensor, z: Tensor) -> None:
    """Raise unless ignore holds one group id per item."""
    check_tensor(ignore=ignore)
    n = z.shape[0]
    if ignore.shape != (n,) or ignore.is_floating_point() or ignore.is_complex():
        raise ValueError(
            f"ignore must hold one integer group id per item, shape ({n},); "
            f"got {described(ignore)}{to_ids('ignore', ignore)}"
        )
    check_device("the embeddings", z, "ignore", ignore)


def to_ids(name: str, ids: Tensor) -> str:
    """What to do with ids that are a column, one-hot or floating point."""
    if ids.ndim == 2:
        return f": use {name}.squeeze(1)" if ids.shape[1] == 1 else f": use {name}.argmax(1)"
    return f": use {name}.long()" if ids.ndim == 1 and ids.is_floating_point() else ""


def check_weight(weight: Tensor, z: Tensor) -> None:
    """Raise unless weight holds one number per item."""
    check_tensor(weight=weight)
    if weight.shape != z.shape[:1]:
        raise ValueError(
            f"weight must hold one number per item, shape ({z.shape[0]},); got {described(weight)}"
        )
    check_real("weight", weight)
    check_device("the embeddings", z, "weight", weight)


def check_real(name: str, x: Tensor) -> None:
    """Raise TypeError for a complex tensor."""
    if x.is_complex():
        raise TypeError(f"{name} must be real; got {described(x)}")


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
