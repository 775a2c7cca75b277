"""Lightning's switches, where parts of this program have to follow them or cannot.

`+trainer.NAME=VALUE` gives any argument of lightning.Trainer.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar
from lightning.pytorch.loggers import Logger

from experiments.simclr.program.errors import UserError

AT_LEAST = {
    "trainer.accumulate_grad_batches": 1,
    "trainer.check_val_every_n_epoch": 1,
    "trainer.gradient_clip_val": 0,
    "trainer.log_every_n_steps": 0,
    "model.warmup_epochs": 0,
    "model.knn_k": 1,
}


def check_trainer(config: Mapping[str, Any]) -> None:
    """Raise UserError for a setting that Lightning would trip over, or that nothing would use."""
    for setting, least in AT_LEAST.items():
        group, key = setting.split(".")
        value = config.get(group, {}).get(key)
        if isinstance(value, int | float) and value < least:
            raise UserError(f"{setting} must be at least {least}; got {value}")
    trainer = config.get("trainer", {})
    if "callbacks" in trainer:
        raise UserError(
            "trainer.callbacks is not read: add one with +callbacks.NAME._target_=PATH, leave one "
            "out with ~callbacks.NAME"
        )
    if not isinstance(trainer.get("logger"), bool | None):
        raise UserError(
            "trainer.logger takes true or false: choose others with logger=csv, wandb, mlflow or "
            "several as in logger=[csv,wandb]"
        )


def trainer_arguments(
    settings: Mapping[str, Any],
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger],
    directory: Path,
) -> dict[str, Any]:
    """What the trainer is given beside its settings: the parts that its switches leave on."""
    barebones = settings.get("barebones", False)
    off = {
        Checkpoint: barebones or settings.get("enable_checkpointing") is False,
        ProgressBar: barebones or settings.get("enable_progress_bar") is False,
    }
    left_out = tuple(kind for kind, is_off in off.items() if is_off)
    logs = not barebones and settings.get("logger") is not False
    return {
        # Lightning takes no interval of logs for a run without any
        **({"log_every_n_steps": None} if barebones else {}),
        "callbacks": [c for c in callbacks if not isinstance(c, left_out)],
        "logger": list(loggers) if logs else False,
        "default_root_dir": settings.get("default_root_dir") or directory,
        # or Lightning would add its own where callbacks= leaves them out
        "enable_progress_bar": any(isinstance(c, ProgressBar) for c in callbacks)
        and not off[ProgressBar],
        "enable_checkpointing": not off[Checkpoint],
    }
