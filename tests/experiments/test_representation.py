"""Embedding statistics against closed forms; a planted collapse is told once, a sound run never."""

import math
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from experiments.simclr.callbacks.representation import RepresentationMonitor
from experiments.simclr.evaluation.representation import has_collapsed, representation_statistics


def test_statistics_of_a_known_spectrum():
    """Rows e1 (three times) and e2 (once): singular values sqrt(3) and 1, twice the rows."""
    z = torch.eye(4)[[0, 0, 0, 1]] * torch.tensor([[5.0], [1e-3], [1e3], [2.0]])
    found = representation_statistics(z, z)
    shares = [math.sqrt(3) / (1 + math.sqrt(3)), 1 / (1 + math.sqrt(3))]
    assert found["effective_rank"] == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))
    deviations = [math.sqrt(3 / 16), math.sqrt(3 / 16), 0, 0]
    assert found["embedding_std"] == pytest.approx(2 * sum(deviations) / 4)
    # of six pairs, three are equal and three have squared distance 2
    assert found["uniformity"] == pytest.approx(math.log((3 + 3 * math.exp(-4)) / 6))
    assert found["alignment"] == 0


def test_alignment_is_the_squared_distance_of_the_views():
    z1 = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    z2 = torch.tensor([[0.0, 3.0], [0.0, 1.0]])
    assert representation_statistics(z1, z2)["alignment"] == pytest.approx(1)


def test_uniformity_and_rank_of_random_directions():
    z = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    found = representation_statistics(z, -z)
    assert found["embedding_std"] == pytest.approx(1, abs=0.01)
    assert found["uniformity"] == pytest.approx(-4, abs=0.15)
    assert 55 < found["effective_rank"] < 64
    assert not has_collapsed(found, 64)


def test_only_so_many_rows_are_looked_at():
    z = torch.randn(2000, 8)
    assert representation_statistics(z, z) == representation_statistics(z[:512], z[:512])


def test_collapses_to_a_point_a_line_and_zero():
    generator = torch.Generator().manual_seed(0)
    direction, noise = torch.randn(1, 64), torch.randn(256, 64, generator=generator)
    sign = torch.randn(256, 1, generator=generator).sign()
    point = representation_statistics(direction + 0.03 * noise, direction - 0.03 * noise)
    assert point["embedding_std"] < 0.1
    line = representation_statistics(sign * direction + 0.003 * noise, sign * direction)
    assert line["embedding_std"] > 0.5
    assert line["effective_rank"] < 2
    zero = representation_statistics(torch.zeros(4, 64), torch.zeros(4, 64))
    for found in (point, line, zero):
        assert has_collapsed(found, 64), found
    # in two dimensions a line is half of all there is
    assert not has_collapsed(line, 2)


def test_embeddings_that_are_nan_give_nan():
    found = representation_statistics(torch.full((4, 8), math.nan), torch.ones(4, 8))
    assert all(math.isnan(value) for value in found.values())
    assert not has_collapsed(found, 8)


class Toy(LightningModule):
    """Embeds noisy vectors; with `attract`, only pulls everything together, which collapses."""

    def __init__(self, attract: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 16)
        self.attract = attract

    def training_step(self, batch, batch_idx):
        x = torch.randn(32, 8)
        z1, z2 = (self.layer(x + 0.1 * torch.randn(32, 8)) for _ in range(2))
        self.embeddings = z1.detach(), z2.detach()
        if self.attract:
            return (z1 - torch.ones(16)).square().mean() + (z2 - torch.ones(16)).square().mean()
        return (z1 @ z1.T - torch.eye(32)).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


def fit(attract, path, **options):
    torch.manual_seed(0)
    monitor = RepresentationMonitor(every_n_batches=5)
    trainer = Trainer(
        max_steps=100,
        accelerator="cpu",
        callbacks=[monitor],
        logger=CSVLogger(path, name="", version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Toy(attract), torch.zeros(40, 1))
    return monitor, [str(w.message) for w in caught if "collapsed" in str(w.message)]


def test_a_planted_collapse_is_told_once_with_what_to_do(tmp_path):
    monitor, told = fit(True, tmp_path)
    assert monitor.collapsed
    assert len(told) == 1
    assert "effective rank" in told[0]
    assert "lower optimizer.lr" in told[0]
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert "representation/uniformity" in rows[0]
    assert len(rows) == 1 + 100 // 5
    resumed = RepresentationMonitor()
    resumed.load_state_dict(monitor.state_dict())
    assert resumed.collapsed


def test_a_sound_run_is_told_nothing(tmp_path):
    monitor, told = fit(False, tmp_path)
    assert not monitor.collapsed
    assert not told
