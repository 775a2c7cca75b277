"""Gradient checks in any training loop: which calls are recorded, when they are judged, counts."""

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cosloss.arguments import (
    check_callable,
    check_choice,
    check_count,
    check_flags,
    check_kind,
    described,
)
from cosloss.gradient_check.module import PureLoss
from cosloss.replay import save_failure
from cosloss.watch.checks import Check, Discrepancy, judge
from cosloss.watch.custom import CustomFunctions
from cosloss.watch.finding import Finding, GradientError, worst
from cosloss.watch.hooks import hook_calls
from cosloss.watch.parts import wrong_part
from cosloss.watch.recording import Recording
from cosloss.watch.targets import (
    CUSTOM,
    Found,
    Target,
    check_target,
    check_twin,
    find_losses,
    turns,
)

ON_FAILURE = ("warn", "raise", "stop")
CALLS_PER_STEP = 4
FILES_PER_MODULE = 3
VERDICTS = {"right": 1.0, "not checked": 0.0, "wrong": -1.0}
Twin = Callable[..., Any] | Mapping[str, Callable[..., Any]] | None
# tag's first part, module's name, scalars, finding, the call, the step
Report = Callable[[str, dict[str, float], Finding, Recording], None]

_judging = False  # a check calls modules, perhaps observed ones


@contextmanager
def judging() -> Iterator[None]:
    """A scope whose calls no watch records: a check's own."""
    global _judging
    before, _judging = _judging, True
    try:
        yield
    finally:
        _judging = before


