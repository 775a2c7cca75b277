"""Two processes of a DDP run, for test_ddp.py: ddp_run.py FOLDER right|stop|raise ..."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_gather

from cosloss import reference
from cosloss.callbacks import GradcheckCallback, GradientDiscrepancyCallback
from tests.callbacks import planted
from tests.callbacks.runs import TwoViews, train


class Gathering(nn.Module):
    """NT-Xent with the negatives of all processes, which `gather_distributed` says."""

    def __init__(self):
        super().__init__()
        self.gather_distributed = True

    def forward(self, z1, z2):
        if self.gather_distributed:
            z1, z2 = (torch.cat(all_gather(z)) for z in (z1, z2))
        return reference.nt_xent_loss(z1, z2)

    def reference(self):
        return reference.nt_xent_loss


class WrongOnTheSecond(planted.PlantedLoss):
    """A loss whose gradient is wrong on one process alone."""

    def __init__(self):
        super().__init__(planted.right)

    def forward(self, z1, z2):
        self.rule = planted.negated if dist.get_rank() == 1 else planted.right
        return super().forward(z1, z2)


class Model(TwoViews):
    def __init__(self, loss, checks, folder):
        super().__init__(loss)
        self.checks = checks
        self.folder = folder

    def on_fit_end(self):
        counts = [f"{c.checks_run} {c.checks_failed} {c.batches_seen}" for c in self.checks]
        (self.folder / f"rank{self.global_rank}").write_text("\n".join(counts))


def main(folder: Path, mode: str) -> None:
    folder.mkdir()
    on_failure = "raise" if mode == "right" else mode
    checks = [GradcheckCallback(2, on_failure), GradientDiscrepancyCallback(2, on_failure)]
    loss = Gathering() if mode == "right" else WrongOnTheSecond()
    model = Model(loss, checks, folder)
    train(model, checks, folder, batches=6, strategy="ddp_fork", devices=2)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        main(Path(sys.argv[1]) / name, name)
