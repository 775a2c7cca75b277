"""The modules under observation: where they are found in a model."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

CUSTOM = "custom"  # every module that runs an autograd Function written in Python
ATTRIBUTES = ("loss", "loss_fn", "criterion")
One = str | nn.Module
Target = One | type[nn.Module] | Sequence[One] | Mapping[str, One] | None


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
    """The modules to observe, by the name that stands in the tags.

    Args:
        model: the module that contains them.
        target: a path, a pattern of paths ("blocks.*.norm"), a module, a class of modules, a list
            of paths and modules, a dict of these by name; None for the attribute `loss`, `loss_fn`
            or `criterion`.

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
            raise ValueError(_advice(model))
    if isinstance(target, nn.Module):
        target = {type(target).__name__: target}
    if isinstance(target, type):
        kind = target
        target = _named(model, lambda name, module: isinstance(module, kind), kind.__name__)
    elif isinstance(target, str) and set(target) & set("*?["):
        pattern = target
        target = _named(model, lambda name, _: fnmatchcase(name, pattern), pattern)
    elif isinstance(target, str):
        target = {target: target}
    elif not isinstance(target, Mapping):
        target = {t if isinstance(t, str) else f"{type(t).__name__}": t for t in target}
    losses: dict[str, tuple[nn.Module, Found | None]] = {}
    for name, where in target.items():
        if isinstance(where, nn.Module):
            losses[name] = where, None
        else:
            found = Found(model, where)
            losses[name] = found.module, found
    return losses


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
        return target == CUSTOM or bool(set(target) & set("*?["))
    return not (target is None or isinstance(target, (nn.Module, Mapping)))


def _named(
    model: nn.Module, matches: Callable[[str, nn.Module], bool], asked: str
) -> dict[str, str | nn.Module]:
    found: dict[str, str | nn.Module] = {n: m for n, m in model.named_modules() if matches(n, m)}
    if not found:
        raise ValueError(f"{type(model).__name__} contains no module that is {asked}")
    return found
