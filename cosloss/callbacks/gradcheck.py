"""Finite differences of the loss, on rows of the live batch, while it trains."""

from typing import Any

from cosloss.arguments import check_flags
from cosloss.callbacks import tensorboard
from cosloss.callbacks.check import LossCheck
from cosloss.gradient_check.point import FiniteDifferences
from cosloss.watch.checks import Differences
from cosloss.watch.gradient_watch import Twin
from cosloss.watch.targets import Target


class GradcheckCallback(LossCheck):
    """Check a loss's gradient against finite differences every n batches.

    In float64, on `rows` rows of what the loss was called with, rescaled to length 1, and at a
    generic random point each time, since embeddings that have collapsed show nothing. Random
    directions and torch.autograd.gradcheck's fast mode look at all entries of these rows, its slow
    mode at a few.

    Logs `gradcheck/<loss>/{passed,max_abs_error,max_rel_error,degenerate,run,failed,skipped,
    verdict,seconds}`, where <loss> is the path of the attribute, and for each failure a text and a
    file to reproduce it from. On TensorBoard also the verdict in words
    and a page of custom scalars.

    Args:
        every_n_batches: how often; the first and the last batch are always checked.
        on_failure: "warn", "raise" a `GradientError`, or "stop" gracefully, with a checkpoint.
        target: the loss: None for the LightningModule's `loss`, `loss_fn` or `criterion`, a dotted
            path, a module, or a dict of several of these by name. Functions serve as well.
        rows: how many rows of the batch are looked at; None for all.
        twin: with surrogate=True, the function whose gradient the loss's must be (or a dict of
            them by name); None for the module's `reference()`.
        surrogate: the gradient is deliberately not the derivative (a straight-through estimator):
            it is compared with the twin's in float64 instead of finite differences.
        directions: random directions per input and point.
        slow_entries: entries per input that gradcheck's slow mode tries, a random block each time;
            0 for none.
        unit_rows: False leaves the rows at their length.
        forward_ad: compare forward-mode derivatives too.
        second_order: run gradgradcheck too.

    Attributes:
        checks_run: how many checks came to a verdict.
        checks_failed: how many of these said wrong.
        checks_skipped: how many could not be made; a warning says why, once.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: an argument is out of range.
    """

    prefix = "gradcheck"
    title = "gradient of {} by finite differences"

    def __init__(
        self,
        every_n_batches: int = 200,
        on_failure: str = "warn",
        target: Target = None,
        rows: int | None = 8,
        twin: Twin = None,
        surrogate: bool = False,
        directions: int = 4,
        slow_entries: int = 16,
        unit_rows: bool = True,
        forward_ad: bool = False,
        second_order: bool = False,
    ) -> None:
        super().__init__(every_n_batches, on_failure, target, rows, twin)
        check_flags(surrogate=surrogate)
        self.surrogate = surrogate
        self.how = FiniteDifferences(directions, slow_entries, unit_rows, forward_ad, second_order)

    def judge(self) -> Differences:
        return Differences(self.how, self.rows, self.surrogate)

    def show_history(self, writer: Any, name: str, step: int) -> None:
        tensorboard.add_layout(writer, self.prefix, tensorboard.gradcheck_charts(self.histories))
