"""What a run shows in TensorBoard beside its scalars: configuration, pictures, embedding."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure

from cosloss.callbacks.tensorboard import add_layout
from experiments.simclr.data import ImageData
from experiments.simclr.evaluation import pictures
from experiments.simclr.evaluation.frozen import Evaluation, spread

LAYOUT = {
    "training": {
        # a chart each: the page gives all lines of a run one colour
        "loss of training batches": ["Multiline", ["train/loss"]],
        "loss on the validation part": ["Multiline", ["val/loss"]],
        "k-NN accuracy on the validation part": ["Multiline", ["val/knn"]],
        "learning rate": ["Multiline", ["train/learning_rate"]],
        "images per second": ["Multiline", ["train/images_per_second"]],
    },
    "representation": {
        "standard deviation: 0 where collapsed, 1 at random": [
            "Multiline",
            ["representation/embedding_std"],
        ],
        "effective rank: 1 where collapsed": ["Multiline", ["representation/effective_rank"]],
        "alignment: squared distance of an image's views": [
            "Multiline",
            ["representation/alignment"],
        ],
        "uniformity: 0 where collapsed, -4 at random": ["Multiline", ["representation/uniformity"]],
    },
}
CHOICES = ("seed", "loss", "optimizer", "data.batch_size", "trainer.max_epochs")
DULL = ("_partial_", "gather_distributed")


def logger_of(trainer: L.Trainer) -> TensorBoardLogger | None:
    """The trainer's TensorBoard logger, in the process that writes; None if it has none."""
    found = (logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger))
    return next(found, None) if trainer.is_global_zero else None


class TensorBoardPictures(L.Callback):
    """The configuration, the layout of the scalars, view pairs, nearest neighbours, embedding.

    The pictures lie in the logger's folder too, as pictures/*.png.

    Args:
        pairs: how many images are shown with their views.
        embedding_images: at most so many test images in the embedding projector.
    """

    def __init__(self, pairs: int = 6, embedding_images: int = 1000) -> None:
        self.pairs = pairs
        self.embedding_images = embedding_images
        self._trained = False

    def on_train_start(self, trainer, module) -> None:
        self._trained = True
        with dispensable("the views"):
            self._show_run(trainer, module)

    def on_test_end(self, trainer, module) -> None:
        if (logger := logger_of(trainer)) is None or module.evaluation is None:
            return
        writer = logger.experiment
        with dispensable("the pictures of the evaluation"):
            figures = evaluation_figures(trainer.datamodule, module.evaluation)
            for tag, figure in figures.items():
                self._add(trainer, logger, tag, figure)
        with dispensable("the embedding of the test part"):
            self._add_embedding(trainer, writer, module.evaluation)
        if self._trained:
            metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
            # run_name "." keeps them in this run: the default makes a run of its own
            writer.add_hparams(choices(module.hparams), metrics, run_name=".")
        writer.flush()

    def _show_run(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if (logger := logger_of(trainer)) is None:
            return
        writer = logger.experiment
        add_layout(writer, "run", LAYOUT)
        text = yaml.safe_dump(dict(module.hparams), sort_keys=False)
        writer.add_text("config", f"```yaml\n{text}```", trainer.global_step)
        images = trainer.datamodule.train_images
        images = images[spread(len(images), self.pairs)].to(module.device)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            views = module.views(images)
        self._add(trainer, logger, "augmentation/views", pictures.view_figure(images, *views))

    def _add_embedding(self, trainer: L.Trainer, writer: Any, evaluation: Evaluation) -> None:
        data, features = trainer.datamodule, evaluation.features[: self.embedding_images].cpu()
        if not features.isfinite().all():
            return
        n, names = len(features), data.class_names
        writer.add_embedding(
            features,
            metadata=None if names is None else [names[i] for i in data.test_labels[:n].tolist()],
            label_img=data.test_images[:n].float() / 255,
            global_step=trainer.global_step,
            tag="test_features",
        )

    def _add(self, trainer: L.Trainer, logger: TensorBoardLogger, tag: str, figure: Figure) -> None:
        # not trainer.log_dir: it asks every process, and only one is here
        folder = Path(logger.log_dir) / "pictures"
        folder.mkdir(exist_ok=True)
        figure.savefig(folder / f"{tag.rpartition('/')[2]}.png", dpi=3 * figure.dpi)
        logger.experiment.add_figure(tag, figure, trainer.global_step)


@contextmanager
def dispensable(what: str) -> Iterator[None]:
    """Within it an error is a warning: what is shown of a run must not cost it."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"{what} are left out: {type(error).__name__}: {error}", stacklevel=3)


def evaluation_figures(data: ImageData, evaluation: Evaluation) -> dict[str, Figure]:
    """The nearest neighbours and, where there are labels, the confusion matrix."""
    names, shown, rows = data.class_names, evaluation.shown, evaluation.neighbours
    images = data.test_images[shown], data.train_images[rows]
    if names is None or evaluation.predicted is None:
        return {"evaluation/nearest_neighbours": pictures.neighbour_figure(*images)}
    labels = data.test_labels[shown]
    same = data.train_labels[rows] == labels[:, None]
    return {
        "evaluation/nearest_neighbours": pictures.neighbour_figure(
            *images, [names[i] for i in labels.tolist()], same
        ),
        "evaluation/confusion_matrix": pictures.confusion_figure(
            data.test_labels[: len(evaluation.predicted)], evaluation.predicted, names
        ),
    }


def choices(config: Mapping[str, Any]) -> dict[str, Any]:
    """What runs are told apart by, as one flat table.

    Example:
        >>> loss = {"_target_": "cosloss.NTXentLoss", "temperature": 0.5}
        >>> choices({"seed": 1, "loss": loss, "name": "simclr"})
        {'seed': 1, 'loss': 'NTXentLoss', 'loss.temperature': 0.5}
    """
    flat = _flat(config)
    return {name: value for name, value in flat.items() if name.startswith(CHOICES)}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif key == "_target_":
            flat[prefix.removesuffix(".")] = value.rpartition(".")[2]
        elif key not in DULL and isinstance(value, bool | int | float | str):
            flat[prefix + key] = value
    return flat
