"""The throughput benchmark on a few tiny steps."""

from functools import partial

import pytest

from cosloss import NTXentLoss
from experiments.benchmarks.__main__ import main
from experiments.simclr.encoders import SmallConvNet

pytest.importorskip("lightly", reason="lightly is in the [bench] extra")
throughput = pytest.importorskip("experiments.benchmarks.throughput")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    encoders = {"tiny": partial(SmallConvNet, width=4, features=8)}
    sizes = {"BATCH": 8, "STEPS": 4, "WARM_UP": 1, "PROFILED_STEPS": 4, "ENCODERS": encoders}
    for name, value in sizes.items():
        monkeypatch.setattr(throughput, name, value)


def test_it_prints_rates_and_parts(capsys):
    assert throughput.run(rounds=1)
    out = capsys.readouterr().out
    assert "\nlightly, workers: 0 " in out
    for part in ("loader", "augmentation", "encoder and head", "loss", "Lightning and callbacks"):
        assert f"\n{part} " in out
    assert "wrong" not in out


def test_the_rival_sees_all_images_through_its_own_transforms():
    loader = throughput.lightly_loader(steps=3, workers=0)
    batches = list(loader)
    assert len(batches) >= 3
    for view1, view2 in batches:
        assert view1.shape == view2.shape == (8, 3, 32, 32)
        assert not view1.equal(view2)
        assert view1.min() < -1  # standardised


def test_the_rivals_workers_never_rest():
    """Two batches for each of them are left when the last step begins."""
    assert len(throughput.lightly_loader(steps=3, workers=2)) >= 3 + 2 * 2


def test_one_encoder_can_be_chosen(monkeypatch):
    measured = []
    monkeypatch.setattr(throughput, "_compare", lambda name, *more: measured.append(name))
    monkeypatch.setattr(throughput, "_profile", lambda name, *more: measured.append(name))
    monkeypatch.setitem(throughput.ENCODERS, "resnet18", None)
    assert main(["throughput", "--rounds", "1", "--encoder", "resnet18"]) == 0
    assert measured == ["resnet18"] * 2


def test_a_loss_that_differs_gets_no_speed_up(monkeypatch, capsys):
    monkeypatch.setattr(throughput, "NTXentLoss", lambda temperature: NTXentLoss(2 * temperature))
    monkeypatch.setattr(throughput, "_profile", lambda *arguments: None)
    monkeypatch.setattr(throughput, "_seconds_per_step", lambda *arguments: 1.0)
    assert not throughput.run(rounds=1)
    assert "wrong" in capsys.readouterr().out
