"""What a run shows in TensorBoard beside its scalars: configuration, views, embedding, metrics."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
import torchvision
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

CHOICES = ("seed", "loss.", "optimizer.", "data.batch_size", "trainer.max_epochs")


def writer_of(trainer: L.Trainer):
    """The SummaryWriter of the trainer's TensorBoard logger; None if it has no such logger."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            return logger.experiment
    return None


class TensorBoardPictures(L.Callback):
    """The module's hyperparameters, a grid of view pairs and the test set's embedding.

    Args:
        pairs: how many pairs of views the grid shows.
        embedding_images: at most so many test images in the embedding projector.
    """

    def __init__(self, pairs: int = 16, embedding_images: int = 1000) -> None:
        self.pairs = pairs
        self.embedding_images = embedding_images

    def on_train_start(self, trainer, module) -> None:
        if (writer := writer_of(trainer)) is None:
            return
        text = yaml.safe_dump(dict(module.hparams), sort_keys=False)
        writer.add_text("config", f"```yaml\n{text}```", trainer.global_step)
        images = trainer.datamodule.train_images[: self.pairs].to(module.device)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            views = module.views(images)
        writer.add_image("views", view_grid(*views), trainer.global_step)

    def on_test_end(self, trainer, module) -> None:
        if (writer := writer_of(trainer)) is None:
            return
        data, n = trainer.datamodule, self.embedding_images
        images, labels = data.test_images[:n], data.test_labels
        writer.add_embedding(
            module.test_features[:n],
            metadata=None if labels is None else [str(label) for label in labels[:n].tolist()],
            label_img=images.float() / 255,
            global_step=trainer.global_step,
            tag="test_features",
        )
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        # run_name "." keeps them in this run: the default makes a run of its own
        writer.add_hparams(choices(module.hparams), metrics, run_name=".")
        writer.flush()


def view_grid(view1: Tensor, view2: Tensor) -> Tensor:
    """Pairs of views side by side, (3, height, width) in [0, 1]."""
    pairs = torch.stack([view1, view2], dim=1).flatten(0, 1).float().cpu()
    return torchvision.utils.make_grid(pairs, nrow=8, normalize=True, scale_each=False, padding=1)


def choices(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What runs are told apart by, as one flat table: `seed`, `loss.margin`, `optimizer.lr` …"""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= choices(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | str):
            flat[prefix + key] = value
    return {name: value for name, value in flat.items() if prefix or name.startswith(CHOICES)}
