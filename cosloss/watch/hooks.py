"""Hooks on a module's calls."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn


class Hook:
    """A forward hook that a copied or pickled module does not take along."""

    disabled: ClassVar[bool] = False  # for compilers, which leave its calls as they are

    def __init__(self, call: Callable[..., None] | None = None) -> None:
        self.call = call

    def __call__(self, *args: Any) -> None:
        if self.call is not None:
            self.call(*args)

    def __reduce__(self) -> Any:
        return Hook, ()


def hook_calls(
    module: nn.Module, before: Callable[..., None], after: Callable[..., None]
) -> list[Callable[[], None]]:
    """Call before(module, args, kwargs) and after(module, args, kwargs, result) around each call.

    Returns what takes the hooks away.
    """
    if not Hook.disabled:  # here, since it imports the compiler, which takes a second
        Hook.__call__ = torch.compiler.disable(Hook.__call__)  # type: ignore[method-assign]
        Hook.disabled = True
    # nearest to the forward itself: what other hooks change is the call's, or is not
    first = module.register_forward_pre_hook(Hook(before), with_kwargs=True)
    last = module.register_forward_hook(Hook(after), with_kwargs=True, prepend=True)
    return [first.remove, last.remove]
