"""A signal ends a run after the current step, with a checkpoint of exactly that step."""

import signal
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from experiments.simclr.program.interruption import Interrupted, interruption


def take_signals_over(trainer: L.Trainer) -> None:
    """Keep Lightning from handlers of its own, which end a run with status 0."""
    trainer._signal_connector.register_signal_handlers = lambda: None


class CheckpointOnSignal(Checkpoint):
    """While training, let a signal wait for the step's end; then save `path`, raise Interrupted.

    A step ends with the optimizer's, at the last of the batches that it accumulates. A validation
    is left after the batch that is running, and a resumed run begins it anew. Lightning puts a
    Checkpoint behind the other callbacks, and this one must be the last: its checkpoint holds what
    the others did in this step.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def on_train_start(self, trainer, module) -> None:
        interruption.awaited = True

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        loop = trainer.fit_loop.epoch_loop
        validates = loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
        # a checkpoint holds no gradient; from one before a validation it would not be made up for
        if not loop._should_accumulate() and not validates:
            self._save_if_asked(trainer)

    def on_validation_start(self, trainer, module) -> None:
        self._save_if_asked(trainer)

    def on_validation_batch_end(
        self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        self._save_if_asked(trainer)

    def on_train_epoch_end(self, trainer, module) -> None:
        self._save_if_asked(trainer)

    def on_save_checkpoint(self, trainer, module, checkpoint) -> None:
        if trainer.validating:
            loops = checkpoint["loops"]["fit_loop"]
            # in its first batch: from there Lightning begins a validation anew
            first = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            progress = loops["epoch_loop.val_loop.batch_progress"]
            loops["epoch_loop.val_loop.batch_progress"] = progress | {
                "total": first,
                "current": dict(first),
                "is_last_batch": False,
            }

    def on_train_end(self, trainer, module) -> None:
        interruption.awaited = False
        if interruption.received is not None:  # after the last epoch's end
            raise Interrupted(interruption.received)

    def on_exception(self, trainer, module, exception) -> None:
        interruption.awaited = False
        launcher = trainer.strategy.launcher
        if isinstance(exception, Interrupted) and isinstance(launcher, _SubprocessScriptLauncher):
            launcher.kill(signal.SIGTERM)  # or they would wait for this process

    def _save_if_asked(self, trainer: L.Trainer) -> None:
        # in a distributed run one process may hear of it a step before another
        asked = interruption.received is not None
        if trainer.strategy.reduce_boolean_decision(asked, all=False):
            trainer.save_checkpoint(self.path, weights_only=False)
            raise Interrupted(interruption.received or signal.SIGTERM, saved=True)
