"""The randomness of a step as a function of the seed and the step's place alone."""

import hashlib

import lightning as L
import torch


def step_seed(*place: int | str) -> int:
    """A 63-bit seed from a tuple such as (seed, "train", epoch, batch, rank)."""
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class SeedEachStep(L.Callback):
    """Seed torch before each batch, so that a resumed run draws what an uninterrupted one draws.

    No random state needs to be in a checkpoint, and what validation or another callback draws
    between two steps cannot change training.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        place = self.seed, "train", trainer.current_epoch, batch_idx, trainer.global_rank
        torch.manual_seed(step_seed(*place))

    def on_validation_batch_start(
        self, trainer, module, batch, batch_idx, dataloader_idx=0
    ) -> None:
        torch.manual_seed(step_seed(self.seed, "validation", batch_idx, trainer.global_rank))
