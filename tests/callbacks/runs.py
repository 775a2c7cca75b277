"""Tiny Lightning runs that the tests of the callbacks share."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cosloss.callbacks import GradcheckCallback, GradientDiscrepancyCallback


class TwoViews(L.LightningModule):
    """Two noisy views of random vectors through a linear encoder, and any loss(z1, z2)."""

    def __init__(self, loss, name="loss", lr=0.02):
        super().__init__()
        self.encoder = nn.Linear(6, 8)
        self.name, self.lr = name, lr
        setattr(self, name, loss)

    def views(self, batch):
        (x,) = batch
        return self.encoder(x), self.encoder(x + 0.3 * torch.randn_like(x))

    def training_step(self, batch, batch_idx):
        loss = getattr(self, self.name)
        if hasattr(loss, "clock"):
            loss.clock["step"] = self.trainer.fit_loop.total_batch_idx
        return loss(*self.views(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def trainer_for(tmp_path, callbacks, **options):
    quiet = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return L.Trainer(callbacks=callbacks, **(quiet | options))


def data(batches=4, rows=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(torch.randn(batches * rows, 6, generator=generator)), rows)


def train(model, callbacks, tmp_path, batches=4, rows=12, seed=0, **options):
    """Fit `model`, or a new TwoViews around a loss, for one epoch; returns the model."""
    torch.manual_seed(seed)
    if not isinstance(model, L.LightningModule):
        model = TwoViews(model)
    trainer = trainer_for(tmp_path, callbacks, **options)
    trainer.fit(model, data(batches, rows, seed))
    return model


def both(n=1, **options):
    return [GradcheckCallback(n, **options), GradientDiscrepancyCallback(n, **options)]


def strict(n=1, **options):
    return both(n, on_failure="raise", **options)
