"""Gradient checks in any training loop; imports torch alone."""

from cosloss.watch.checks import Differences, Discrepancy
from cosloss.watch.finding import GradientError
from cosloss.watch.gradient_watch import GradientWatch
from cosloss.watch.step_check import StepCheck

__all__ = ["Differences", "Discrepancy", "GradientError", "GradientWatch", "StepCheck"]
