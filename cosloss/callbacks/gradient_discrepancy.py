"""The loss's gradient against its twin's, on the live batch, while it trains."""

from typing import Any

from cosloss.callbacks import tensorboard
from cosloss.callbacks.check import LossCheck, Twin
from cosloss.callbacks.finding import Finding
from cosloss.callbacks.observed import Observation, Target, judged
from cosloss.gradient_check.calls import tensors_in
from cosloss.gradient_check.discrepancy import compare_calls
from cosloss.gradient_check.module import PureLoss


class GradientDiscrepancyCallback(LossCheck):
    """Compare a loss's gradient with its twin's every n batches, as training computes it.

    In the training dtype, device and autocast state, and against the twin in float64, so that one
    sees which of the two is off. If the batch has at most `rows` rows, the gradient is that of the
    live graph, the one training is about to use; otherwise the loss is called again on `rows` rows.

    Logs, for each input (and `value`, the loss itself; parameters of the loss are `self.<name>`),
    `gradient_discrepancy/<loss>/<input>/{relative,max_abs,cosine_distance,analytic_vs_float64,
    autograd_vs_float64,ulp_p50,ulp_p99}`, and `gradient_discrepancy/<loss>/seconds`. On TensorBoard
    also a histogram of each row's error, now and then a figure of it, a page of custom scalars, and
    for each failure a text and a file to reproduce it from.

    Args:
        every_n_batches: how often; the first and the last batch are always checked.
        on_failure: "warn", "raise" a `GradientError`, or "stop" gracefully, with a checkpoint.
        target: the loss: None for the LightningModule's `loss`, `loss_fn` or `criterion`, a dotted
            path, a module, or a dict of several of these by name. Functions serve as well.
        rows: how many rows of the batch are looked at; None for all.
        twin: the loss in plain autograd torch operations (or a dict of them by name); None for the
            module's `reference()`, or, where it has none, the loss itself in float64.

    Attributes:
        checks_run: how many checks were made.
        checks_failed: how many of them failed.
    """

    prefix = "gradient_discrepancy"
    live_graph = True

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

    def check(self, loss: PureLoss, observation: Observation) -> Finding:
        wanted = judged(tensors_in(observation.inputs))
        report = compare_calls(
            loss, loss.twin, observation.inputs, wanted, analytic=observation.analytic
        )
        scalars = {
            f"{name}/{tag}": number
            for name, found in {"value": report.value, **report.inputs}.items()
            for tag, number in found.scalars().items()
        }
        source = "the live graph" if observation.analytic else "a second call on sampled rows"
        table = f"{report.markdown()} The analytic gradient is that of {source}."
        return Finding(report.passed, report.reason, scalars, table, report)

    def log_details(
        self, writer: Any, name: str, finding: Finding, observation: Observation, step: int
    ) -> None:
        if finding.report is None:
            return
        inputs = list(finding.report.inputs)
        if self._charted.get(name) != inputs:
            self._charted[name] = inputs
            tensorboard.add_layout(writer, tensorboard.error_charts(self._charted))
        # a figure takes as long as the check: at the 1st, 2nd, 4th, 8th ... check, and failures
        power_of_two = self.checks_run & (self.checks_run - 1) == 0
        tensorboard.add_row_errors(
            writer,
            f"{self.prefix}/{name}",
            finding.report,
            observation.inputs,
            step,
            figure=power_of_two or not finding.passed,
        )
