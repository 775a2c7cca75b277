"""One training step that is checked: its state, its loss along lines, and the verdict."""

import weakref
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cosloss.gradient_check.generators import Generators
from cosloss.gradient_check.slopes import DOUBTS, Slope, confirmed, measure
from cosloss.gradient_check.snapshots import Snapshot
from cosloss.watch.directions import Direction, Directions, as_real, dot, top_level
from cosloss.watch.finding import Finding, NotCheckedError
from cosloss.watch.ranks import Ranks
from cosloss.watch.stops import Stops

REPEATS = 0.01  # of the loss: a step that differs by more is random beyond replay
NEAR_FACTOR = 0.02


class Step:
    """One step: how it was before, its loss, and how to compute that again."""

    def __init__(
        self, module: nn.Module, again: Callable[[], Any], trained: set[int] | None
    ) -> None:
        self.module = module
        self.again = again
        self.problem = ""
        self.loss = float("nan")
        self.with_grad = self.began = False
        self.rounding = 0.0
        self.parameters = {
            n: p
            for n, p in module.named_parameters()
            if p.requires_grad and (trained is None or id(p) in trained)
        }
        self.old: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        try:
            if any(map(is_lazy, module.parameters())):
                raise NotCheckedError("its parameters have their shapes from this step on")
            # what 16 bits round shows along random directions, where the gradient's share is small
            self.coarse = _in_16_bits(self.parameters.values())
            self.before = Snapshot(module, again)
            self.generators = Generators()
        except Exception as error:  # a check never ends a run
            self.problem = str(error).splitlines()[0] if str(error) else type(error).__name__

    def computed(self, result: Any) -> None:
        """Note the loss that training computed."""
        try:
            loss = _loss(result)
            self.loss = _number(loss)
            # of the loss itself, a half of the spacing of its dtype's numbers
            self.rounding = torch.finfo(loss.dtype).eps / 2 if loss.element_size() == 2 else 0.0
        except Exception as error:
            self.problem = self.problem or str(error)
            return
        self.note_gradients()
        here = weakref.ref(self)  # a loss that is kept for a log keeps no state of the module

        def begins(grad: Tensor) -> None:
            step = here()
            if step is not None and not step.began:
                step.began = True
                step.note_gradients()

        if loss.requires_grad:
            loss.register_hook(begins)

    def note_gradients(self) -> None:
        """Keep the gradients of earlier batches, before the backward pass adds to them.

        A loop may clear them before it computes the loss or after that, and go back from another.
        """
        if not self.problem:
            grads = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
            self.old = {n: g.detach().clone() for n, g in grads.items()}

    def judged(
        self,
        ranks: Ranks,
        scale: float,
        averaged: bool,
        seed: int,
        choose: Callable[[list[str]], list[str]],
    ) -> Finding:
        """The verdict, with everything put back afterwards.

        Args:
            ranks: the processes that make the step together.
            scale: what the loss was multiplied by before its backward pass.
            averaged: whether all processes have the same gradient.
            seed: of random directions; the same on all processes.
            choose: of the names of modules those that get a direction of their own.

        Raises:
            NotCheckedError: there is no verdict; on all processes alike.
        """
        after: list[Snapshot | Generators] = []
        self.ranks = ranks
        self.seed, self.choose = seed, choose

        def prepare() -> list[float]:
            if self.problem:
                raise NotCheckedError(self.problem)
            if not self.parameters:
                raise NotCheckedError("no parameter requires a gradient")
            self.values = {n: p.detach().clone() for n, p in self.parameters.items()}
            self.gradients = {n: self._gradient(n, p, scale) for n, p in self.parameters.items()}
            after.extend((Snapshot(self.module, self.again), Generators()))
            return [self.loss, all(g.isfinite().all() for g in self.gradients.values())]

        try:
            told = ranks.agree(prepare)
            self.recorded = sum(row[0] for row in told) / ranks.count
            if not abs(self.recorded) < float("inf"):
                raise NotCheckedError("the loss is not finite")
            if not all(row[1] for row in told):
                if scale > 1:
                    raise NotCheckedError("the gradient is not finite (the loss scale overflows?)")
                return Finding("wrong", "the loss is finite, and the gradient is not")
            return self._judge(averaged)
        finally:
            for state in after:
                state.restore()

    def _gradient(self, name: str, parameter: Tensor, scale: float) -> Tensor:
        """What this batch's backward pass added."""
        kind = torch.promote_types(parameter.dtype, torch.float32)
        grad = parameter.grad
        if grad is None:
            return torch.zeros_like(parameter, dtype=kind)
        grad = (grad.to_dense() if grad.is_sparse else grad).detach().to(kind)
        old = self.old.get(name)
        if old is not None:
            grad = grad - (old.to_dense() if old.is_sparse else old).to(kind)
        return grad / scale

    def _judge(self, averaged: bool) -> Finding:
        self.groups = top_level(self.module, list(self.parameters))
        if averaged:
            # with what earlier batches left, which was not averaged until now
            totals = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
            differ = self.ranks.who_differs(
                {g: [totals[n] for n in names if n in totals] for g, names in self.groups.items()}
            )
            if differ:
                return Finding("wrong", of_ranks("gradients", differ))
        names = list(self.parameters)
        mean = self.ranks.mean([self.gradients[n] for n in names])
        self.point = Directions(
            self.values, dict(zip(names, mean, strict=True)), self.recorded, self.seed
        )
        self._repeat()
        slopes = [(d, self._measure(d)) for d in self._standard()]
        wrong = [
            d for d, slope in slopes if slope.wrong and confirmed(slope, partial(self._measure, d))
        ]
        scalars = _scalars(slopes)
        if not wrong:
            slope = slopes[0][1]
            if slope.right:
                return Finding("right", f"the slopes agree to {slope.error:.1e}", scalars)
            why = "beside a kink of the loss" if slope.kinked else "the loss is too noisy"
            share = slope.doubt / slope.scale if slope.scale else float("inf")
            raise NotCheckedError(f"{why}: its slope is known to {100 * share:.2g} % only")
        return self._explained(wrong, dict(scalars))

    def _repeat(self) -> None:
        """Compute the loss again where it was: without a graph, or with one if that differs.

        Raises:
            NotCheckedError: the step is not the same a second time.
        """
        problem = ""
        for self.with_grad in (False, True):
            try:
                self.zero = self._at(None, 0.0)[0]
            except NotCheckedError as error:
                problem = str(error)
                continue
            problem = ""
            if self.zero == self.recorded:
                break
        if problem:
            raise NotCheckedError(problem)
        # a rounding is a bound, and a doubt is multiplied
        rounding = self.rounding * abs(self.zero) / DOUBTS
        self.noise = max(abs(self.zero - self.recorded), rounding)
        if not abs(self.zero - self.recorded) <= REPEATS * max(abs(self.zero), abs(self.recorded)):
            raise NotCheckedError(
                "the step is not the same a second time, with generators and state put back: its "
                f"loss was {self.recorded:.6g} and is {self.zero:.6g}"
            )

    def _standard(self) -> Iterable[Direction]:
        names = list(self.parameters)
        reached = self.point.reached(names)
        if reached:
            yield self.point.along_gradient("", names)
        unreached = [n for n in names if n not in reached]
        # twice: by chance a random direction is a level one
        for turn in (1, 2) if unreached else ():
            yield self.point.random("", unreached, turn)
        if reached and not self.coarse:
            yield self.point.random("", names)
        groups = [g for g, members in self.groups.items() if set(members) & set(reached)]
        if len(groups) > 1:
            for group in self.choose(groups):
                yield self.point.along_gradient(group, self.groups[group], weighted=True)

    def _measure(self, direction: Direction, steps: float = 1.0, stops: Any = None) -> Slope:
        def line(t: float) -> tuple[float, float]:
            return self._at(direction, t, stops)

        first = steps * direction.first
        scale, agrees = direction.scale, direction.agrees
        return measure(line, self.zero, first, scale, self.noise, agrees, self.coarse)

    def _at(
        self, direction: Direction | None, t: float, held: Stops | None = None
    ) -> tuple[float, float]:
        """The mean loss at t along a direction, and the change that the gradients predict."""
        scope: AbstractContextManager[None] = nullcontext()

        def compute() -> list[float]:
            nonlocal scope
            self.before.restore()
            change = 0.0
            for name, vector in (direction.vectors if direction else {}).items():
                value, live = self.values[name], self.parameters[name].data
                live.copy_(value + t * vector)
                moved = as_real(live).to(torch.float64) - as_real(value).to(torch.float64)
                change += dot(moved, as_real(self.gradients[name]))
            torch.clear_autocast_cache()  # of weights that have moved
            self.generators.restore()
            if held is not None:
                scope = held.held() if held.values is not None else held.recorded()
            with torch.set_grad_enabled(self.with_grad or held is not None), scope:
                result = self.again()
            return [_number(result), change]

        rows = self.ranks.agree(compute)
        losses, changes = zip(*rows, strict=True)
        return sum(losses) / len(rows), sum(changes) / len(rows)

    def _explained(self, wrong: list[Direction], scalars: dict[str, float]) -> Finding:
        """Wrong, and where; or not checked, where stopped gradients are all of it."""
        stops = Stops()
        self._at(None, 0.0, stops)
        # a process alone may have stopped something: all go on alike
        any_stops = any(r[0] for r in self.ranks.agree(lambda: [len(stops.places)]))
        blocks = any_stops and self._agree_held(wrong, stops, only_blocks=True)
        if blocks or (any_stops and self._agree_held(wrong, stops) and not self._cut_off(wrong)):
            places = ", ".join(stops.places[:3])
            raise NotCheckedError(
                f"the step stops gradients at {places}: with what is detached there held fast "
                "its slopes agree"
            )
        lines, factors = [], []
        for group, members in self.groups.items():
            said, factor = self._share(group, members)
            if said:
                lines.append(said)
            if factor is not None:
                factors.append(factor)
                scalars[f"{group}/factor"] = factor
        if factors and len(factors) == len(self.groups) and _alike(factors):
            every = " in every module" if len(factors) > 1 else ""
            lines = [f"it is {self._factor(factors[0])} times the right one{every}"]
        if any_stops:
            places = ", ".join(stops.places[:3]) or "the lines around a collective"
            lines.append(
                f"gradients that the step stops (at {places}) are a possible cause, and not all"
            )
        head = "the gradient of the step is not the slope of its loss"
        if self.ranks.count > 1:
            head += f", the mean over {self.ranks.count} processes"
        return Finding("wrong", "; ".join([head, *lines]), scalars)

    def _agree_held(self, wrong: list[Direction], stops: Stops, only_blocks: bool = False) -> bool:
        stops.only_blocks = only_blocks
        return all(not self._measure(d, stops=stops).wrong for d in wrong)

    def _cut_off(self, wrong: list[Direction]) -> bool:
        """Whether parameters that no gradient reaches are among what is wrong: detached."""
        return any(not self.point.reached(list(d.vectors)) for d in wrong)

    def _share(self, group: str, members: list[str]) -> tuple[str, float | None]:
        """What is wrong with a module, in words, and the factor of its gradient."""
        reached = self.point.reached(members)
        if reached:
            slope = self._measure(self.point.along_gradient(group, members, weighted=True))
            if slope.wrong:
                return f"`{group}`: {self._factor(slope.factor)} times the right one", slope.factor
            if self.coarse:
                return "", 1.0
        slope = self._measure(self.point.random(group, members))
        if not slope.wrong:
            return "", 1.0 if reached else None
        if not reached:
            said = f"`{group}`: no gradient reaches it, and the loss depends on it: detached?"
            return said, 0.0
        return f"`{group}`: a part of its gradient is missing or wrong", None

    def _factor(self, factor: float) -> str:
        count = self.ranks.count
        known = {1 / count: "1/world_size", float(count): "world_size"} if count > 1 else {}
        for value, name in known.items():
            if abs(factor / value - 1) < NEAR_FACTOR:
                return f"{value:.3g} = {name}"
        return f"{factor:.3g}"


