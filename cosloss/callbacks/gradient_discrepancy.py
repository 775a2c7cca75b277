"""The loss's gradient against its twin's, on the live batch, while it trains."""

from typing import Any

from cosloss.callbacks import tensorboard
from cosloss.callbacks.check import LossCheck
from cosloss.watch.checks import Discrepancy
from cosloss.watch.finding import Finding
from cosloss.watch.gradient_watch import Twin
from cosloss.watch.recording import Recording
from cosloss.watch.targets import Target


class GradientDiscrepancyCallback(LossCheck):
    """Compare a loss's gradient with its twin's every n batches, as training computes it.

    In the training dtype, device and autocast state, and against the twin in float64, so that one
    sees which of the two is off. The gradient is the one that training gets, recorded as it comes.

    Logs, for each input (and `value`, the loss itself; parameters of the loss are `self.<name>`),
    `gradient_discrepancy/<loss>/<input>/{error_over_budget,relative,max_abs,cosine_distance,
    analytic_vs_float64,autograd_vs_float64,ulp_p50,ulp_p99}`, and
    `gradient_discrepancy/<loss>/{run,failed,skipped,verdict,seconds}`. On TensorBoard also a
    histogram of each row's error, now and then a figure of it, a page of custom scalars, and for
    each failure a text and a file to reproduce it from.

    Args:
        every_n_batches: how often; the first and the last batch are always checked.
        on_failure: "warn", "raise" a `GradientError`, or "stop" gracefully, with a checkpoint.
        target: the loss: None for the LightningModule's `loss`, `loss_fn` or `criterion`, a dotted
            path, a module, or a dict of several of these by name. Functions serve as well.
        rows: has no effect any more: the whole batch is looked at.
        twin: the loss in plain autograd torch operations (or a dict of them by name); None for the
            module's `reference()`, or, where it has none, the loss itself in float64.

    Attributes:
        checks_run: how many checks came to a verdict.
        checks_failed: how many of these said wrong.
        checks_skipped: how many could not be made; a warning says why, once.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: an argument is out of range.
    """

    prefix = "gradient_discrepancy"

    def __init__(
        self,
        every_n_batches: int = 50,
        on_failure: str = "warn",
        target: Target = None,
        rows: int | None = 512,
        twin: Twin = None,
    ) -> None:
        super().__init__(every_n_batches, on_failure, target, rows, twin)
        self._charted: dict[str, list[str]] = {}

    def judge(self) -> Discrepancy:
        return Discrepancy()

    def log_details(
        self, writer: Any, name: str, finding: Finding, call: Recording, step: int
    ) -> None:
        inputs = list(finding.report.inputs) if finding.report else self._charted.get(name, [])
        if self._charted.get(name) != inputs:
            self._charted[name] = inputs
            tensorboard.add_layout(writer, tensorboard.discrepancy_charts(self._charted))
        if finding.report is None:
            return
        # a figure takes as long as the check: at the 1st, 2nd, 4th, 8th ... check, and failures
        power_of_two = self.checks_run & (self.checks_run - 1) == 0
        tensorboard.add_row_errors(
            writer,
            f"{self.prefix}/{name}",
            finding.report,
            call.inputs,
            step,
            figure=power_of_two or finding.verdict == "wrong",
        )
