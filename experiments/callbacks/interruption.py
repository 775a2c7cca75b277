"""Ctrl-C and SIGTERM end a run after the current step, with a checkpoint of exactly that step."""

import signal
from pathlib import Path

import lightning as L


class Interrupted(Exception):
    """Training was asked to stop; its checkpoint is written."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_status = 128 + signum


class CheckpointOnSignal(L.Callback):
    """At SIGINT or SIGTERM, finish the step, save `path` and raise Interrupted.

    A second signal does not wait for the step: it raises KeyboardInterrupt at once. It must be the
    last callback, so that the checkpoint holds what the others did in this step.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def on_train_start(self, trainer, module) -> None:
        # only now: the trainer installs handlers of its own when fit begins
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._handle)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        # in a distributed run one process may hear of it a step before another
        received = trainer.strategy.reduce_boolean_decision(self.received is not None, all=False)
        if received:
            trainer.save_checkpoint(self.path, weights_only=False)
            raise Interrupted(self.received or signal.SIGTERM)

    def teardown(self, trainer, module, stage) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def _handle(self, signum, frame) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signum
