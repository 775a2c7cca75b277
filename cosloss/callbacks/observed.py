"""The loss under observation: where it is found, and what it was called with."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cosloss.gradient_check.calls import (
    backward,
    map_tensors,
    sample_rows,
    tensors_in,
    undisturbed,
)
from cosloss.gradient_check.module import PureLoss

ATTRIBUTES = ("loss", "loss_fn", "criterion")
Target = str | nn.Module | Mapping[str, str | nn.Module] | None


class Found:
    """A loss, as a module on which hooks can be put; `release` undoes what finding it changed."""

    def __init__(self, owner: nn.Module, path: str) -> None:
        *parents, self.attribute = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        self.owner = owner
        loss = getattr(owner, self.attribute)
        self.replaced = not isinstance(loss, nn.Module)
        self.module = loss
        if self.replaced:
            if not callable(loss):
                raise ValueError(f"{path} is a {type(loss).__name__}, not a module or a function")
            # a function takes no hooks: a module that calls it stands in its place meanwhile
            self.own = vars(owner).get(self.attribute)
            self.module = nn.Module()
            self.module.forward = loss
            object.__setattr__(owner, self.attribute, self.module)

    def release(self) -> None:
        if self.replaced:
            object.__delattr__(self.owner, self.attribute)
            if self.own is not None:
                setattr(self.owner, self.attribute, self.own)


def find_losses(model: nn.Module, target: Target) -> dict[str, tuple[nn.Module, Found | None]]:
    """The losses to observe, by the name that stands in the tags.

    Raises:
        ValueError: nothing is found, or what is found cannot be called.
        AttributeError: a path leads nowhere.
    """
    if target is None:
        for name in ATTRIBUTES:
            loss = getattr(model, name, None)
            # a method may run the encoder: only a path that names it asks for that
            if callable(loss) and not inspect.ismethod(loss):
                target = name
                break
        else:
            raise ValueError(
                f"{type(model).__name__} has no loss under the name {', '.join(ATTRIBUTES)}; "
                'say where it is: target="path.to.module"'
            )
    if isinstance(target, nn.Module):
        target = {type(target).__name__: target}
    if isinstance(target, str):
        target = {target: target}
    losses: dict[str, tuple[nn.Module, Found | None]] = {}
    for name, where in target.items():
        if isinstance(where, nn.Module):
            losses[name] = where, None
        else:
            found = Found(model, where)
            losses[name] = found.module, found
    return losses


@dataclass
class Observation:
    """One call of the loss.

    `inputs` are copies: a sample of the rows of the arguments and, if `complete`, the module's
    parameters at that time. `analytic` has the gradients of the live graph, if they were taken.
    """

    inputs: dict[str, Any]
    autocast: dict[str, torch.dtype]
    versions: dict[str, int]
    whole: bool
    complete: bool
    analytic: dict[str, Tensor] | None = None


def observe(
    loss: PureLoss, arguments: dict[str, Any], rows: int | None, offset: int, complete: bool
) -> Observation | None:
    """Copies of at most `rows` rows of a call's arguments; None if none requires a gradient."""
    tensors = tensors_in(arguments)
    wanted = judged(tensors)
    if not wanted:
        return None
    sampled = sample_rows(arguments, wanted, rows, offset)
    whole = sampled is arguments
    if complete:
        sampled = sampled | loss.state()

    def keep(name: str, t: Tensor) -> Tensor:
        return t.detach().clone().requires_grad_(tensors[name].requires_grad)

    tensors |= tensors_in(sampled) if complete else {}
    kinds = {t.device.type for t in tensors.values()}
    return Observation(
        inputs=map_tensors(keep, sampled),
        autocast={k: torch.get_autocast_dtype(k) for k in kinds if torch.is_autocast_enabled(k)},
        versions={name: tensors[name]._version for name in wanted},
        whole=whole,
        complete=complete,
    )


def judged(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the floating-point tensors that require a gradient."""
    return [n for n, t in tensors.items() if t.requires_grad and t.is_floating_point()]


def add_live_gradient(
    observation: Observation, loss: PureLoss, arguments: dict[str, Any], result: Any
) -> None:
    """Take the gradients of the graph that training is about to use, and leave it for training.

    Not where they would be another function's: of a loss that gathers from other processes, on
    inputs it changed in place, or that have hooks on their gradients. A compiled graph may refuse
    to be used twice. In these cases the loss is called again on the copies.
    """
    live = tensors_in(arguments | loss.state())
    leaves = {name: live[name] for name in judged(live)}
    unchanged = all(live[n]._version == version for n, version in observation.versions.items())
    hooked = any(t._backward_hooks for t in leaves.values())
    if not observation.whole or loss.gathers or not unchanged or hooked:
        return
    try:
        with undisturbed(arguments):
            observation.analytic = backward(result, leaves, keep=True)
    except RuntimeError:
        return
