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

    During a validation it waits for the epoch's end. Lightning puts a Checkpoint behind the other
    callbacks, and this one must be the last: its checkpoint holds what the others did in this step.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def on_train_start(self, trainer, module) -> None:
        interruption.awaited = True

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self._save_if_asked(trainer)

    def on_train_epoch_end(self, trainer, module) -> None:
        self._save_if_asked(trainer)

    def on_train_end(self, trainer, module) -> None:
        interruption.awaited = False

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
