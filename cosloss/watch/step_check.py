"""A training step as a whole: the gradient that trains, against the slopes of the step's loss.

After the backward pass every process moves the parameters alike along a direction v, and computes
its loss again on the same batch, with all state as it was. The mean over the processes is
differenced, and compared with <g, v>, g the gradient after the average over processes.
"""

import json
import time
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from cosloss.arguments import (
    check_callable,
    check_choice,
    check_count,
    check_flags,
    check_kind,
    check_number,
)
from cosloss.watch.directions import top_level
from cosloss.watch.finding import Finding, GradientError, NotCheckedError
from cosloss.watch.gradient_watch import ON_FAILURE, judging
from cosloss.watch.one_step import Step, of_ranks
from cosloss.watch.ranks import Ranks


class StepCheck:
    """Check training steps as a whole, in any loop and across processes.

    Sees what no check of one call sees: a collective without a gradient, a dropped micro-batch, a
    detached tower, a wrong hook, a division too many; and parameters that differ between processes
    after the step. Weights, buffers, attributes and generators are put back to the bit.

    Args:
        module: what the step trains and changes; also those wrapped in DistributedDataParallel,
            which the step must then not be called through again.
        every: how many steps from one check to the next; the first step is checked.
        on_failure: "warn", "raise" a `GradientError`, or "stop": `should_stop` becomes true.
        directions: so many top-level modules get a direction of their own on each check, in turn;
            None for all.
        log: called as log(tag, value, step).

    Attributes:
        steps_seen: how many steps there were.
        checks_run: how many checks came to a verdict.
        checks_failed: how many of these said wrong.
        checks_skipped: how many could not be made.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> model = nn.Linear(4, 1)
        >>> check = StepCheck(model, every=500)
        >>> loss = check.observe(lambda: model(torch.ones(2, 4)).square().mean())
        >>> loss.backward()
        >>> check.after_backward()
        >>> check.after_step()  # when the optimizer is done
        >>> check.summary()
        'step_check: 1 check, 0 failed, 0 not checked'
    """

    prefix = "step_check"

    def __init__(
        self,
        module: nn.Module,
        every: int = 500,
        on_failure: str = "warn",
        directions: int | None = 1,
        log: Callable[[str, float, int], None] | None = None,
    ) -> None:
        check_kind("module", module, nn.Module, "what the step trains, a torch.nn.Module")
        check_count("every", every)
        check_choice("on_failure", on_failure, ON_FAILURE)
        check_count("directions", directions, 0, none="all")
        if log is not None:
            check_callable("log", log, "a function of a tag, a value and a step")
        self.module = module
        self.every = every
        self.on_failure = on_failure
        self.directions = directions
        self.log = log
        self.trained: set[int] | None = None  # ids of the optimizer's parameters, where known
        self.should_stop = False
        self.finding: Finding | None = None
        self.steps_seen = self.checks_run = self.checks_failed = self.checks_skipped = 0
        self._turn = 0
        self._step: Step | None = None
        self._averaged = True
        self._warned: set[str] = set()

    def observe(self, compute: Callable[[], Any], again: Callable[[], Any] | None = None) -> Any:
        """Call compute(), and remember how to call it again if this step is due.

        Args:
            compute: returns the step's loss, or a dict with one.
            again: what is called in its place later, if not the same.
        """
        check_callable("compute", compute, "a function that returns the step's loss")
        if again is not None:
            check_callable("again", again, "a function that returns the step's loss")
        self.finding = self._step = None
        if self.due():
            self._step = Step(self.module, again or compute, self.trained)
        self.steps_seen += 1
        result = compute()
        if self._step is not None:
            self._step.computed(result)
        return result

    def due(self) -> bool:
        """Whether the next step is checked."""
        return self.steps_seen % self.every == 0

    def before_backward(self) -> None:
        """Note the gradients that are there, where the backward pass is not of the loss itself."""
        if self._step is not None:
            self._step.note_gradients()

    def after_backward(self, scale: float = 1.0, averaged: bool = True) -> None:
        """Judge the step, before anything is done to the gradients.

        Args:
            scale: what the loss was multiplied by before its backward pass: the gradient scaler's
                factor, and 1 / n where n batches are accumulated.
            averaged: whether all processes have the same gradient by now; False while gradients
                are accumulated without synchronisation.
        """
        check_number("scale", scale, 0, above=True)
        check_flags(averaged=averaged)
        step, self._step = self._step, None
        if step is None:
            return
        start = time.perf_counter()
        with judging():
            try:
                self.finding = step.judged(Ranks(), scale, averaged, self.steps_seen, self.chosen)
            except NotCheckedError as error:
                self.finding = Finding("not checked", str(error))
        self._seconds = time.perf_counter() - start

    def skip(self, reason: str) -> None:
        """This step is not checked."""
        self._step = None
        self.finding, self._seconds = Finding("not checked", reason), 0.0

    def after_step(self) -> None:
        """Compare the parameters of the processes, count, log, and act on a failure."""
        if self.finish():
            self.act()

    def finish(self) -> bool:
        """All of `after_step` but acting; whether the step was found wrong."""
        found = self.finding
        if found is None:
            return False
        ranks = Ranks()
        if ranks.count > 1 and self.parameters:
            groups = top_level(self.module, list(self.parameters))
            differ = ranks.who_differs(
                {g: [self.parameters[n] for n in names] for g, names in groups.items()}
            )
            if differ:
                text = f"after the step {of_ranks('parameters', differ)}"
                reason = f"{found.reason}; {text}" if found.verdict == "wrong" else text
                found = self.finding = Finding("wrong", reason, found.scalars)
        self._count(found)
        return found.verdict == "wrong"

    def act(self) -> None:
        """Warn, raise or stop."""
        assert self.finding is not None
        text = self.message()
        if self.on_failure == "raise":
            raise GradientError(text)
        warnings.warn(text, stacklevel=3)
        self.should_stop = self.should_stop or self.on_failure == "stop"

    def message(self) -> str:
        """The text of a failure."""
        reason = "" if self.finding is None else self.finding.reason.replace("; ", "\n  ")
        return f"{self.prefix}: the step is wrong in batch {self.steps_seen - 1}\n  {reason}"

    def summary(self) -> str:
        """One line: checks, failures, and what was not checked and why."""
        text = f"{self.prefix}: {self.checks_run} check{'s' * (self.checks_run != 1)}, "
        text += f"{self.checks_failed} failed, {self.checks_skipped} not checked"
        return f"{text} ({'; '.join(sorted(self._warned))})" if self._warned else text

    def report(self) -> str:
        """The counts, and the last finding, as JSON."""
        counts = {n: getattr(self, n) for n in ("checks_run", "checks_failed", "checks_skipped")}
        last = self.finding and {"verdict": self.finding.verdict, "reason": self.finding.reason}
        return json.dumps({**counts, "steps_seen": self.steps_seen, "last": last})

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters that are trained, by name."""
        return {
            n: p
            for n, p in self.module.named_parameters()
            if p.requires_grad and (self.trained is None or id(p) in self.trained)
        }

    def chosen(self, groups: list[str]) -> list[str]:
        """The top-level modules whose turn it is."""
        count = len(groups) if self.directions is None else min(self.directions, len(groups))
        names = [groups[(self._turn + i) % len(groups)] for i in range(count)]
        self._turn += count
        return names

    def _count(self, found: Finding) -> None:
        scalars = found.scalars
        if found.verdict == "not checked":
            self.checks_skipped += 1
            scalars["skipped"] = 1.0
            if found.reason not in self._warned:
                self._warned.add(found.reason)
                warnings.warn(f"{self.prefix}: not checked: {found.reason}", stacklevel=4)
        else:
            self.checks_run += 1
            self.checks_failed += found.verdict == "wrong"
            scalars["passed"] = float(found.passed)
        scalars["seconds"] = self._seconds
        if found.verdict == "wrong":
            found.table = self.message()
        if self.log is not None:
            for tag, value in scalars.items():
                self.log(f"{self.prefix}/{tag}", value, self.steps_seen - 1)
