"""The one place that knows cosloss's callbacks: how they are put on a case, and their verdict."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cosloss.callbacks import (
    GradcheckCallback,
    GradientDiscrepancyCallback,
    StepCheckCallback,
)

TARGET = "loss"
# of the callbacks' warnings
STARTS = ("gradcheck:", "gradient_discrepancy:", "step_check:")
FIRST = "is wrong in batch 0"


@dataclass(frozen=True)
class Verdict:
    """The callbacks' word over one run: "right", "wrong" or "not checked".

    `first` is whether they said wrong of the first batch, on which all are due.
    """

    word: str
    checks: int
    failures: int
    skipped: int
    first: bool
    reasons: tuple[str, ...] = ()


class Collected:
    """All callbacks at their default settings, on every batch."""

    def __init__(self, twin: Callable[..., Any] | None = None) -> None:
        self.callbacks = [
            GradcheckCallback(every_n_batches=1, target=TARGET),
            GradientDiscrepancyCallback(every_n_batches=1, target=TARGET, twin=twin),
            StepCheckCallback(every_n_batches=1),
        ]

    def verdict(self, warned: list[str]) -> Verdict:
        """Of a finished run, with the warnings that it gave."""
        checks = sum(c.checks_run for c in self.callbacks)
        failures = sum(c.checks_failed for c in self.callbacks)
        skipped = sum(c.checks_skipped for c in self.callbacks)
        lines = [line for text in warned for line in text.splitlines() if line.strip()]
        reasons = tuple(dict.fromkeys(line.strip()[:160] for line in lines if _is_reason(line)))
        word = "wrong" if failures else "right" if checks else "not checked"
        first = any(line.startswith(STARTS) and line.endswith(FIRST) for line in lines)
        return Verdict(word, checks, failures, skipped, first, reasons[:3])


def _is_reason(line: str) -> bool:
    # the lines around it name the batch, the file to replay, and what stopped a file
    return not line.startswith((*STARTS, "  reproduce", "  it could"))
