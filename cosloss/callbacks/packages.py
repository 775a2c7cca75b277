"""Lightning, under whichever of its two names it is installed."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.loggers.logger import DummyLogger
else:
    try:
        package = import_module("lightning.pytorch")
    except ImportError:
        package = import_module("pytorch_lightning")
    Callback, LightningModule, Trainer = (
        package.Callback,
        package.LightningModule,
        package.Trainer,
    )
    Logger, DummyLogger = package.loggers.Logger, package.loggers.logger.DummyLogger

__all__ = ["Callback", "DummyLogger", "LightningModule", "Logger", "Trainer"]
