"""What a check found about one call, and the worst over several calls."""

import math
from dataclasses import dataclass, field
from typing import Literal

from cosloss.gradient_check.report import GradientReport

Verdict = Literal["right", "wrong", "not checked"]


class GradientError(RuntimeError):
    """A gradient check failed, and it was told to raise."""


class NotCheckedError(Exception):
    """A check cannot be made; the message says why."""


@dataclass
class Finding:
    """Verdict, reason in one line, scalars by the end of their tags, and a Markdown table.

    `note` is on what condition a gradient is right, if on any.
    """

    verdict: Verdict
    reason: str
    scalars: dict[str, float] = field(default_factory=dict)
    table: str = ""
    report: GradientReport | None = field(default=None, repr=False)
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the gradient was checked and found right."""
        return self.verdict == "right"


def worst(scalars: list[dict[str, float]]) -> dict[str, float]:
    """The worst of each scalar over several calls; NaN if any is NaN.

    Example:
        >>> worst([{"passed": 1.0, "seconds": 2.0}, {"passed": 0.0, "seconds": 1.0}])
        {'passed': 0.0, 'seconds': 2.0}
    """
    found: dict[str, float] = {}
    for tag in {tag: None for each in scalars for tag in each}:
        numbers = [each[tag] for each in scalars if tag in each]
        pick = min if tag == "passed" else max
        found[tag] = math.nan if any(map(math.isnan, numbers)) else pick(numbers)
    return found
