"""What a person watches while a run lasts: speed, learning rate, memory, the time that is left."""

import time
from datetime import timedelta

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console, Group, RenderableType
from rich.progress import ProgressColumn, Task
from rich.table import Table
from rich.text import Text

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
    """Lightning's bar on two lines, with the time that the whole run has left; into a file, lines.

    The second line has the figures, or the validation while it lasts. Figures are fetched at most
    twice a second, since a GPU has to be waited for.

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

    def configure_columns(self, trainer) -> list:
        return [TwoLines(self, super().configure_columns(trainer))]

    def figures_line(self) -> str:
        """The figures as they were last fetched, without the time that is left."""
        return "  ".join(f"{n} {value}" for n, value in self._figures.items() if n != "left")

    @property
    def left(self) -> str:
        """The time that is left, as it was last fetched."""
        return self._figures.get("left", "")

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {current_epoch + 1}{self._epochs()}"

    def _update_metrics(self, trainer, pl_module) -> None:
        # in place of Lightning's, which gives its own column the figures
        if self.is_enabled:
            self.get_metrics(trainer, pl_module)

    def _epochs(self) -> str:
        epochs = self.trainer.max_epochs
        return "" if epochs in (None, -1) else f"/{epochs}"

    def _print(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self._lines:
            return
        self._printed = time.monotonic()
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        words = [f"epoch {trainer.current_epoch + 1}{self._epochs()}"]
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
            for name, value in self._figures.items():
                if isinstance(value, float):
                    self._figures[name] = three_digits(value)
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


class TwoLines(ProgressColumn):
    """A task's bar; below that of training the figures, unless another task has its bar there.

    Args:
        bar: whose figures are shown.
        columns: Lightning's: description, bar, batches, and others that are left out.
    """

    def __init__(self, bar: Progress, columns: list) -> None:
        super().__init__()
        self.bar = bar
        self.columns = columns[:3]

    def render(self, task: Task) -> RenderableType:
        line = Table.grid(expand=True, padding=(0, 1))
        for ratio in (None, 1, None, None):
            line.add_column(ratio=ratio, no_wrap=True)
        trains = task.id == self.bar.train_progress_bar_id
        left = f"{self.bar.left} left" if trains and self.bar.left else ""
        line.add_row(*(column(task) for column in self.columns), left)
        alone = sum(other.visible for other in self.bar.progress.tasks) == 1
        if not (trains and alone):
            return line
        return Group(line, Text(self.bar.figures_line(), no_wrap=True, overflow="ellipsis"))


def three_digits(value: float) -> str:
    """A number of three digits, or a whole one.

    Example:
        >>> [three_digits(x) for x in (0.54, 0.00103456, 2.642e-05, 123.4, 1843.2)]
        ['0.540', '0.00103', '2.64e-05', '123', '1843']
    """
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:#.3g}".rstrip(".")
