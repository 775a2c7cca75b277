"""What a check found about one call of a loss."""

import math
from dataclasses import dataclass, field

from cosloss.gradient_check.report import GradientReport


class GradientError(RuntimeError):
    """A gradient check failed, and its callback was told to raise."""


@dataclass
class Finding:
    """Verdict, reason in one line, scalars by the end of their tags, and a Markdown table."""

    passed: bool
    reason: str
    scalars: dict[str, float]
    table: str
    report: GradientReport | None = field(default=None, repr=False)


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
