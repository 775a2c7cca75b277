"""What a run's first page in TensorBoard begins with: is it learning, and is it collapsing?"""

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tensorboard.plugins.scalar.summary_v2 import scalar_pb

# TensorBoard sorts groups by their letters' codes: a capital comes before all other groups
OVERVIEW = {
    "train/loss": (
        "Overview/1 loss, training",
        "The contrastive loss of a batch of training images. It should fall, and level off.",
    ),
    "val/knn": (
        "Overview/2 k-NN accuracy, validation",
        """The share of validation images whose class is that of their nearest training images, by
the encoder's features. It should rise; training does not see the classes.""",
    ),
    "representation/effective_rank": (
        "Overview/3 effective rank (1: collapsed)",
        """How many directions the embeddings of a batch spread over: from 1, collapsed, to their
number of dimensions. It falls at first, as training finds out what the images have in common, and
should level off well above 1.""",
    ),
    "representation/alignment": (
        "Overview/4 alignment (0: views agree)",
        """The mean squared distance of the two views of an image on the unit sphere: from 0, where
they coincide, to 4; 2 is what strangers have.""",
    ),
    "representation/uniformity": (
        "Overview/5 uniformity (0: collapsed)",
        """How evenly the embeddings cover the unit sphere: 0 where all coincide, collapsed, and
about -4 where they are spread as at random.""",
    ),
}


class OverviewLogger(TensorBoardLogger):
    """Lightning's, with the scalars of OVERVIEW a second time, side by side and explained."""

    @rank_zero_only
    def log_metrics(self, metrics, step=None) -> None:
        super().log_metrics(metrics, step)
        for name, (tag, meaning) in OVERVIEW.items():
            if name in metrics:
                value = scalar_pb(tag, float(metrics[name]), description=meaning)
                self.experiment._get_file_writer().add_summary(value, step)
