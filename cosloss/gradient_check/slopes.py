"""The slope of a loss along a line, from central differences at several steps, and its doubt.

D(h) = (L(h) - L(-h)) / 2h is off by a h^2 + noise / h. Steps grow fourfold, so that D(h) and D(4h)
tell which of the two prevails; R = (16 D(h) - D(4h)) / 15 has no h^2 any more.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

LEVELS = 5  # ten evaluations at most
GROWTH = 4.0
AGREES = 0.003
WRONG = 0.01
DOUBTS = 4.0
LIKE, SHORT = (1.7, 0.6), (0.23, 0.08, 0.03)  # so many times as long are steps of other opinions
SAME = 0.5  # of what the gradient is off by: two slopes that differ by less
RESOLVED = 0.2  # a doubt larger than this share of the slope is no verdict

# the loss, and what the gradient says that it changes by from 0 to t
Line = Callable[[float], tuple[float, float]]


@dataclass(frozen=True)
class Slope:
    """A slope as measured, as the gradient has it, and how far off the first may be."""

    measured: float
    expected: float
    doubt: float
    scale: float
    kinked: bool = False

    @property
    def error(self) -> float:
        """The difference in units of the slope's scale."""
        return abs(self.measured - self.expected) / self.scale if self.scale else 0.0

    @property
    def wrong(self) -> bool:
        """Whether the difference is more than doubts explain."""
        off = abs(self.measured - self.expected)
        return not self.kinked and off > max(WRONG * self.scale, DOUBTS * self.doubt)

    @property
    def right(self) -> bool:
        """Whether a difference of a fifth would have been seen, and there is none."""
        return not self.wrong and not self.kinked and self.doubt <= RESOLVED * self.scale

    @property
    def agrees(self) -> bool:
        """Whether the gradient's slope was measured; none is where a format swallows the step."""
        return self.measured != 0 and self.error <= WRONG

    @property
    def factor(self) -> float:
        """How many times the right slope the gradient's is."""
        return self.expected / self.measured if self.measured else math.nan


def measure(
    line: Line,
    at_zero: float,
    first: float,
    scale: float,
    noise: float = 0.0,
    agrees: float = AGREES,
    swallows: bool = False,
) -> Slope:
    """Measure a slope, in as few evaluations as it takes.

    Args:
        line: gives the loss at t, and the change that the gradient predicts.
        at_zero: the loss at 0.
        first: the smallest step.
        scale: what the slope is compared with, where it is itself smaller.
        noise: by how much two evaluations at one point may differ.
        agrees: the share of the scale within which the next step need not be tried.
        swallows: whether a short step may leave the loss as it was, of a format with few bits.

    Example:
        >>> slope = measure(lambda t: (math.exp(t), 2 * t), 1.0, 1e-3, 1.0)
        >>> slope.wrong, round(slope.factor, 4)
        (True, 2.0)
    """
    found: list[tuple[float, float, float, float]] = []  # D, expected, second difference, step
    best: Slope | None = None
    for level in range(LEVELS):
        h = first * GROWTH**level
        (above, up), (below, down) = line(h), line(-h)
        if not (math.isfinite(above) and math.isfinite(below)):
            break
        if swallows and above == below == at_zero and level < LEVELS - 1:
            continue
        slope, expected = (above - below) / (2 * h), (up - down) / (2 * h)
        found.append((slope, expected, above + below - 2 * at_zero, h))
        size = max(scale, abs(expected))
        if abs(slope - expected) <= agrees * size and noise / h <= agrees * size:
            return Slope(slope, expected, agrees * size / DOUBTS, size)
        if len(found) == 1:
            continue
        (near, wanted, bend, step), (far, _, wide_bend, _) = found[-2:]
        # second differences grow with h^2 too: what they do not is another sample of the noise
        doubt = max(abs(near - far), abs(wide_bend / GROWTH**2 - bend) / step, noise / step)
        size = max(scale, abs(wanted), abs(near))
        if best is None or doubt / size < best.doubt / best.scale:
            measured = (GROWTH**2 * near - far) / (GROWTH**2 - 1)
            best = Slope(measured, wanted, doubt, size)
            best = replace(best, kinked=best.wrong and _kinked(found[-2:], wanted, size))
        if doubt <= AGREES * size:
            break
    if swallows and best is None and found and found[0][0] == found[0][2] == 0:
        expected = found[0][1]  # the longest step leaves the loss as it was, as all others did
        return Slope(0.0, expected, AGREES * scale, max(scale, abs(expected)))
    return best or Slope(math.nan, found[0][1] if found else math.nan, math.inf, scale or 1.0)


def confirmed(slope: Slope, again: Callable[[float], Slope]) -> bool:
    """Whether a slope that is wrong is so with other steps too: where a loss jumps it is not.

    Steps like the first must measure the same. Of short ones none may agree with the gradient: it
    is the limit that counts.

    Args:
        slope: one that is wrong.
        again: measures it with steps so many times as long.
    """
    off = abs(slope.measured - slope.expected)
    for place, steps in enumerate(LIKE):
        other = again(steps)
        same = abs(other.measured - slope.measured) <= max(SAME * off, DOUBTS * other.doubt)
        if not same or (place == 0 and not other.wrong):
            return False
    return not any(again(steps).agrees for steps in SHORT)


def _kinked(pair: list[tuple[float, float, float, float]], expected: float, size: float) -> bool:
    """Whether the slope of one side agrees: the point lies beside a kink, of a hinge perhaps."""
    for side in (1, -1):
        near, far = (slope + side * bend / (2 * h) for slope, _, bend, h in pair)
        if abs((GROWTH * near - far) / (GROWTH - 1) - expected) <= WRONG * size:
            return True
    return False
