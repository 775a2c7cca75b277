"""The modules under observation: where they are found in a model."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from cosloss.arguments import check_callable, check_kind, described

CUSTOM = "custom"  # every module that runs an autograd Function written in Python
ATTRIBUTES = ("loss", "loss_fn", "criterion")
One = str | nn.Module | type[nn.Module]
Target = One | Sequence[One] | Mapping[str, One] | None


def check_target(target: Any) -> None:
    """Raise TypeError unless this is a target."""
    if target is None or isinstance(target, (str, nn.Module)):
        return
    if isinstance(target, type) and issubclass(target, nn.Module):
        return
    text = "a path, a module, a class of modules, or a list or dict of these"
    check_kind("target", target, (Sequence, Mapping), text)
    for one in target.values() if isinstance(target, Mapping) else target:
        if one is None:
            check_kind("an entry of target", one, (str, nn.Module), text)
        check_target(one)


def check_twin(twin: Any) -> None:
    """Raise TypeError unless this is a function, a dict of functions by name, or None."""
    for one in twin.values() if isinstance(twin, Mapping) else [twin]:
        if one is not None:
            check_callable("twin", one, "a function, or a dict of functions by the loss's name")


class Found:
    """A loss, as a module on which hooks can be put; `release` undoes what finding it changed."""

    def __init__(self, owner: nn.Module, path: str) -> None:
        *parents, self.attribute = path.split(".")
        model = type(owner).__name__
        try:
            for parent in parents:
                owner = getattr(owner, parent)
            loss = getattr(owner, self.attribute)
        except AttributeError as error:
            raise ValueError(
                f"target must be a path in the {model}; got {path!r}, which leads nowhere: {error}"
            ) from None
        self.owner = owner
        self.replaced = not isinstance(loss, nn.Module)
        self.module = loss
        if self.replaced:
            if not callable(loss):
                raise ValueError(
                    f"target must be a module or a function; got {path!r}, which is "
                    f"{described(loss)}"
                )
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
    """The modules to observe, by the name that stands in the tags.

    Args:
        model: the module that contains them.
        target: a path, a pattern of paths ("blocks.*.norm"), a module, a class of modules, a list
            of these, a dict of these by name; None for the attribute `loss`, `loss_fn` or
            `criterion`.

    Raises:
        ValueError: nothing is found, a path leads nowhere, or what is found cannot be called.
    """
    if target is None:
        for name in ATTRIBUTES:
            loss = getattr(model, name, None)
            # a method may run the encoder: only a path that names it asks for that
            if callable(loss) and not inspect.ismethod(loss):
                target = name
                break
        else:
            raise ValueError(_advice(model))
    losses: dict[str, tuple[nn.Module, Found | None]] = {}
    for name, where in _expanded(model, target).items():
        if isinstance(where, nn.Module):
            losses[name] = where, None
        else:
            found = Found(model, where)
            losses[name] = found.module, found
    return losses


def _expanded(model: nn.Module, target: One | Sequence[One] | Mapping[str, One]) -> dict[str, Any]:
    """Modules, and paths to what is none, by name; of a pattern and a class every module."""
    if isinstance(target, nn.Module):
        names = [name for name, module in model.named_modules() if module is target]
        return {names[0] if names and names[0] else type(target).__name__: target}
    if isinstance(target, type):
        kind = target
        return _named(model, lambda name, module: isinstance(module, kind), kind.__name__)
    if isinstance(target, str) and _is_pattern(target):
        pattern = target
        return _named(model, lambda name, _: fnmatchcase(name, pattern), pattern)
    if isinstance(target, str):
        return {target: target}
    found: dict[str, Any] = {}
    if isinstance(target, Mapping):
        for name, one in target.items():
            several = _expanded(model, one)
            alone = len(several) == 1
            found |= {name if alone else f"{name}.{n}": m for n, m in several.items()}
        return found
    for one in target:
        if one == CUSTOM and not hasattr(model, CUSTOM):
            raise ValueError(f'"{CUSTOM}" finds modules by itself: it is no entry of a list')
        found |= _expanded(model, one)
    return found


def _is_pattern(target: str) -> bool:
    return bool(set(target) & set("*?["))


def _advice(model: nn.Module) -> str:
    methods = [name for name in ATTRIBUTES if inspect.ismethod(getattr(model, name, None))]
    said = f"{type(model).__name__} has no loss under the name {', '.join(ATTRIBUTES)}"
    if methods:
        name = methods[0]
        return f'{said}; its `{name}` is a method: target="{name}" watches all that it runs'
    return (
        f'{said}; say where it is: target="path.to.module". A function that is called by its name '
        'is not seen: make it an attribute (self.loss = function), or ask for target="custom"'
    )


def turns(target: Target) -> bool:
    """Whether what is found takes turns: one module of many on each step that is due."""
    if isinstance(target, str):
        return target == CUSTOM or _is_pattern(target)
    return not (target is None or isinstance(target, (nn.Module, Mapping)))


def _named(
    model: nn.Module, matches: Callable[[str, nn.Module], bool], asked: str
) -> dict[str, Any]:
    found: dict[str, Any] = {n: m for n, m in model.named_modules() if matches(n, m)}
    if not found:
        raise ValueError(f"{type(model).__name__} contains no module that is {asked}")
    return found