def _alike(factors: list[float]) -> bool:
    return max(factors) - min(factors) <= NEAR_FACTOR * abs(factors[0])


def _scalars(slopes: list[tuple[Direction, Slope]]) -> dict[str, float]:
    first = slopes[0][1]
    found = {"factor": first.factor, "error": max(s.error for _, s in slopes)}
    found["resolution"] = first.doubt / first.scale if first.scale else float("nan")
    for direction, slope in slopes:
        if direction.name:
            found[f"{direction.name}/factor"] = slope.factor
    return found


def of_ranks(what: str, differ: dict[str, list[int]]) -> str:
    """Which modules' tensors differ, and on which processes."""
    parts = [
        f"`{name}` (rank {', '.join(map(str, others))} from the others)"
        for name, others in differ.items()
    ]
    return f"the {what} differ between processes: {', '.join(parts)}"


def _in_16_bits(parameters: Collection[Tensor]) -> bool:
    """Whether the step computes in such a dtype."""
    kinds = {p.device.type for p in parameters}
    return any(map(torch.is_autocast_enabled, kinds)) or any(
        p.element_size() == 2 for p in parameters
    )


def _loss(result: Any) -> Tensor:
    loss = result.get("loss") if isinstance(result, dict) else result
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise NotCheckedError("the step returns no loss")
    return loss


def _number(result: Any) -> float:
    return float(_loss(result).detach().double())
