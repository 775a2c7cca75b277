"""What a person watches while a run lasts: speed, learning rate, memory, the time that is left."""

import time
from datetime import timedelta

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console

SHORT = {
    "train/learning_rate": "lr",
    "train/images_per_second": "images/s",
    "train/peak_memory_gib": "GiB",
}


class TrainingFigures(L.Callback):
    """Log `train/{learning_rate,images_per_second}` and, on a GPU, `train/peak_memory_gib`.

    At the steps at which Lightning logs the loss: the rate is the one that this step was taken
    with. Speed is that of all processes, from one logged step to the next, without validation.
    """

    def __init__(self) -> None:
        self._rate = 0.0
        self._images = 0
        self._since = 0.0

    def on_train_epoch_start(self, trainer, module) -> None:
        self._restart()

    def on_validation_end(self, trainer, module) -> None:
        self._restart()

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        # at the batch's end the schedule has set the next step's
        self._rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self._images += len(batch["image"]) * trainer.world_size
        loop = trainer.fit_loop.epoch_loop
        if loop._should_accumulate() or not trainer._logger_connector.should_update_logs:
            return
        figures = {"train/learning_rate": self._rate}
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)  # or the time would be that of queueing the work
            peak = torch.cuda.max_memory_allocated(module.device)
            figures["train/peak_memory_gib"] = peak / 2**30
        figures["train/images_per_second"] = self._images / (time.perf_counter() - self._since)
        # not by module.log alone, which drops what is logged between its own logged steps
        shown = {SHORT[name]: value for name, value in figures.items()}
        module.log_dict(shown, prog_bar=True, logger=False)
        for logger in trainer.loggers:
            logger.log_metrics(figures, loop._batches_that_stepped)
        self._restart()

    def _restart(self) -> None:
        self._images = 0
        self._since = time.perf_counter()


class Progress(RichProgressBar):
    """Lightning's bar, with the time that the whole run has left; into a file, lines instead.

    Figures are fetched at most twice a second, since a GPU has to be waited for.

    Args:
        refresh_rate: of the bar, in batches.
        seconds: at least so much time lies between two lines within an epoch.
    """

    def __init__(self, refresh_rate: int = 10, seconds: float = 10.0) -> None:
        super().__init__(refresh_rate)
        self.seconds = seconds
        self._figures: dict = {}
        self._fetched = self._began = self._printed = 0.0
        self._batches_before = 0
        self._lines = False

    def setup(self, trainer, pl_module, stage) -> None:
        super().setup(trainer, pl_module, stage)
        console = Console()
        if trainer.is_global_zero and not (console.is_terminal or console.is_jupyter):
            self._lines = True
            self.disable()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if time.monotonic() - self._printed > self.seconds and not trainer.is_last_batch:
            self._print(trainer, pl_module)

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self._fetched = 0.0
        self._print(trainer, pl_module)

    def _print(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self._lines:
            return
        self._printed = time.monotonic()
        epochs = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        words = [f"epoch {trainer.current_epoch + 1}{epochs}"]
        words += [f"batch {batches}/{trainer.num_training_batches}"]
        words += [f"{name} {value}" for name, value in self.get_metrics(trainer, module).items()]
        print(", ".join(words), flush=True)

    def on_train_start(self, trainer, pl_module) -> None:
        super().on_train_start(trainer, pl_module)
        self._began = time.monotonic()
        self._batches_before = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        self._printed = self._began
        self._fetched = 0.0

    def get_metrics(self, trainer, pl_module) -> dict:
        if time.monotonic() - self._fetched > 0.5:
            self._figures = super().get_metrics(trainer, pl_module)
            self._figures.pop("v_num", None)
            # the bar rounds numbers to three decimals
            for name, value in self._figures.items():
                if isinstance(value, float):
                    self._figures[name] = f"{value:.4g}"
            left = self.time_left(trainer)
            if left is not None:
                self._figures["left"] = str(left)
            self._fetched = time.monotonic()
        return self._figures

    def time_left(self, trainer: L.Trainer) -> timedelta | None:
        """Until the last epoch's end, at the pace up to now, validation included."""
        done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if not trainer.max_epochs or trainer.max_epochs < 0 or done <= self._batches_before:
            return None
        pace = (time.monotonic() - self._began) / (done - self._batches_before)
        batches = trainer.max_epochs * trainer.num_training_batches
        return timedelta(seconds=round(pace * max(0, batches - done)))
