"""The two judges of a recorded call: its twin and float64, and finite differences."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from cosloss.arguments import check_count, check_flags, check_kind
from cosloss.gradient_check.calls import Gradients, undisturbed
from cosloss.gradient_check.cotangents import Cotangents
from cosloss.gradient_check.discrepancy import compare_calls
from cosloss.gradient_check.finite_differences import TAKEN, check_calls
from cosloss.gradient_check.nests import display_name, tensors_in
from cosloss.gradient_check.point import DEFAULT, FiniteDifferences
from cosloss.gradient_check.report import GradientReport
from cosloss.watch.finding import Finding, NotCheckedError
from cosloss.watch.memory import too_large
from cosloss.watch.recording import Recording

COLLECTIVE = "not checked here: collective; see StepCheckCallback"
NO_GRADIENT = "no gradient came back to it in the step that called it"

# a twin whose value is so far off computes something else
OTHER_VALUE = 1e-2
STATE = "each call changes the function's own state, and the twin, without it, has another value"


class Check(Protocol):
    """A judge of a recorded call; `prefix` begins its tags."""

    prefix: str

    def check(self, recording: Recording, seed: int) -> Finding:
        """Judge the call; raises what stands in the way, which is no verdict."""

    def settings(self, seed: int) -> dict[str, Any]:
        """The options that a replay needs."""


class Discrepancy:
    """The gradients that training got, against the twin's in its precision and in float64."""

    prefix = "gradient_discrepancy"

    def __init__(self) -> None:
        self._laid_out: set[int] = set()  # modules that were tried in other layouts, once each

    def check(self, recording: Recording, seed: int) -> Finding:
        """Judge one call.

        Raises:
            NotCheckedError: no gradient came, or not a finite one.
        """
        loss = recording.loss
        cotangents, analytic = Cotangents(seed), None
        if not loss.gathers:  # of one that does, the local form is called again
            incoming, doubts, recorded = _observed(recording)
            cotangents = Cotangents(seed, incoming, doubts)
            analytic = Gradients({"value": [recording.values[n] for n in incoming], **recorded})
        elif recording.observed() is None:
            raise NotCheckedError(NO_GRADIENT)
        inputs, judged = recording.inputs, recording.judged
        layouts = not loss.gathers and loss.identity not in self._laid_out
        self._laid_out.add(loss.identity)
        report = compare_calls(loss, loss.twin, inputs, judged, cotangents, analytic, layouts)
        scalars = {
            f"{name}/{tag}": number
            for name, found in {"value": report.value, **report.inputs}.items()
            for tag, number in found.scalars().items()
        }
        values = report.value
        if not report and _of_no_value(report):
            raise NotCheckedError("it returned NaN or infinity, and has no gradient in float64")
        apart = not values.analytic_vs_float64 <= max(values.budget, OTHER_VALUE)
        if not report and apart and loss.given_twin is not None and _changes_itself(recording):
            raise NotCheckedError(STATE)
        table = f"{report.markdown()} The analytic gradient is the one that training used."
        return Finding("right" if report else "wrong", report.reason, scalars, table, report)

    def settings(self, seed: int) -> dict[str, Any]:
        """No options."""
        return {}


