"""How often the gradient checks accuse a right gradient: python -m experiments.studies.false_alarms

Trains a small encoder on random vectors with three losses at once, both callbacks on each, and
counts checks and failures over seeds and precisions. Any failure is a false alarm. With
`--functions` it compares right functions with one another instead, at random points.
"""

import argparse
import logging
import warnings
from collections import Counter
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cosloss import CosineEmbeddingLoss, NTXentLoss
from cosloss.callbacks import GradcheckCallback, GradientDiscrepancyCallback
from experiments.studies import right_functions

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


class ThreeLosses(L.LightningModule):
    """In-batch cosine, NT-Xent and labelled cosine loss of two noisy views; D is odd."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 17))
        self.in_batch = CosineEmbeddingLoss(margin=0.1)
        self.nt_xent = NTXentLoss(temperature=0.2)
        self.labelled = CosineEmbeddingLoss(margin=-0.2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (x,) = batch
        z1, z2 = (self.encoder(x + 0.5 * torch.randn_like(x)) for _ in range(2))
        target = torch.where(torch.rand(len(x)) < 0.5, 1, -1)
        return self.in_batch(z1, z2) + self.nt_xent(z1, z2) + self.labelled(z1, z2, target)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def run(precision: str, seed: int, steps: int, rows: int, path: str) -> list[Any]:
    """One run; returns the two callbacks, with their counts."""
    L.seed_everything(seed, verbose=False)
    losses = {name: name for name in ("in_batch", "nt_xent", "labelled")}
    checks = [
        GradcheckCallback(every_n_batches=100, target=losses),
        GradientDiscrepancyCallback(every_n_batches=10, target=losses),
    ]
    options: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed" and not torch.cuda.is_available():
        # Lightning itself offers float16 on the CPU as a plugin only
        options = {
            "plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))]
        }
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="auto",
        devices=1,
        logger=False,
        callbacks=list(checks),
        default_root_dir=path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(ThreeLosses(), DataLoader(TensorDataset(torch.randn(50 * rows, 16)), rows))
    return checks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 20), metavar=("FIRST", "END"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--path", default="logs/false_alarms", help="where failures are saved")
    parser.add_argument("--functions", action="store_true", help="functions in place of training")
    parser.add_argument("--minutes", type=float, default=10.0, help="of functions")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    counts: Counter[str] = Counter()
    if arguments.functions:
        counts = right_functions.count(arguments.minutes, arguments.seeds[0])
    for precision in () if arguments.functions else arguments.precision:
        for seed in range(*arguments.seeds):
            for check in run(precision, seed, arguments.steps, arguments.rows, arguments.path):
                counts[f"{precision} {check.prefix} checks"] += check.checks_run
                counts[f"{precision} {check.prefix} false alarms"] += check.checks_failed
    for name, count in counts.items():
        print(f"{name}: {count}")
    return int(any(count for name, count in counts.items() if "false alarms" in name))


if __name__ == "__main__":
    raise SystemExit(main())
