"""Is a function's gradient right? Against its twin, against float64, against finite differences.

For any function of tensors, with or without Lightning; it imports torch alone.
"""

from cosloss.gradient_check.discrepancy import compare_gradients
from cosloss.gradient_check.finite_differences import (
    FiniteDifferenceReport,
    check_finite_differences,
)
from cosloss.gradient_check.point import FiniteDifferences
from cosloss.gradient_check.report import Discrepancy, GradientReport

__all__ = [
    "Discrepancy",
    "FiniteDifferenceReport",
    "FiniteDifferences",
    "GradientReport",
    "check_finite_differences",
    "compare_gradients",
]