class GradientWatch:
    """Watch the gradients of modules while they train, in any loop.

    Observes, and never repeats: on a step that is due, hooks record what training itself hands to
    the module and back, and a reference is computed from copies when the step is over.

    Args:
        module: the model.
        target: what to watch in it: a path ("head.loss"), a pattern ("blocks.*.norm"), a class, a
            module, a list or a dict of these; "custom" for every module that runs an autograd
            Function written in Python, found in the first step; None for its `loss`, `loss_fn` or
            `criterion`. Of patterns, classes, lists and "custom" one module is looked at on each
            step that is due, in turn.
        every: how many steps from one check to the next; the first step is checked.
        on_failure: "warn", "raise" a `GradientError`, or "stop": `should_stop` becomes true.
        twin: the same function in plain autograd operations (or a dict of them by name); None for
            the module's `reference()`, or, where it has none, the module itself in float64.
        check: the judge; None for `Discrepancy()`.
        log: called as log(tag, value, step).
        directory: the folder of files from which failures are reproduced; None for no files.

    Attributes:
        steps_seen: how many steps there were.
        checks_run: how many checks came to a verdict.
        checks_failed: how many of these said wrong.
        checks_skipped: how many could not be made.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: an argument is out of range, or nothing is found.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
        >>> watch = GradientWatch(model, target="1", every=10)
        >>> with watch.step():
        ...     model(torch.ones(2, 4)).sum().backward()
        >>> watch.summary()
        'gradient_discrepancy: 1 check, 0 failed, 0 not checked'
    """

    def __init__(
        self,
        module: nn.Module,
        target: Target = None,
        every: int = 50,
        on_failure: str = "warn",
        twin: Twin = None,
        check: Check | None = None,
        log: Callable[[str, float, int], None] | None = None,
        directory: str | Path | None = None,
    ) -> None:
        check_kind("module", module, nn.Module, "the model, a torch.nn.Module")
        check_target(target)
        check_count("every", every)
        check_choice("on_failure", on_failure, ON_FAILURE)
        check_twin(twin)
        if check is not None and not (hasattr(check, "check") and hasattr(check, "prefix")):
            raise TypeError(f"check must be Discrepancy() or a like judge; got {described(check)}")
        if isinstance(check, type):
            raise TypeError(
                f"check must be a judge; got {described(check)}: use {check.__name__}()"
            )
        if log is not None:
            check_callable("log", log, "a function of a tag, a value and a step")
        if directory is not None:
            check_kind("directory", directory, (str, Path), "the path of a folder")
        self.every = every
        self.on_failure = on_failure
        self.check: Check = check or Discrepancy()
        self.directory = None if directory is None else Path(directory)
        self.rank = ""
        self.should_stop = self.was_due = False
        self.steps_seen = self.checks_run = self.checks_failed = self.checks_skipped = 0
        self.reports: list[Report] = [] if log is None else [partial(_log, log, self)]
        self._due = True
        self._listening = False
        self._pending: set[str] = set()
        self._turn = 0
        self._open: dict[str, Recording] = {}
        self._recordings: dict[str, list[Recording]] = {}
        self._outcomes: list[dict[str, Any]] = []
        self._messages: list[str] = []
        self._notes: set[tuple[str, str]] = set()
        self._warned: set[tuple[str, str]] = set()
        self._saved: dict[str, int] = {}
        self._counts: dict[str, dict[str, float]] = {}
        self._undo: list[Callable[[], None]] = []
        self._losses: dict[str, PureLoss] = {}
        self._turns = turns(target)
        self._twin = twin
        self._search = CustomFunctions(module) if target == CUSTOM else None
        if self._search is None:
            for name, (found, stand_in) in find_losses(module, target).items():
                self._observe(name, found, stand_in)

    @contextmanager
    def step(self) -> Iterator[None]:
        """The scope of one training step, from the forward pass to the end of backward."""
        self.start()
        try:
            yield
        except BaseException:
            self._drop()
            raise
        self.act(self.finish())

    def start(self, due: bool = False) -> None:
        """Begin a step; `due` checks whatever the count says."""
        check_flags(due=due)
        self._drop()
        self._due = due or self._due or self.steps_seen % self.every == 0
        if self._due and self._losses:
            names = list(self._losses)
            self._pending = {names[self._turn % len(names)]} if self._turns else set(names)
            self._turn += 1
        self._listening = True

    def finish(self) -> list[str]:
        """End a step and judge its calls; returns one text per failure."""
        self._listening = False
        recordings, self._recordings = self._recordings, {}
        with judging():
            for name, calls in recordings.items():
                for call in calls:
                    call.release()
                self._judge(name, calls)
        self.was_due, self._due = self._due, False
        self._conclude_search()
        self.steps_seen += 1
        messages, self._messages = self._messages, []
        return messages

    def act(self, messages: list[str]) -> None:
        """Warn, raise or stop, if there are messages."""
        if not messages:
            return
        if self.on_failure == "raise":
            raise GradientError("\n".join(messages))
        warnings.warn("\n".join(messages), stacklevel=3)
        self.should_stop = self.should_stop or self.on_failure == "stop"

    def close(self) -> None:
        """Take all hooks away."""
        self._drop()
        if self._search is not None:
            self._search.close()
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def warn_if_nothing_was_checked(self, before: int = 0) -> None:
        """Warn where no check was due to a call; `before` counts the checks of earlier runs."""
        if self.checks_run + self.checks_failed + self.checks_skipped == before:
            names = ", ".join(self._losses)
            said = f"{names} was never called with an input that requires a gradient"
            if self._search is not None:
                said = "no module ran an autograd Function written in Python; what training_step "
                said += "calls by name belongs to none: make it an attribute and name that"
            warnings.warn(f"{self.check.prefix} checked nothing: {said}", stacklevel=2)

    def summary(self) -> str:
        """One line: checks, failures, and what was not checked and why."""
        text = f"{self.check.prefix}: {self.checks_run} check{'s' * (self.checks_run != 1)}, "
        text += f"{self.checks_failed} failed, {self.checks_skipped} not checked"
        reasons = sorted({f"{n}: {r}" for n, r in self._warned | self._notes})
        return f"{text} ({'; '.join(reasons)})" if reasons else text

    def report(self) -> str:
        """All counts, and every check with its verdict and numbers, as JSON."""
        counts = {n: getattr(self, n) for n in ("checks_run", "checks_failed", "checks_skipped")}
        return json.dumps({**counts, "steps_seen": self.steps_seen, "checks": self._outcomes})

    def __getstate__(self) -> dict[str, Any]:
        idle: dict[str, Any] = {"_open": {}, "_recordings": {}, "_undo": [], "_losses": {}}
        return vars(self) | idle | {"_listening": False, "_search": None}

    def _observe(self, name: str, found: nn.Module, stand_in: Found | None = None) -> None:
        twin = self._twin.get(name) if isinstance(self._twin, Mapping) else self._twin
        self._losses[name] = PureLoss(found, twin)
        if stand_in is not None:
            self._undo.append(stand_in.release)
        self._undo += hook_calls(found, partial(self._before, name), partial(self._after, name))

    def _conclude_search(self) -> None:
        """Observe the modules of custom Functions, from the first step on that ran any."""
        if self._search is None:
            return
        found = dict(self._search.found)
        self._search.forget()
        if found:
            self._search.close()
            self._search = None
            for name, module in found.items():
                self._observe(name, module)
            self._due = True

    def _drop(self) -> None:
        for calls in (*self._recordings.values(), list(self._open.values())):
            for call in calls:
                call.release()
        self._recordings, self._open, self._listening = {}, {}, False

    def _before(
        self, name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._open.pop(name, None)
        calls = self._recordings.get(name, ())
        if not self._listens(name) or len(calls) == CALLS_PER_STEP:
            return
        loss = self._losses[name]
        try:
            recording = Recording(loss, args, kwargs)
        except Exception as error:  # a check never ends a run
            self._skip(name, f"{type(error).__name__}: {error}")
            return
        if recording.judged:
            self._open[name] = recording

    def _after(
        self, name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        recording = self._open.pop(name, None)
        if recording is None:
            return
        try:
            if recording.finish(result):
                self._recordings.setdefault(name, []).append(recording)
        except Exception as error:
            recording.release()
            self._skip(name, f"{type(error).__name__}: {error}")

    def _listens(self, name: str) -> bool:
        return (
            self._listening and name in self._pending and not _judging and torch.is_grad_enabled()
        )

    def _judge(self, name: str, calls: list[Recording]) -> None:
        start = time.perf_counter()
        findings = [judge(self.check, call, self.steps_seen) for call in calls]
        order = {"wrong": 0, "right": 1, "not checked": 2}
        # a call that checkpointing made again got no gradient, which says nothing beside others
        shown = min(range(len(calls)), key=lambda i: order[findings[i].verdict])
        found, call = findings[shown], calls[shown]
        self._pending.discard(name)
        if found.verdict == "not checked":
            self._skip(name, found.reason)
            scalars = {}
        else:
            self.checks_run += 1
            scalars = worst([f.scalars for f in findings])
        if found.verdict == "wrong":
            self.checks_failed += 1
            self._messages.append(self._failure(name, found, call))
        if found.note:
            self._notes.add((name, found.note))
        counts = self._counts.setdefault(name, {"run": 0.0, "failed": 0.0, "skipped": 0.0})
        counts["run"] += found.verdict != "not checked"
        counts["failed"] += found.verdict == "wrong"
        counts["skipped"] += found.verdict == "not checked"
        scalars |= {**counts, "verdict": VERDICTS[found.verdict]}
        scalars["seconds"] = time.perf_counter() - start
        outcome = {"module": name, "step": self.steps_seen, "verdict": found.verdict}
        self._outcomes.append({**outcome, "reason": found.reason, "numbers": scalars})
        for report in self.reports:
            report(name, scalars, found, call)

    def _skip(self, name: str, reason: str) -> None:
        self.checks_skipped += 1
        self._pending.discard(name)
        if (name, reason) not in self._warned:
            self._warned.add((name, reason))
            warnings.warn(f"{self.check.prefix}: `{name}` was not checked: {reason}", stacklevel=2)

    def _failure(self, name: str, finding: Finding, call: Recording) -> str:
        """The three lines that say what is wrong; the inputs are saved for the first few."""
        batch = self.steps_seen
        said = f"{self.check.prefix}: the gradient of `{name}` ({call.loss.title})"
        lines = [
            f"{said} is wrong in batch {batch}",
            finding.reason,
        ]
        failures = finding.report.failures if finding.report else []
        if failures and failures[0].worst:
            lines.append(f"worst entries of {failures[0].name}: {failures[0].worst}")
        self._saved[name] = self._saved.get(name, 0) + 1
        part = wrong_part(call, batch) if self._saved[name] == 1 else ""
        lines += [part] if part else []
        if self.directory is not None and self._saved[name] <= FILES_PER_MODULE:
            path = self.directory / f"{self.check.prefix}-{name}-batch{batch:06d}{self.rank}.pt"
            overwrites = {"overwrites": True} if call.overwritten() else {}
            check = {"kind": self.check.prefix, **self.check.settings(batch), **overwrites}
            try:
                save_failure(path, call.loss, call.inputs, call.autocast, finding.reason, check)
                lines.append(f"reproduce it: python -m cosloss.verify --replay {path}")
            except Exception as error:
                lines.append(f"it could not be saved to be reproduced: {error}")
        finding.table = "\n\n".join([*lines, finding.table])
        return "\n  ".join(lines)


def _log(
    log: Callable[[str, float, int], None],
    watch: GradientWatch,
    name: str,
    scalars: dict[str, float],
    finding: Finding,
    call: Recording,
) -> None:
    for tag, value in scalars.items():
        log(f"{watch.check.prefix}/{name}/{tag}", value, watch.steps_seen)
