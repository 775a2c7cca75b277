"""The callbacks in a tiny Lightning run: a right gradient passes, a wrong one does not."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from cosloss import CosineEmbeddingLoss, NTXentLoss, reference
from cosloss.callbacks import GradcheckCallback, GradientDiscrepancyCallback, GradientError


class Halved(torch.autograd.Function):
    """The identity, whose backward forgets a factor of two."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


class HalvedLoss(nn.Module):
    def forward(self, z1, z2):
        return reference.nt_xent_loss(Halved.apply(z1), z2)

    def reference(self):
        return reference.nt_xent_loss


class Model(pl.LightningModule):
    def __init__(self, loss):
        super().__init__()
        self.encoder = nn.Linear(6, 5)
        self.loss = loss

    def training_step(self, batch, batch_idx):
        (x,) = batch
        return self.loss(self.encoder(x), self.encoder(x + 0.1 * torch.randn_like(x)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(loss, callbacks, tmp_path, **options):
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(48, 6))
    model = Model(loss)
    settings = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    trainer = pl.Trainer(callbacks=callbacks, **(settings | options))
    trainer.fit(model, torch.utils.data.DataLoader(data, 12))
    return model


@pytest.mark.parametrize("loss", [CosineEmbeddingLoss(margin=0.1), NTXentLoss()])
@pytest.mark.parametrize("callback", [GradcheckCallback, GradientDiscrepancyCallback])
def test_a_right_gradient_passes(loss, callback, tmp_path):
    check = callback(every_n_batches=2, on_failure="raise")
    train(loss, [check], tmp_path)
    assert (check.checks_run, check.checks_failed) == (3, 0)


@pytest.mark.parametrize("callback", [GradcheckCallback, GradientDiscrepancyCallback])
def test_a_wrong_gradient_raises(callback, tmp_path):
    check = callback(on_failure="raise")
    with pytest.raises(GradientError, match=r"`loss` .* is wrong in batch 0"):
        train(HalvedLoss(), [check], tmp_path)
    assert check.checks_failed == 1


def test_weights_are_the_same_bits(tmp_path):
    both = [GradcheckCallback(every_n_batches=1), GradientDiscrepancyCallback(every_n_batches=2)]
    plain = train(NTXentLoss(), [], tmp_path).state_dict()
    checked = train(NTXentLoss(), both, tmp_path).state_dict()
    assert all(torch.equal(plain[name], checked[name]) for name in plain)
