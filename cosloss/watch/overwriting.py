"""Arguments and incoming gradients that a call writes over although another node still reads them.

A kernel tells no version counter, so autograd hands the other node what stands there now. To write
into an argument that nobody reads any more, logits of a linear layer, is common and right; so is it
to write into an incoming gradient that no other branch was handed.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from cosloss import modes
from cosloss.gradient_check.nests import display_name
from cosloss.gradient_check.writes import differ

NODES = 16  # how far up the graph a reader is looked for: behind views


class Watched:
    """An argument that nodes before the call read in their backward, and what it held.

    Args:
        name: of the argument.
        live: the argument, as an alias of its own.
        before: its copy, made before the call.
        reader: the node that has saved it.
    """

    def __init__(self, name: str, live: Tensor, before: Tensor, reader: str) -> None:
        self.name, self.live, self.before, self.reader = name, live, before, reader
        self.changed: Tensor | None = None

    def look(self) -> None:
        """Compare, without waiting for a device: after a node of the call went backward."""
        if self.live.untyped_storage().nbytes() == 0:  # freed on purpose
            return
        self.changed = differ(self.live, self.before.detach())

    def problem(self) -> str:
        """What is wrong, if the reader found other numbers than it saved."""
        if self.changed is None or not bool(self.changed):
            return ""
        return (
            f"{display_name(self.name)}: the call, or its backward, writes over this argument, "
            f"which {self.reader} has saved and reads afterwards: the gradient before it is wrong"
        )


class Incoming:
    """An incoming gradient that another branch holds too, a residual's: look after the backward."""

    def __init__(self, grad: Tensor, before: Tensor) -> None:
        self.live, self.before = grad.detach(), before

    def changed(self) -> Tensor:
        """Whether the backward wrote into it, without waiting for a device."""
        return differ(self.live, self.before)


@cache
def holders() -> int:
    """How many hold an incoming gradient, in a hook before its node, that went to no other node."""
    seen: list[int] = []
    # the first call may be within a checkpoint, which counts what is saved there
    with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
        leaf = torch.ones(2, device="cpu", requires_grad=True)
        output = leaf.sin()
        node: Any = output.grad_fn
        undo = node.register_prehook(lambda grads: seen.append(modes.holders_of(grads, 0)))
        torch.autograd.grad((output * output).sum(), leaf)
        undo.remove()
    return seen[0]


def _as_it_is(t: Tensor) -> Tensor:
    return t


def watch_argument(name: str, argument: Tensor, before: Tensor) -> Watched | None:
    """None for an argument that no node behind it has saved."""
    if argument.grad_fn is None or argument.layout is not torch.strided:
        return None
    reader = _reader(argument)
    return None if reader is None else Watched(name, argument.detach(), before, reader)


def _reader(argument: Tensor) -> str | None:
    """The name of a node up the graph that has saved memory of the argument's."""
    storage = argument.untyped_storage().data_ptr()
    nodes, seen = [argument.grad_fn], set[Any]()
    while nodes and len(seen) < NODES:
        node: Any = nodes.pop(0)
        if node is None or node in seen:
            continue
        seen.add(node)
        if any(t.untyped_storage().data_ptr() == storage for t in _saved(node)):
            return node.name()
        nodes += [following for following, _ in node.next_functions]
    return None


def _saved(node: Any) -> list[Tensor]:
    """The tensors that a node keeps; none of those that hooks pack, which may compute them anew."""
    found: list[Tensor] = []
    raw = [getattr(node, n) for n in dir(node) if n.startswith("_raw_saved")]
    for each in raw:
        for saved in each if isinstance(each, (tuple, list)) else (each,):
            try:
                packed = saved.unpack_hook is not None
            except RuntimeError:  # freed
                continue
            if packed or saved.data is None:
                continue
            found.append(saved.data)
    return [t for t in found if isinstance(t, Tensor) and t.layout is torch.strided]
