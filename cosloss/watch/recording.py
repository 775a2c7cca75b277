"""One call of a module as training makes it: inputs copied, gradients recorded as they come.

Nothing is added to the graph. After the call its nodes, those between the outputs and the inputs,
are found, and hooks on them record what the engine hands on: before the nodes that made the outputs
the incoming gradients, after the nodes that consume an argument or a parameter the gradients on it.
Hooks that only look leave all numbers, and the order in which they are added up, as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from cosloss import modes
from cosloss.gradient_check.copies import copy_tensor, wide_dtype
from cosloss.gradient_check.module import PureLoss
from cosloss.gradient_check.nests import map_tensors, tensors_in
from cosloss.watch.overwriting import Incoming, Watched, holders, watch_argument

Edge = tuple[Any, int]


def differentiable(t: Tensor) -> bool:
    """Whether gradients are asked for on this tensor."""
    return t.requires_grad and (t.is_floating_point() or t.is_complex())


def made_since(first: int, node: Any) -> bool:
    """Whether a node of the graph, a leaf's excepted, has this sequence number or a later one."""
    return node.name() != "torch::autograd::AccumulateGrad" and node._sequence_nr() >= first


@dataclass
class _Backward:
    """What one run of the engine brought, by name."""

    creates_graph: bool
    incoming: dict[str, Tensor] = field(default_factory=dict)
    inner: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)
    unsure: set[str] = field(default_factory=set)

    @property
    def unasked(self) -> set[str]:
        """The inputs whose gradients it did not compute."""
        return self.skipped | (self.unsure - self.gradients.keys())


