"""What both callbacks share: a GradientWatch whose steps are Lightning's training batches."""

from functools import partial
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info

from cosloss.arguments import check_choice, check_count
from cosloss.callbacks import record
from cosloss.callbacks.history import History
from cosloss.callbacks.packages import Callback, LightningModule, Trainer
from cosloss.watch.checks import Check
from cosloss.watch.finding import Finding
from cosloss.watch.gradient_watch import ON_FAILURE, GradientWatch, Twin
from cosloss.watch.recording import Recording
from cosloss.watch.targets import Target, check_target, check_twin

COUNTS = ("checks_run", "checks_failed", "checks_skipped")


class LossCheck(Callback):
    """Watches a loss, and checks it at the end of some batches.

    Batches are counted, since global_step stands still within gradient accumulation. On a batch
    that is due, every process checks its own calls and all share one verdict.
    """

    prefix: str
    title: str  # of what is shown of a loss, whose name is put in

    def __init__(
        self, every_n_batches: int, on_failure: str, target: Target, rows: int | None, twin: Twin
    ) -> None:
        check_count("every_n_batches", every_n_batches)
        check_choice("on_failure", on_failure, ON_FAILURE)
        check_target(target)
        check_count("rows", rows, none="all")
        check_twin(twin)
        self.every_n_batches = every_n_batches
        self.on_failure = on_failure
        self.target = target
        self.rows = rows
        self.twin = twin
        self.batches_seen = self.checks_run = self.checks_failed = self.checks_skipped = 0
        self.watch: GradientWatch | None = None
        self.histories: dict[str, History] = {}
        self._last: dict[str, tuple[int, str]] = {}  # the last check's step and table, by loss
        self._unshown: set[str] = set()

    def judge(self) -> Check:
        """The judge of recorded calls."""
        raise NotImplementedError

    def log_details(
        self,
        writer: Any,
        name: str,
        finding: Finding,
        call: Recording,
        step: int,
        figures: bool,
    ) -> None:
        """Write more than scalars to a TensorBoard writer, now and then with figures."""

    def show_history(self, writer: Any, name: str, step: int) -> None:
        """Show what the checks of a loss have found so far, to a TensorBoard writer."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"watch": None}  # a copied model takes us along: idle

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # after configure_model, and before the first compiled call: hooks added later never fire
        self._release()
        # asks every process, so it is asked here
        directory = Path(trainer.log_dir or trainer.default_root_dir) / "gradient_failures"
        self.watch = GradientWatch(
            pl_module,
            self.target,
            self.every_n_batches,
            self.on_failure,
            self.twin,
            self.judge(),
            directory=directory,
        )
        self.watch.rank = f"-rank{trainer.global_rank}" if trainer.global_rank else ""
        self.watch.steps_seen = self.batches_seen
        for name in COUNTS:
            setattr(self.watch, name, getattr(self, name))
        self.watch.reports.append(partial(self._log, trainer))
        self._unshown.clear()
        self._before_fit = sum(getattr(self, name) for name in COUNTS)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._release()

    def _release(self) -> None:
        if self.watch is not None:
            self.watch.close()
            self.watch = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.watch is not None:
            self.watch.steps_seen = self.batches_seen
            self.watch.start(due=_is_last(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.watch is None:
            return
        failures = self.watch.finish()
        self.batches_seen = self.watch.steps_seen
        for name in COUNTS:
            setattr(self, name, getattr(self.watch, name))
        if self.watch.was_due or trainer.world_size == 1:
            self._share_verdict(trainer, failures)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.watch is not None:
            self.watch.warn_if_nothing_was_checked(self._before_fit)
            rank_zero_info(self.watch.summary())
        for writer in record.tensorboard_writers(trainer.loggers):
            for name in self._unshown:
                self._show(writer, name)

    def state_dict(self) -> dict[str, Any]:
        histories = {name: history.state() for name, history in self.histories.items()}
        counts = {n: getattr(self, n) for n in ("batches_seen", *COUNTS)}
        return {**counts, "histories": histories}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        counts = dict(state_dict)
        histories = counts.pop("histories", {})
        self.histories = {name: History.from_state(state) for name, state in histories.items()}
        for name, value in counts.items():
            setattr(self, name, value)
            if self.watch is not None:
                setattr(self.watch, name, value)

    def _log(
        self,
        trainer: Trainer,
        name: str,
        scalars: dict[str, float],
        finding: Finding,
        call: Recording,
    ) -> None:
        if not trainer.is_global_zero:
            return
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # the step Lightning logs at
        history = self.histories.setdefault(name, History())
        history.add(finding, step)
        self._last[name] = step, finding.table or finding.reason
        self._unshown.add(name)
        shown = history.is_worth_drawing(finding)

        def details(writer: Any) -> None:
            self.log_details(writer, name, finding, call, step, shown)
            if shown:
                self._show(writer, name)

        record.log(trainer.loggers, f"{self.prefix}/{name}", scalars, finding, step, details)
        if shown:
            self._unshown.discard(name)

    def _show(self, writer: Any, name: str) -> None:
        step, table = self._last[name]
        title = f"Overview/{self.title.format(name)}"
        writer.add_text(title, f"**{self.histories[name]}**\n\n{table}", step)
        self.show_history(writer, name, step)

    def _show_failure_elsewhere(self, trainer: Trainer) -> None:
        for name in self._last:
            history = self.histories[name]
            if not history.wrong_elsewhere:
                history.wrong_elsewhere = True
                for writer in record.tensorboard_writers(trainer.loggers):
                    self._show(writer, name)

    def _share_verdict(self, trainer: Trainer, failures: list[str]) -> None:
        """Act on a failure of any process, on all of them."""
        watch = self.watch
        if not trainer.strategy.reduce_boolean_decision(bool(failures), all=False) or not watch:
            return
        if not failures:
            self._show_failure_elsewhere(trainer)
        watch.act(failures or [f"{self.prefix}: a gradient check failed on another process"])
        if watch.should_stop and not trainer.should_stop:
            directory = watch.directory or Path()
            trainer.save_checkpoint(directory / f"stopped-batch{self.batches_seen:06d}.ckpt")
            trainer.should_stop = True


def _is_last(trainer: Trainer) -> bool:
    """Whether this batch is known to be the last one of the run."""
    loop = trainer.fit_loop
    if loop.max_steps >= 0 and trainer.global_step + 1 >= loop.max_steps:
        return True
    last_epoch = loop.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= loop.max_epochs
    return bool(last_epoch and loop.epoch_loop.batch_progress.is_last_batch)
