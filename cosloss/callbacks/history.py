"""What the checks of one loss have found so far, for whoever looks at all of them together."""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cosloss.watch.finding import Finding

MOST = 1000  # points per input: a curve has no more pixels, and checkpoints stay small


class Point(NamedTuple):
    """One gradient at one check; errors against float64, over the gradient's norm."""

    step: int
    analytic: float
    autograd: float
    budget: float
    right: bool


@dataclass
class History:
    """Counts of verdicts, when one first was wrong, and the errors of each input's gradient."""

    right: int = 0
    wrong: int = 0
    skipped: int = 0
    first_wrong: int | None = None
    wrong_elsewhere: bool = False  # on another process, whose errors are not seen here
    points: dict[str, list[Point]] = field(default_factory=dict)

    def add(self, finding: Finding, step: int) -> None:
        """Count a finding; keep the errors of its report, if it has one."""
        self.right += finding.verdict == "right"
        self.wrong += finding.verdict == "wrong"
        self.skipped += finding.verdict == "not checked"
        if finding.verdict == "wrong" and self.first_wrong is None:
            self.first_wrong = step
        if finding.report is None:
            return
        for name, d in finding.report.inputs.items():
            errors = d.analytic_vs_float64, d.autograd_vs_float64, d.budget
            points = self.points.setdefault(name, [])
            points.append(Point(step, *errors, d.passed))
            if len(points) > MOST:
                pairs = zip(points[::2], points[1::2], strict=False)
                points[:] = [*(max(pair, key=_badness) for pair in pairs), points[-1]]

    def is_worth_drawing(self, finding: Finding) -> bool:
        """Whether this finding, the last one, is the 1st, 2nd, 4th, 8th ... or wrong and so."""
        numbers = [self.right + self.wrong + self.skipped]
        if finding.verdict == "wrong":
            numbers.append(self.wrong)
        return any(n & (n - 1) == 0 for n in numbers)

    def __str__(self) -> str:
        """The verdict in words.

        Example:
            >>> str(History(right=22)), str(History(right=7, wrong=1, first_wrong=350))
            ('22 checks, all right', '8 checks, 1 WRONG, first at step 350')
        """
        run = self.right + self.wrong
        if run == 0:
            return "NOT CHECKED" if self.skipped else "no check yet"
        words = f"{run} check{'s' * (run > 1)}, "
        if self.wrong:
            words += f"{self.wrong} WRONG, first at step {self.first_wrong}"
        else:
            words += "all right" if run > 1 else "right"
        if self.wrong_elsewhere:
            words += ", WRONG on another process"
        return words + (f", {self.skipped} not made" if self.skipped else "")

    def state(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        points = {name: list(map(tuple, each)) for name, each in self.points.items()}
        return {**vars(self), "points": points}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "History":
        """The history whose `state` it was."""
        points = {name: [Point(*p) for p in each] for name, each in state["points"].items()}
        return cls(**{**state, "points": points})


def _badness(point: Point) -> tuple[bool, float]:
    error = point.analytic / point.budget if point.budget else point.analytic
    return not point.right, math.inf if math.isnan(error) else error
