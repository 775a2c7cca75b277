"""Failures as files: they load as plain data, and running them again gives the same verdict."""

import re
from dataclasses import dataclass
from enum import Enum

import pytest
import torch
from torch import nn

from cosloss import NTXentLoss, reference, verify
from cosloss.callbacks import GradcheckCallback, GradientDiscrepancyCallback
from cosloss.replay import replay
from cosloss.watch import GradientWatch
from tests.callbacks import planted
from tests.callbacks.runs import TwoViews, train


class Kind(Enum):
    HALF = 0.5
    WHOLE = 1.0


@dataclass(frozen=True)
class Options:
    kind: Kind
    margins: tuple[float | None, ...]


class Scaled(nn.Module):
    """A wrong loss with what a loss may consist of: parts, parameters, buffers, functions."""

    def __init__(self):
        super().__init__()
        self.inner = NTXentLoss(temperature=0.3)
        self.weight = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("steps", torch.tensor(99))
        self.options, self.kind = Options(Kind.HALF, (0.1, None)), Kind.WHOLE
        self.measure, self.settings = torch.tanh, {"margins": (0.1, [2, None]), "on": True}

    def forward(self, views, k):
        late = {"step": int(self.steps)}
        z1, z2 = (self.measure(z) for z in views)
        assert self.options.kind is Kind.HALF
        assert self.kind is Kind.WHOLE
        return self.weight * k * self.inner(planted.Late.apply(z1, late), z2)


def twin_of_scaled(views, k, weight=1.5):
    z1, z2 = (torch.tanh(z) for z in views)
    return weight * k * reference.nt_xent_loss(z1, z2, temperature=0.3)


class Model(TwoViews):
    def training_step(self, batch, batch_idx):
        return self.loss(self.views(batch), k=3)


def failures(model, check, tmp_path, **options):
    with pytest.warns(UserWarning, match="reproduce it: python -m cosloss.verify --replay"):
        train(model, [check], tmp_path, **options)
    return sorted((tmp_path / "gradient_failures").glob("*.pt"))


@pytest.mark.parametrize("check", [GradcheckCallback, GradientDiscrepancyCallback])
def test_a_failure_is_reproduced_and_a_repair_seen(check, tmp_path, monkeypatch, capsys):
    path, *_ = failures(
        TwoViews(planted.PlantedLoss(planted.negated)), check(), tmp_path, batches=1
    )
    assert torch.load(path, weights_only=True)["check"]["kind"] == check.prefix
    assert verify.main(["--replay", str(path)]) == 1
    assert "now:" in capsys.readouterr().out
    monkeypatch.setattr(planted, "negated", planted.right)
    assert replay(path) == 0


def test_parts_parameters_and_functions_are_restored(tmp_path, capsys):
    model = Model(Scaled())
    model.loss.weight.requires_grad_(False)
    check = GradientDiscrepancyCallback(twin=twin_of_scaled)
    path, *_ = failures(model, check, tmp_path, precision="bf16-mixed", batches=1)
    assert replay(path) == 1
    now = capsys.readouterr().out.split("now:")[1]
    assert re.search(r"views\.0: off by .* it is 0\.9\d* times the right one", now)


def test_a_straight_through_estimator_is_replayed_as_one(tmp_path):
    check = GradcheckCallback(surrogate=True)
    path, *_ = failures(TwoViews(planted.StraightThroughLoss(0.5)), check, tmp_path, batches=1)
    assert replay(path) == 1
    record = torch.load(path, weights_only=True)
    record["loss"][2][1] = [["slope", 1.0]]
    torch.save(record, path)
    assert replay(path) == 0


def test_what_cannot_be_saved_is_said(tmp_path):
    check = GradientDiscrepancyCallback(twin=lambda views, k: twin_of_scaled(views, k))
    with pytest.warns(UserWarning, match="could not be saved .* has no name to import it by"):
        train(Model(Scaled()), [check], tmp_path, batches=1)


class WritesInto(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, into):
        kept = x.clone()
        ctx.save_for_backward(kept)
        ctx.into = into
        if into == "argument":
            x.data.zero_()
        return kept.square()

    @staticmethod
    def backward(ctx, grad):
        (kept,) = ctx.saved_tensors
        return (grad.mul_(2 * kept) if ctx.into == "gradient" else 2 * grad * kept), None


class Overwrites(nn.Module):
    def __init__(self, into):
        super().__init__()
        self.into = into

    def forward(self, x):
        return WritesInto.apply(x, self.into)


@pytest.mark.parametrize("into", ["argument", "gradient"])
def test_what_writes_over_others_numbers_is_replayed_as_that(into, tmp_path, capsys, monkeypatch):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.loss = nn.Linear(4, 4), Overwrites(into)

        def forward(self, x):
            y = self.linear(x).exp()
            return self.loss(y) + (y.detach() if into == "argument" else y * 1)

    model = Residual()
    watch = GradientWatch(model, directory=tmp_path)

    def step():
        with watch.step():
            model(torch.randn(6, 4)).backward(torch.randn(6, 4))

    with pytest.warns(UserWarning, match="writes over"):
        step()
    (path,) = tmp_path.iterdir()
    assert replay(path) == 1
    assert (
        f"writes over its {'argument x' if into == 'argument' else 'incoming'}"
        in capsys.readouterr().out
    )
    monkeypatch.setattr(WritesInto, "forward", staticmethod(lambda ctx, x, into: keep(ctx, x)))
    assert replay(path) == 0


def keep(ctx, x):
    ctx.save_for_backward(x)
    ctx.into = ""
    return x.square()


def test_few_files_are_written(tmp_path):
    check = GradcheckCallback(1)
    assert len(failures(TwoViews(planted.PlantedLoss(planted.zero)), check, tmp_path)) == 3


def test_foreign_files_are_refused(tmp_path, capsys):
    torch.save({"weights": torch.ones(1)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="not written by a gradient check"):
        replay(tmp_path / "model.pt")
    path, *_ = failures(
        TwoViews(planted.PlantedLoss(planted.zero)), GradcheckCallback(), tmp_path, batches=1
    )
    record = torch.load(path, weights_only=True)
    record["loss"][1] = "no_such_package:Loss"
    torch.save(record, path)
    with pytest.raises(ValueError, match="run this from your project's folder"):
        replay(path)
    assert verify.main(["--replay", str(path)]) == 2
    assert "run this from your project's folder" in capsys.readouterr().err
    (tmp_path / "notes.pt").write_text("no archive")
    assert verify.main(["--replay", str(tmp_path / "notes.pt")]) == 2
    assert verify.main(["--replay", str(tmp_path / "missing.pt")]) == 2
    record["loss"][1] = "os:system"
    torch.save(record, path)
    with pytest.raises(ValueError, match=r"not an nn\.Module"):
        replay(path)