class Differences:
    """The function's gradient against finite differences in float64.

    Args:
        how: which checks, and how many.
        rows: so many rows of a batch are looked at; None for all.
        surrogate: the twin's gradient in place of finite differences.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: rows is not positive.
    """

    prefix = "gradcheck"

    def __init__(
        self,
        how: FiniteDifferences = DEFAULT,
        rows: int | None = 8,
        surrogate: bool = False,
    ) -> None:
        check_kind("how", how, FiniteDifferences, "a FiniteDifferences(...)")
        check_count("rows", rows, none="all")
        check_flags(surrogate=surrogate)
        self.how = how
        self.rows = rows
        self.surrogate = surrogate

    def check(self, recording: Recording, seed: int) -> Finding:
        """Judge one call.

        Raises:
            ValueError: a surrogate without a twin.
        """
        loss = recording.loss
        if self.surrogate and loss.twin is None:
            raise ValueError("surrogate=True needs a twin, or a module with a reference()")
        report = check_calls(
            loss,
            recording.inputs,
            recording.judged,
            self.how,
            seed,
            loss.twin if self.surrogate else None,
            rows=self.rows,
        )
        scalars = {
            "passed": float(report.passed),
            "max_abs_error": report.max_abs_error,
            "max_rel_error": report.max_rel_error,
            "degenerate": float(report.degenerate),
        }
        if report.skipped:
            return Finding("not checked", report.reason)
        table = "| | |\n|---|---|\n" + "\n".join(f"| {k} | {v:.3g} |" for k, v in scalars.items())
        note = TAKEN + ", ".join(report.constants) if report.constants else ""
        return Finding("right" if report else "wrong", report.reason, scalars, table, note=note)

    def settings(self, seed: int) -> dict[str, Any]:
        """The options of `check_calls`."""
        return {**vars(self.how), "surrogate": self.surrogate, "seed": seed, "rows": self.rows}


def judge(check: Check, recording: Recording, seed: int) -> Finding:
    """The finding of a check; whatever it raises is a check that could not be made."""
    if recording.problem:
        return Finding("not checked", recording.problem)
    try:
        overwritten = recording.overwritten()
        if overwritten:
            return Finding("wrong", overwritten)
        reason = _out_of_reach(recording)
        if reason:
            return Finding("not checked", reason)
        with in_autocast(recording):
            return check.check(recording, seed)
    except Exception as error:  # a kernel's wrapper may raise anything
        lines = str(error).splitlines() or [""]
        said = lines[0] if isinstance(error, NotCheckedError) else ""
        return Finding("not checked", said or f"{type(error).__name__}: {lines[0]}")


def cotangents_of(recording: Recording, seed: int) -> Cotangents:
    """The gradients that came to a call's outputs.

    Raises:
        NotCheckedError: none came, or not a finite one.
    """
    incoming, doubts, _ = _observed(recording)
    return Cotangents(seed, incoming, doubts)


@contextmanager
def in_autocast(recording: Recording) -> Iterator[None]:
    """A scope with autocast as it was in the call."""
    with ExitStack() as stack:
        for kind, dtype in recording.autocast.items():
            stack.enter_context(torch.autocast(kind, dtype=dtype))
        yield


def _out_of_reach(recording: Recording) -> str:
    """Why nothing can be said of a call before it is looked at; empty if something can."""
    if recording.collectives and not recording.loss.gathers:
        return f"{COLLECTIVE} ({recording.collectives})"
    tensors = tensors_in(recording.inputs)
    large = too_large({**tensors, **{f"out.{n}": t for n, t in recording.values.items()}})
    if large:
        return large
    broken = [n for n, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if set(broken) & set(recording.judged):
        return f"{display_name(broken[0])}: it was called with NaN or inf"
    return ""


def _observed(recording: Recording) -> tuple[dict[str, Tensor], ...]:
    found = recording.observed()
    if found is None:
        raise NotCheckedError(NO_GRADIENT)
    incoming, doubts, gradients = found
    if not all(g.isfinite().all() for g in incoming.values()):
        raise NotCheckedError(
            "its incoming gradient is not finite (an overflow of the loss scale?)"
        )
    return incoming, doubts, gradients


def _of_no_value(report: GradientReport) -> bool:
    """Whether neither the value nor the gradient of what failed is finite in float64."""
    return math.isnan(report.value.analytic_vs_float64) and all(
        math.isnan(found.budget) for found in report.failures
    )


def _changes_itself(recording: Recording) -> bool:
    """Whether a call changes what the function keeps; it is made on a copy."""
    with undisturbed():
        return recording.loss.changes_itself(recording.inputs)