class Recording:
    """One call: make it before the call, `finish` it after, read it when the step is over.

    Args:
        loss: the module that is called.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Attributes:
        loss: the module frozen as it was before the call.
        inputs: the nest of its inputs, copied before the call; of arguments that are one tensor,
            the copies are one too.
        judged: the names of the inputs whose gradients are recorded.
        autocast: the autocast dtype by device type, where autocast was on.
        values: the outputs, copied.
        collectives: the name of a node that communicates with other processes, if there is one.
        problem: why nothing can be said of this call; empty if something can.
    """

    def __init__(self, loss: PureLoss, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        live = loss.arguments(args, kwargs) | loss.state()
        self.loss = loss.frozen()
        self.problem, self.collectives = loss.live_parts, ""
        self.judged: list[str] = []
        self.values: dict[str, Tensor] = {}
        self._targets: dict[Edge, str] = {}
        self._backwards: dict[int, _Backward] = {}
        self._undo: list[Callable[[], None]] = []
        self._arguments: dict[str, Watched] = {}
        self._shared: dict[int, Incoming] = {}
        self._wrote: list[Tensor] = []
        self._alone = holders()
        copies: dict[int, Tensor] = {}

        def keep(name: str, t: Tensor) -> Tensor:
            if id(t) not in copies:
                copies[id(t)] = copy_tensor(t).requires_grad_(t.requires_grad)
                if differentiable(t) and not name.startswith("twin."):
                    edge = get_gradient_edge(t)
                    self._targets[edge.node, edge.output_nr] = name
                    self.judged.append(name)
                    watched = watch_argument(name, t, copies[id(t)])
                    self._arguments.update({name: watched} if watched else {})
            return copies[id(t)]

        self.inputs = map_tensors(keep, live)
        kinds = {t.device.type for t in tensors_in(live).values()}
        self.autocast = {
            k: torch.get_autocast_dtype(k) for k in kinds if torch.is_autocast_enabled(k)
        }
        self._first = modes.next_node()

    def finish(self, result: Any) -> bool:
        """Put the hooks on the graph of the call; false if no gradient flows through it."""
        outputs: dict[Edge, list[str]] = {}
        for name, t in tensors_in(result).items():
            if differentiable(t):
                edge = get_gradient_edge(t)
                if made_since(self._first, edge.node):  # an argument handed through is no output
                    outputs.setdefault((edge.node, edge.output_nr), []).append(name)
                    self.values[name] = copy_tensor(t)
        consumers, used = self._consumers(outputs)
        # a parameter that the graph does not reach is not this call's
        self.judged = [n for n in self.judged if n in used or not n.startswith("self.")]
        for node, uses in consumers.items():
            self._undo.append(node.register_hook(partial(self._after, uses)).remove)
        for place, ((node, number), names) in enumerate(outputs.items()):
            before = partial(self._before, place, number, names)
            self._undo.append(node.register_prehook(before).remove)
            self._undo.append(node.register_hook(partial(self._look, place)).remove)
        return bool(outputs) and bool(self.judged)

    def release(self) -> None:
        """Take the hooks away and let go of the graph."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        self._targets.clear()
        self._shared.clear()

    def overwritten(self) -> str:
        """Which argument was written over although another node reads it; empty if none was."""
        if any(map(bool, self._wrote)):
            return (
                "its backward writes over its incoming gradient, which another branch, a "
                "residual's, was handed too: the gradient there is wrong"
            )
        return next(filter(None, (w.problem() for w in self._arguments.values())), "")

    def observed(
        self,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]] | None:
        """The outputs' incoming gradients, how far off each may be, and the inputs' gradients.

        None if none came. An output that the call itself goes on to use gets a sum of gradients, of
        which the call's own share is taken away: the sum's rounding stays.

        All are those of the first backward that asked for all of them, or for most.
        """
        # a second backward after one that built a graph may reach into the middle of the call
        runs = list(self._backwards.values())
        runs = runs[:1] if runs and runs[0].creates_graph else runs
        if not runs:
            return None
        run = min(runs, key=lambda run: len(run.unasked))
        self.judged = [n for n in self.judged if n not in run.unasked]
        if not self.judged:
            return None
        tensors = tensors_in(self.inputs)
        gradients = {}
        for name in self.judged:
            found = run.gradients.get(name)
            found = torch.zeros_like(tensors[name]) if found is None else found
            gradients[name] = found.to_dense() if found.is_sparse else found
        incoming = {n: self._external(run, n) for n in self.values}
        doubts = {n: torch.zeros_like(g) for n, g in incoming.items()}
        for name, inner in run.inner.items():
            total = run.incoming.get(name)
            if total is not None:
                doubts[name] = torch.finfo(total.dtype).eps * (total.abs() + inner.abs())
        return incoming, doubts, gradients

    def _external(self, run: _Backward, name: str) -> Tensor:
        """An output's gradient less what the call's own nodes contributed to it."""
        total, inner = run.incoming.get(name), run.inner.get(name)
        if total is None:
            return torch.zeros_like(self.values[name])
        if inner is None:
            return total
        dtype = wide_dtype(total.dtype)
        external = total.to(dtype) - inner.to(dtype)
        rounding = 4 * torch.finfo(total.dtype).eps * float(total.to(dtype).norm())
        return torch.zeros_like(external) if float(external.norm()) <= rounding else external

    def _target(self, edge: Edge) -> str | None:
        """The input that an edge leads to, also through a cast of autocast's, which it caches."""
        if edge in self._targets:
            return self._targets[edge]
        node = edge[0]
        if node is not None and node.name() == "ToCopyBackward0":
            source = node.next_functions[0]
            if source in self._targets and source[0].name() == "torch::autograd::AccumulateGrad":
                return self._targets[source]
        return None

    def _consumers(
        self, outputs: dict[Edge, list[str]]
    ) -> tuple[dict[Any, list[tuple[int, str, str]]], set[str]]:
        """Per node of the call, which of its edges lead where: (edge, kind, name)."""
        consumers: dict[Any, list[tuple[int, str, str]]] = {}
        used: set[str] = set()
        to_visit, visited = [node for node, _ in outputs], set()
        while to_visit:
            node = to_visit.pop()
            if node in visited:
                continue
            visited.add(node)
            if _communicates(node):
                self.collectives = node.name()
            for i, edge in enumerate(node.next_functions):
                if edge[0] is None:
                    continue
                name = self._target(edge)
                if name is not None:
                    consumers.setdefault(node, []).append((i, "gradients", name))
                    used.add(name)
                    continue
                for output in outputs.get(edge, ())[:1]:
                    consumers.setdefault(node, []).append((i, "inner", output))
                if made_since(self._first, edge[0]):
                    to_visit.append(edge[0])
        return consumers, used

    def _run(self) -> _Backward:
        task = modes.current_backward()
        if task not in self._backwards:
            run = _Backward(creates_graph=torch.is_grad_enabled())
            for (node, _), name in self._targets.items():
                goes_on = modes.will_execute(node)
                if not goes_on:
                    (run.unsure if goes_on is None else run.skipped).add(name)
            self._backwards[task] = run
        return self._backwards[task]

    def _before(
        self, place: int, number: int, names: list[str], grads: tuple[Tensor | None, ...]
    ) -> None:
        try:
            others = modes.holders_of(grads, number) > self._alone
            grad = grads[number]
            if grad is not None:
                # one gradient, of whichever name: a tensor returned twice counts once
                copied = self._run().incoming.setdefault(names[0], copy_tensor(grad))
                if others and copied.shape == grad.shape:
                    self._shared[place] = Incoming(grad, copied)
        except Exception as error:  # a check never ends a run
            self.problem = self.problem or f"{type(error).__name__}: {error}"

    def _look(self, place: int, *_: Any) -> None:
        try:
            incoming = self._shared.pop(place, None)
            if incoming is not None:
                self._wrote.append(incoming.changed())
        except Exception as error:
            self.problem = self.problem or f"{type(error).__name__}: {error}"

    def _after(
        self,
        uses: list[tuple[int, str, str]],
        grads: tuple[Tensor | None, ...],
        _: tuple[Tensor | None, ...],
    ) -> None:
        try:
            for i, kind, name in uses:
                grad = grads[i]
                if kind == "gradients" and name in self._arguments:
                    self._arguments[name].look()
                if grad is not None:
                    _add(getattr(self._run(), kind), name, grad)
        except Exception as error:
            self.problem = self.problem or f"{type(error).__name__}: {error}"


def _add(sums: dict[str, Tensor], name: str, grad: Tensor) -> None:
    """A first gradient is kept as it came, strides and all; more are added up in a wider dtype."""
    if name not in sums:
        sums[name] = copy_tensor(grad)
        return
    first, second = (g.to_dense() if g.is_sparse else g for g in (sums[name], grad.detach()))
    wide = torch.float32 if second.dtype in (torch.bfloat16, torch.float16) else None
    wide = wide or wide_dtype(second.dtype)
    sums[name] = first.to(torch.promote_types(first.dtype, wide)) + second


def _communicates(node: Any) -> bool:
    """Whether a node is a collective's, by where it is defined or what it is called."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    function = getattr(type(node), "_forward_cls", type(node))
    name = f"{function.__module__}.{node.name()}".lower()
    words = ("torch.distributed", "gather", "allreduce", "all_reduce", "alltoall", "collective")
    local = ("gatherbackward0", "indexbackward")  # torch.gather
    return any(w in name for w in words) and not any(w in name for w in local)
