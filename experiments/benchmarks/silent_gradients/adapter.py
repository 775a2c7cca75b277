"""The one place that knows cosloss's callbacks: how they are put on a case, and their verdict."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback

from cosloss.callbacks import GradcheckCallback, GradientDiscrepancyCallback

TARGET = "loss"
UNABLE = re.compile("could not run|cannot run in float64")


@dataclass(frozen=True)
class Verdict:
    """What the callbacks said over one run: "right", "wrong", "could not run" or "not checked"."""

    word: str
    checks: int
    failures: int
    skipped: int
    reasons: tuple[str, ...] = ()


class Collected:
    """Both callbacks at their default settings, on every batch."""

    def __init__(self, twin: Callable[..., Any] | None = None) -> None:
        self.callbacks: list[Callback] = [
            GradcheckCallback(every_n_batches=1, target=TARGET),
            GradientDiscrepancyCallback(every_n_batches=1, target=TARGET, twin=twin),
        ]

    def verdict(self, warned: list[str]) -> Verdict:
        """Of a finished run, with the warnings that it gave.

        A check that could not run is counted as a failure by today's callbacks; only the text of
        the warning tells it from a gradient that was found wrong.
        """
        checks = sum(getattr(c, "checks_run", 0) for c in self.callbacks)
        failures = sum(getattr(c, "checks_failed", 0) for c in self.callbacks)
        skipped = sum(getattr(c, "checks_skipped", 0) for c in self.callbacks)
        lines = [line for text in warned for line in text.splitlines() if line.strip()]
        reasons = tuple(dict.fromkeys(line.strip()[:160] for line in lines if _is_reason(line)))
        unable = bool(reasons) and all(UNABLE.search(reason) for reason in reasons)
        found = "could not run" if unable else "wrong"
        word = found if failures else "right" if checks > skipped else "not checked"
        return Verdict(word, checks, failures, skipped, reasons[:3])


def _is_reason(line: str) -> bool:
    # the lines around it name the batch, the file to replay, and what stopped a file
    return not line.startswith(("gradcheck:", "gradient_discrepancy:", "  reproduce", "  it could"))
