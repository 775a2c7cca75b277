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
    analytic_vs_float64,autograd_vs_float64,budget,ulp_p50,ulp_p99}`, and
    `gradient_discrepancy/<loss>/{run,failed,skipped,verdict,seconds}`. On TensorBoard also a
    histogram of each row's error; for each failure a text and a file to reproduce it from; and, at
    the 1st, 2nd, 4th, 8th ... check and at the end, the verdict in words, a page of custom scalars,
    and figures: both gradients' errors beside the budget, and the rows' errors.

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
    title = "gradient of {}"

    def __init__(
        self,
        every_n_batches: int = 50,
        on_failure: str = "warn",
        target: Target = None,
        rows: int | None = 512,
        twin: Twin = None,
    ) -> None:
        super().__init__(every_n_batches, on_failure, target, rows, twin)

    def judge(self) -> Discrepancy:
        return Discrepancy()

    def log_details(
        self,
        writer: Any,
        name: str,
        finding: Finding,
        call: Recording,
        step: int,
        figures: bool,
    ) -> None:
        if finding.report is not None:
            tag = f"{self.prefix}/{name}"
            tensorboard.add_row_errors(writer, tag, finding.report, call.inputs, step, figures)

    def show_history(self, writer: Any, name: str, step: int) -> None:
        charts = tensorboard.discrepancy_charts(self.histories)
        tensorboard.add_layout(writer, self.prefix, charts)
        tensorboard.add_error_curves(writer, name, self.histories[name], step)
