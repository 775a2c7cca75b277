"""What a run's first page in TensorBoard begins with: is it learning, and is it collapsing?"""

from pathlib import Path

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from torch.utils.tensorboard import SummaryWriter

# TensorBoard sorts by letters' codes: a capital's group comes before the others, and within it the
# figures "gradient of loss on ..." of cosloss.callbacks come third
OVERVIEW = {
    "train/loss": (
        "Overview/1 training loss",
        "The contrastive loss of a batch of training images. It should fall, and level off.",
    ),
    "val/knn": (
        "Overview/2 validation k-NN accuracy",
        """The share of validation images whose class is that of their nearest training images, by
the encoder's features. It should rise; training does not see the classes.""",
    ),
    "representation/effective_rank": (
        "Overview/rank (1: collapsed)",
        """The effective rank: how many directions the embeddings of a batch spread over, from 1,
collapsed, to their number of dimensions. It falls at first, as training finds out what the images
have in common, and should level off well above 1.""",
    ),
    "representation/alignment": (
        "Overview/views' alignment (0: they agree)",
        """The mean squared distance of the two views of an image on the unit sphere: from 0, where
they coincide, to 4; 2 is what strangers have.""",
    ),
    "representation/uniformity": (
        "Overview/uniformity (0: collapsed)",
        """How evenly the embeddings cover the unit sphere: 0 where all coincide, collapsed, and
about -4 where they are spread as at random.""",
    ),
}


class OverviewLogger(TensorBoardLogger):
    """Lightning's, with the scalars of OVERVIEW a second time, side by side and explained.

    `epoch` is left out: a straight line.

    Args:
        directory: of the run.
        run: what TensorBoard calls it, which is the name of the folder of its files in the
            directory; in the directory itself they would be a run called ".".
        purge_step: events of this step and later ones, of an interrupted run, are forgotten.
    """

    def __init__(self, directory: Path, run: str, purge_step: int | None = None) -> None:
        super().__init__(
            directory, name="", version="", default_hp_metric=False, purge_step=purge_step
        )
        self.events = directory / run

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        if self._experiment is None:
            self._experiment = SummaryWriter(self.events, **self._kwargs)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics, step=None) -> None:
        super().log_metrics({n: v for n, v in metrics.items() if n != "epoch"}, step)
        for name, (tag, meaning) in OVERVIEW.items():
            if name in metrics:
                value = scalar_pb(tag, float(metrics[name]), description=meaning)
                self.experiment._get_file_writer().add_summary(value, step)
