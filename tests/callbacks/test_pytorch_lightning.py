"""The callbacks in pytorch_lightning, the other name of Lightning."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cosloss import NTXentLoss
from cosloss.callbacks import GradcheckCallback, GradientDiscrepancyCallback, StepCheckCallback
from tests.callbacks.planted import PlantedLoss, negated

pl = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning comes with [bench]")


@pytest.mark.parametrize("wrong", [False, True])
def test_all_callbacks_judge(wrong, tmp_path):
    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(8, 8)
            self.loss = PlantedLoss(negated) if wrong else NTXentLoss()

        def training_step(self, batch):
            (x,) = batch
            return self.loss(self.net(x), self.net(x + 0.1 * torch.randn_like(x)))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    checks = [GradcheckCallback(1), GradientDiscrepancyCallback(1), StepCheckCallback(1)]
    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        callbacks=[*checks],
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        logger=pl.loggers.CSVLogger(tmp_path),
    )
    data = TensorDataset(torch.randn(32, 8, generator=torch.Generator().manual_seed(0)))
    trainer.fit(Model(), DataLoader(data, 16))
    assert [c.checks_run for c in checks] == [2, 2, 2]
    assert [c.checks_failed for c in checks] == [2 * wrong] * 3
    assert (
        "gradcheck/loss/passed" in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    )


@pytest.mark.slow
def test_the_callbacks_need_no_package_of_the_name_lightning():
    program = "import sys; sys.modules['lightning'] = None; import cosloss.callbacks as c; "
    program += "import pytorch_lightning as pl; assert issubclass(c.GradcheckCallback, pl.Callback)"
    subprocess.run([sys.executable, "-c", program], check=True)
