"""Hooks on a module's calls."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Hook:
    """A forward hook that a copied or pickled module does not take along."""

    def __init__(self, call: Callable[..., None] | None = None) -> None:
        # here, since it imports the compiler, which takes a second
        self.call = None if call is None else torch.compiler.disable(call)

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
    # nearest to the forward itself: what other hooks change is the call's, or is not
    first = module.register_forward_pre_hook(Hook(before), with_kwargs=True)
    last = module.register_forward_hook(Hook(after), with_kwargs=True, prepend=True)
    return [first.remove, last.remove]
