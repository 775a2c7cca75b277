"""Silent gradient faults of the past, and right functions: does anything notice, and falsely?

Run by `python -m experiments.benchmarks silent_gradients`.
"""

from typing import Any


def run(*arguments: Any) -> bool:
    """Run the benchmark; the runner imports Lightning, which the cases do without."""
    from experiments.benchmarks.silent_gradients import runner

    return runner.run(*arguments)
