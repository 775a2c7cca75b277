"""Checkpoints that are whole or absent."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from experiments.simclr.program.errors import UserError


def remove_unfinished(folder: Path) -> None:
    """Remove from a run's folder what a kill amid a checkpoint's writing has left there."""
    for path in folder.glob(".*.ckpt.*.tmp"):
        path.unlink(missing_ok=True)


class BestCheckpoint(ModelCheckpoint):
    """The checkpoint with the best monitored value; says so where no value was ever there.

    What it has found so far goes on when a run is resumed with another period of validation.
    """

    @property
    def state_key(self) -> str:
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        if self.monitor in trainer.callback_metrics:
            super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer, pl_module) -> None:
        super().on_train_end(trainer, pl_module)
        if not self.best_model_path and not trainer.fast_dev_run and trainer.is_global_zero:
            warnings.warn(
                f"there is no {self.filename}.ckpt, as no epoch was validated: "
                f"trainer.check_val_every_n_epoch={trainer.check_val_every_n_epoch}, "
                f"{trainer.current_epoch} epochs, validation batches: "
                f"{sum(trainer.num_val_batches or [0])}",
                stacklevel=2,
            )


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write to a temporary name in the same folder, flush it to disk, and rename.

    A kill or a full disk at any moment leaves the previous checkpoint intact.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            temporary.unlink(missing_ok=True)
            reason = error.strerror if isinstance(error, OSError) else _cause(error)
            kept = "; the previous one is intact" if path.exists() else ""
            raise UserError(f"cannot write the checkpoint {path}: {reason}{kept}") from error


def _cause(error: BaseException) -> str:
    inner = error.__cause__ or error.__context__
    return inner.strerror if isinstance(inner, OSError) and inner.strerror else str(error)
