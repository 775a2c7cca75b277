"""The modules in whose calls an autograd Function ran that somebody wrote in Python."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

from cosloss import modes
from cosloss.gradient_check.nests import tensors_in
from cosloss.watch.hooks import hook_calls
from cosloss.watch.recording import differentiable, made_since


class CustomFunctions:
    """Looks at the graph of each module's call; a Function is the innermost module's.

    torch's own Functions (checkpoints, compiled graphs, synchronised statistics) do not count.
    Modules within a compiled one are not looked into: hooks would break its graph.

    Args:
        model: the module whose parts are looked at.

    Attributes:
        found: the modules by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.found: dict[str, nn.Module] = {}
        self._seen: set[Any] = set()
        self._open: list[tuple[str, int]] = []
        self._undo: list[Callable[[], None]] = []
        compiled: list[str] = []
        for name, module in model.named_modules():
            if any(name.startswith(prefix) for prefix in compiled):
                continue
            if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
                compiled.append(f"{name}." if name else "")
                continue
            known_as = name or type(module).__name__
            self._undo += hook_calls(
                module, partial(self._before, known_as), partial(self._after, known_as)
            )

    def close(self) -> None:
        """Take all hooks away and let go of the graph."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        self.forget()

    def forget(self) -> None:
        """Let go of the graph, at the end of a step."""
        self._seen.clear()
        self._open.clear()

    def _before(self, name: str, module: Any, args: Any, kwargs: Any) -> None:
        self._open.append((name, modes.next_node()))

    def _after(self, name: str, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        first = None
        while self._open and first is None:  # a call that raised left its entry behind
            opened, at = self._open.pop()
            first = at if opened == name else None
        if first is None or not torch.is_grad_enabled():
            return
        outputs = [t for t in tensors_in(result).values() if differentiable(t)]
        to_visit: list[Any] = [get_gradient_edge(t).node for t in outputs]
        visited = set()
        while to_visit:
            node = to_visit.pop()
            if node is None or node in visited or not made_since(first, node):
                continue
            visited.add(node)
            if _is_custom(node) and node not in self._seen:
                self._seen.add(node)
                self.found.setdefault(name, module)
            to_visit += [edge[0] for edge in node.next_functions]


def _is_custom(node: Any) -> bool:
    if not isinstance(node, BackwardCFunction):
        return False
    function = getattr(type(node), "_forward_cls", type(node))
    return function.__module__.partition(".")[0] != "torch"
