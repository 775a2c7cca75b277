"""The pytest plugin: `gradients_agree`, a fixture that holds a function's gradient to its twin's.

A package of its own, since pytest imports plugins in every project: torch is imported when the
fixture is called.
"""

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def gradients_agree() -> Callable[..., Any]:
    """gradients_agree(fn, twin, *inputs, **options) fails the test unless the gradients agree.

    As `cosloss.gradient_check.compare_gradients`, whose report it returns; without a twin, None,
    finite differences in float64 judge too.
    """

    def agree(
        fn: Callable[..., Any], twin: Callable[..., Any] | None, *inputs: Any, **options: Any
    ):
        __tracebackhide__ = True
        from cosloss.gradient_check import check_finite_differences, compare_gradients

        report = compare_gradients(fn, twin, *inputs, **options)
        if not report:
            pytest.fail(str(report), pytrace=False)
        if twin is None:
            differences = check_finite_differences(fn, *inputs, **options)
            if differences.skipped:
                pytest.fail(f"not checked: {differences}", pytrace=False)
            if not differences:
                pytest.fail(str(differences), pytrace=False)
        return report

    return agree
