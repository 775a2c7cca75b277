"""Is the representation collapsing? Four scalars while training, and one warning."""

import warnings

import lightning as L

from experiments.simclr.evaluation.representation import has_collapsed, representation_statistics

ADVICE = (
    "every image is given nearly the same embedding, and training on is of little use. Try a lower "
    "optimizer.lr or a longer warm-up, a larger data.batch_size, a loss with negatives, and look "
    "at the views in TensorBoard"
)


class RepresentationMonitor(L.Callback):
    """Log how well the training batch's embeddings are spread, and warn once if they collapse.

    Logs `representation/{embedding_std,effective_rank,alignment,uniformity}`, which
    `representation_statistics` explains, of the LightningModule's `embeddings`: those of the last
    batch's two views.

    Args:
        every_n_batches: how often; the first batch is always looked at.
        patience: how many times in a row the embeddings must have collapsed for the warning.

    Attributes:
        collapsed: whether it has warned.
    """

    def __init__(self, every_n_batches: int = 50, patience: int = 3) -> None:
        if every_n_batches < 1:
            raise ValueError(f"every_n_batches must be at least 1; got {every_n_batches}")
        self.every_n_batches = every_n_batches
        self.patience = patience
        self.collapsed = False
        self._in_a_row = 0
        self._logged = -1

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        loop = trainer.fit_loop.epoch_loop
        batches, step = loop.total_batch_idx, loop._batches_that_stepped
        # one value per step, which may have several batches
        if batches % self.every_n_batches or step == self._logged or not trainer.is_global_zero:
            return
        self._logged = step
        z1, z2 = module.embeddings
        found = representation_statistics(z1, z2)
        for logger in trainer.loggers:
            scalars = {f"representation/{name}": value for name, value in found.items()}
            logger.log_metrics(scalars, step)
        self._in_a_row = self._in_a_row + 1 if has_collapsed(found, z1.shape[1]) else 0
        if self._in_a_row == self.patience and not self.collapsed:
            self.collapsed = True
            warnings.warn(
                f"the embeddings have collapsed by batch {batches}: their standard deviation is "
                f"{found['embedding_std']:.2g} of that of random directions, their effective rank "
                f"{found['effective_rank']:.1f} of {z1.shape[1]}: {ADVICE}",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, int | bool]:
        return {"collapsed": self.collapsed, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict) -> None:
        self.collapsed, self._in_a_row = state_dict["collapsed"], state_dict["in_a_row"]
