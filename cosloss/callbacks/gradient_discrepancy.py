"""The loss's gradient against its twin's, on the live batch, while it trains."""

from collections.abc import Callable
from typing import Any

from cosloss.callbacks.check import LossCheck
from cosloss.callbacks.observed import Observation, PureLoss, Target
from cosloss.gradient_check.discrepancy import compare_calls


class GradientDiscrepancyCallback(LossCheck):
    """Compare the loss's gradient with its twin's every n batches.

    In the training dtype, device and autocast state, and against the twin in float64.

    Args:
        every_n_batches: how often; the first and the last batch are always checked.
        on_failure: "warn", "raise", or "stop" the training gracefully.
        target: the loss: None for the attribute `loss`, `loss_fn` or `criterion`, a dotted path, a
            module, or a dict of several by name.
        rows: how many rows of the batch are looked at; None for all.
        twin: the loss in plain autograd torch operations; None for the module's `reference()`.

    Attributes:
        checks_run: how many checks were made.
        checks_failed: how many of them failed.
    """

    prefix = "gradient_discrepancy"

    def __init__(
        self,
        every_n_batches: int = 50,
        on_failure: str = "warn",
        target: Target = None,
        rows: int | None = 256,
        twin: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(every_n_batches, on_failure, target, rows, twin)

    def check(
        self, name: str, loss: PureLoss, observation: Observation
    ) -> tuple[bool, str, dict[str, float]]:
        report = compare_calls(loss, loss.twin, observation.inputs, observation.wanted)
        scalars = {
            f"gradient_discrepancy/{name}/{of.split('.', 1)[1]}/{tag}": value
            for of, judged in report.inputs.items()
            for tag, value in judged.scalars().items()
        }
        return report.passed, report.reason, scalars
