"""Lightning's switches, groups left out and loggers: done, or answered in one line."""

import csv
import json
from pathlib import Path

import pytest
import torch

import evaluate
from experiments.simclr.module import SimCLR
from tests.checkpoints import assert_same_bits, weights

SMOKE = ("experiment=simclr_smoke", "callbacks=no_checks", "trainer.max_epochs=2")

# switch: steps that are trained, whether there is a k-NN accuracy, checkpoints that are there
DONE = {
    "+trainer.fast_dev_run=true": (1, True, ""),
    "+trainer.limit_train_batches=2 +trainer.limit_val_batches=1 +trainer.limit_test_batches=1 "
    "trainer.num_sanity_val_steps=1": (4, True, "best last"),
    "+trainer.limit_train_batches=0": (0, True, ""),
    "+trainer.limit_test_batches=0 trainer.log_every_n_steps=0": (8, False, "best last"),
    "trainer.max_epochs=0": (0, True, ""),
    "trainer.max_epochs=-1 +trainer.max_steps=5": (5, True, "best last"),
    "+trainer.enable_checkpointing=false +trainer.enable_progress_bar=false": (8, True, ""),
    "++trainer.logger=false": (8, True, "best last"),
    "+trainer.barebones=true": (8, True, ""),
    "callbacks=[]": (8, True, ""),
}


@pytest.mark.parametrize("switches", DONE)
def test_switches_are_followed(train, tmp_path, switches):
    steps, measured, checkpoints = DONE[switches]
    run = train(*SMOKE, *switches.split(), f"hydra.run.dir={tmp_path}/run")
    assert run.status == 0, run.err
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["steps"] == steps
    assert (results["test/knn"] is not None) == measured
    found = sorted(path.stem for path in tmp_path.rglob("*.ckpt"))
    assert found == checkpoints.split()
    named = next(line for line in run.out.splitlines() if line.startswith("checkpoint:"))
    assert Path(named.split(maxsplit=1)[1]).exists() == ("last" in checkpoints)
    events = list((tmp_path / "run").glob("train/events*"))
    unlogged = "++trainer.logger=false", "+trainer.fast_dev_run=true", "+trainer.barebones=true"
    assert bool(events) == ("tensorboard --logdir" in run.out) == (switches not in unlogged)
    assert "gradients" not in run.out, "callbacks=no_checks"


REFUSED = {
    "trainer.accumulate_grad_batches=0": "accumulate_grad_batches must be at least 1; got 0",
    "trainer.log_every_n_steps=-1": "log_every_n_steps must be at least 0; got -1",
    "trainer.check_val_every_n_epoch=0": "check_val_every_n_epoch must be at least 1; got 0",
    "+trainer.val_check_interval=100": "`val_check_interval` (100)",
    "model.warmup_epochs=-1": "model.warmup_epochs must be at least 0; got -1",
    "model.knn_k=0": "model.knn_k must be at least 1; got 0",
    "callbacks.representation.every_n_batches=0": "every_n_batches must be at least 1; got 0",
    "callbacks=null": "callbacks=[]",
    "loss=null": "loss=[]",
    "++trainer.callbacks=[]": "+callbacks.NAME._target_=PATH",
    "++trainer.logger.save_dir=x": "logger=[csv,wandb]",
    "logger=nothing": "csv; mlflow; wandb",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_cannot_be_done_gets_one_line(train, setting):
    run = train("experiment=simclr_smoke", setting)
    assert run.status == 2, run.err
    assert len(run.err.strip().splitlines()) == 1, run.err
    assert REFUSED[setting] in run.err


@pytest.mark.parametrize(
    "setting", ["trainer.check_val_every_n_epoch=5", "+trainer.limit_val_batches=0"]
)
def test_no_validation_and_so_no_best_checkpoint_is_told(train, tmp_path, setting):
    with pytest.warns(UserWarning, match=r"no best\.ckpt, as no epoch was validated"):
        run = train(*SMOKE, setting, f"hydra.run.dir={tmp_path}/run")
    assert run.status == 0, run.err
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ["last.ckpt"]


def test_overfitting_sees_the_same_batches_in_each_epoch(train, tmp_path, monkeypatch):
    step, seen = SimCLR.training_step, []

    def recorded(self, batch, batch_idx):
        seen.append(batch["index"].tolist())
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SimCLR, "training_step", recorded)
    overfit = "+trainer.overfit_batches=2", f"hydra.run.dir={tmp_path}/run"
    assert train(*SMOKE, *overfit).status == 0
    assert seen[:2] == seen[2:]
    assert seen[0] != seen[1]


def test_the_best_so_far_goes_on_with_another_period_of_validation(train, tmp_path, monkeypatch):
    run = f"hydra.run.dir={tmp_path}/run"
    scores = iter([0.9, 0.8, 0.1, 0.1])
    monkeypatch.setattr(
        "experiments.simclr.evaluation.probes.knn_accuracy", lambda *a, **k: next(scores)
    )
    assert train(*SMOKE, run, "+trainer.limit_test_batches=0").status == 0
    best = weights(tmp_path / "run", "best.ckpt")
    more = "trainer.max_epochs=4", "trainer.check_val_every_n_epoch=2", "ckpt_path=last"
    assert train(*SMOKE, run, "+trainer.limit_test_batches=0", *more).status == 0
    assert_same_bits(weights(tmp_path / "run", "best.ckpt"), best)
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["epoch"] == 3


def test_a_table_of_the_scalars_beside_tensorboard(train, tmp_path):
    run = tmp_path / "run"
    assert train(*SMOKE, "logger=csv", f"hydra.run.dir={run}").status == 0
    more = "trainer.max_epochs=3", "ckpt_path=last"
    assert train(*SMOKE, "logger=csv", f"hydra.run.dir={run}", *more).status == 0
    assert list(run.glob("train/events*"))
    for version, steps in (("version_0", range(8)), ("version_1", range(8, 12))):
        rows = list(csv.DictReader((run / "csv" / version / "metrics.csv").open()))
        assert [int(r["step"]) for r in rows if r["train/loss"]] == list(steps)
        assert [r["test/knn"] for r in rows if r["test/knn"]]
        assert "max_epochs" in (run / "csv" / version / "hparams.yaml").read_text()


@pytest.mark.parametrize("module", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_says_what_to_install(train, module):
    try:
        __import__(module)
    except ModuleNotFoundError:
        run = train(*SMOKE, f"logger={module}")
        assert run.status == 2
        assert "pip install" in run.err
    else:
        pytest.skip(f"{module} is installed")


def test_a_home_folder_in_quotes_is_expanded(train, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = train(*SMOKE, "data=image_folder", 'data.root="~/nowhere"')
    assert run.status == 2
    assert f"{tmp_path}/nowhere" in run.err
    assert train(*SMOKE, "trainer.max_epochs=0", 'hydra.run.dir="~/my run"').status == 0
    assert (tmp_path / "my run/results.json").exists()


def test_evaluate_expands_it_too(in_process, tmp_path, monkeypatch, smoke_run):
    monkeypatch.setenv("HOME", str(smoke_run.parent))
    run = in_process(evaluate.main, ["ckpt_path='~/run'", f"out='{tmp_path}/out'"])
    assert run.status == 0, run.err
    assert (tmp_path / "out/results.json").exists()
