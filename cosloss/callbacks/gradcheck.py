"""Finite differences of the loss, on rows of the live batch, while it trains."""

from collections.abc import Callable
from typing import Any

from cosloss.callbacks.check import LossCheck
from cosloss.callbacks.observed import Observation, PureLoss, Target
from cosloss.gradient_check.finite_differences import check_calls


class GradcheckCallback(LossCheck):
    """Check the loss's gradient against finite differences every n batches.

    In float64, on `rows` rows of what the loss was called with, rescaled to length 1, and at a
    generic random point, since embeddings that have collapsed show nothing.

    Args:
        every_n_batches: how often; the first and the last batch are always checked.
        on_failure: "warn", "raise", or "stop" the training gracefully.
        target: the loss: None for the attribute `loss`, `loss_fn` or `criterion`, a dotted path, a
            module, or a dict of several by name.
        rows: how many rows of the batch are looked at.
        twin: not needed for finite differences.

    Attributes:
        checks_run: how many checks were made.
        checks_failed: how many of them failed.
    """

    prefix = "gradcheck"

    def __init__(
        self,
        every_n_batches: int = 200,
        on_failure: str = "warn",
        target: Target = None,
        rows: int | None = 8,
        twin: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(every_n_batches, on_failure, target, rows, twin)

    def check(
        self, name: str, loss: PureLoss, observation: Observation
    ) -> tuple[bool, str, dict[str, float]]:
        report = check_calls(loss, observation.inputs, observation.wanted, seed=self.batches_seen)
        scalars = {
            "passed": float(report.passed),
            "max_abs_error": report.max_abs_error,
            "max_rel_error": report.max_rel_error,
            "degenerate": float(report.degenerate),
        }
        return (
            report.passed,
            report.reason,
            {f"gradcheck/{name}/{k}": v for k, v in scalars.items()},
        )
