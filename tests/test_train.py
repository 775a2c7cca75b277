"""python train.py as a person runs it: results, determinism, mistakes, sweeps, every loss."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cosloss.replay import replay
from tests.checkpoints import assert_same_bits, weights
from tests.slow import slow

ROOT = Path(__file__).parents[1]
SMOKE = "experiment=simclr_smoke"


def test_smoke_run_leaves_results_checkpoints_and_what_to_type(smoke_run):
    results = json.loads((smoke_run / "results.json").read_text())
    for name in ("test/knn", "test/linear", "raw_pixels/knn"):
        assert 0 <= results[name] <= 1
    assert results["gradient_checks/run"] > 0
    assert results["gradient_checks/failed"] == 0
    assert results["wall_seconds"] > 0
    assert (smoke_run / "checkpoints/best.ckpt").exists()
    said = (smoke_run.parent / "stdout").read_text()
    assert f"tensorboard --logdir {smoke_run}" in said
    assert str(smoke_run / "checkpoints/last.ckpt") in said


def test_callbacks_do_not_change_the_weights(smoke_run, train, tmp_path):
    assert train(SMOKE, "callbacks=no_checks", f"hydra.run.dir={tmp_path}/off").status == 0
    assert_same_bits(weights(smoke_run), weights(tmp_path / "off"))
    assert train(SMOKE, "seed=1", f"hydra.run.dir={tmp_path}/other").status == 0
    with pytest.raises(AssertionError):
        assert_same_bits(weights(smoke_run), weights(tmp_path / "other"))


MISTAKES = {
    "unknown experiment": (["experiment=nothing"], ["nothing", "simclr_smoke"]),
    "unknown loss": ([SMOKE, "loss=nothing"], ["nothing", "cosine_embedding", "nt_xent"]),
    "unknown key": ([SMOKE, "trainer.max_epoch=3"], ["no setting trainer.max_epoch", "max_epochs"]),
    "misspelt": ([SMOKE, "loss=nt_xent", "loss.temperatur=1"], ["loss.temperatur;", "reduction"]),
    "misspelt and added": ([SMOKE, "+loss.temperatur=1"], ["loss.temperatur;", "negative_weight"]),
    "left out of the file": ([SMOKE, "loss.reduction=sum"], ["+loss.reduction=sum"]),
    "unknown added key": ([SMOKE, "+foo.bar=1"], ["no setting foo", "optimizer"]),
    "wrong type": ([SMOKE, "trainer.max_epochs=many"], ["trainer.max_epochs", "many"]),
    "wrong type of the seed": ([SMOKE, "seed=abc"], ["seed", "abc"]),
    "temperature": ([SMOKE, "loss=nt_xent", "loss.temperature=-0.1"], ["temperature", "-0.1"]),
    "margin": ([SMOKE, "loss.margin=7"], ["margin", "7"]),
    "learning rate": ([SMOKE, "optimizer.lr=-1"], ["-1"]),
    "batch": ([SMOKE, "data.batch_size=100000"], ["100000", "batch_size"]),
    "no data root": (["data=image_folder", "data.root=/nowhere"], ["/nowhere"]),
    "no checkpoint": ([SMOKE, "ckpt_path=nothing.ckpt"], ["nothing.ckpt"]),
    "no last run": ([SMOKE, "ckpt_path=last"], ["last"]),
    "no directory": ([SMOKE, "hydra.run.dir=/dev/null/run"], ["/dev/null/run"]),
    "no GPU": ([SMOKE, "trainer=gpu"], ["gpu"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_and_status_2(train, tmp_path, mistake):
    if mistake == "no GPU" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    arguments, words = MISTAKES[mistake]
    run = train(*arguments)
    assert run.status == 2, run.err
    assert len(run.err.strip().splitlines()) == 1, run.err
    for word in words:
        assert word in run.err
    assert not list(tmp_path.rglob("*.*")), "it left something behind"


def test_debug_shows_the_traceback(train):
    with pytest.raises(Exception, match="temperature must be positive; got 0"):
        train(SMOKE, "loss=nt_xent", "loss.temperature=0", "debug=true")


def test_truncated_checkpoint_and_another_models(smoke_run, train, tmp_path):
    whole = smoke_run / "checkpoints/last.ckpt"
    for name, size in (("half", whole.stat().st_size // 2), ("empty", 0)):
        (tmp_path / name).write_bytes(whole.read_bytes()[:size])
        run = train(SMOKE, f"ckpt_path={tmp_path / name}")
        assert run.status == 2
        assert f"{tmp_path / name} is not a whole checkpoint" in run.err
    run = train(SMOKE, f"ckpt_path={whole}", "model.encoder.width=16")
    assert run.status == 2
    assert "is from another model" in run.err


def test_a_used_directory_is_not_overwritten(smoke_run, train):
    before = {p: p.stat().st_mtime_ns for p in smoke_run.rglob("*")}
    run = train(SMOKE, f"hydra.run.dir={smoke_run}")
    assert run.status == 2
    assert "already holds a run" in run.err
    assert {p: p.stat().st_mtime_ns for p in smoke_run.rglob("*")} == before


def test_flat_folder_without_labels_trains_and_says_what_is_left_out(train, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(80):
        Image.effect_noise((24, 20), 100).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"not a picture")
    data = "data=image_folder", f"data.root={folder}"
    with pytest.warns(UserWarning, match="left out"):
        run = train(SMOKE, *data, f"hydra.run.dir={tmp_path}/run")
    assert run.status == 0, run.err
    assert "the data has no labels" in run.out
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["test/knn"] is None
    assert (tmp_path / "run/checkpoints/best.ckpt").exists()


def test_class_folders_of_any_name_leave_results(train, tmp_path):
    for i in range(80):
        name = (os.fsdecode(b"caf\xe9"), "two\nlines", "$x$", "tab\there")[i % 4]
        path = tmp_path / "images" / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((24, 20), 100).save(path)
    data = "data=image_folder", f"data.root={tmp_path}/images", "data.batch_size=32"
    run = train(SMOKE, *data, "callbacks=no_checks", f"hydra.run.dir={tmp_path}/run")
    assert run.status == 0, run.err
    assert json.loads((tmp_path / "run/results.json").read_text())["test/knn"] is not None
    (names,) = (tmp_path / "run/train").glob("*/test_features/metadata.tsv")
    assert set(names.read_text().splitlines()) <= {r"caf\xe9", r"two\nlines", "$x$", r"tab\there"}
    for name in ("nearest_neighbours", "confusion_matrix"):
        assert (tmp_path / f"run/pictures/{name}.png").exists()


@pytest.mark.slow
def test_max_time_ends_the_run_with_results(train, tmp_path):
    run = tmp_path / "run"
    time_limit = "trainer.max_epochs=10000", "trainer.max_time=00:00:00:03"
    assert train(SMOKE, *time_limit, "callbacks=no_checks", f"hydra.run.dir={run}").status == 0
    results = json.loads((run / "results.json").read_text())
    assert 0 < results["epochs"] < 10000
    assert results["test/knn"] is not None
    assert results["wall_seconds"] < 60


LOSSES = sorted(path.stem for path in ROOT.glob("configs/loss/*.yaml"))
TWINS = [name for name in LOSSES if name.endswith("_reference")]


@pytest.mark.parametrize("twin_loss", [TWINS[0], *slow(*TWINS[1:])])
def test_training_on_the_twin_gives_the_same_curve(train, tmp_path, twin_loss):
    # in float64 and without AdamW's division, which makes much of a rounding in a small gradient
    exact = "trainer.precision=64-true", "optimizer=sgd", "callbacks=no_checks"
    found, curves = [], []
    for name in (twin_loss.removesuffix("_reference"), twin_loss):
        run = tmp_path / name
        assert train(SMOKE, *exact, f"loss={name}", f"hydra.run.dir={run}").status == 0
        found.append({n.removeprefix("loss."): w for n, w in weights(run).items()})
        events = EventAccumulator(str(run / "train"))
        events.Reload()
        curves.append([point.value for point in events.Scalars("train/loss")])
    ours, twin = found
    # the twin's parameters are those of the loss within it
    twin = {name.removeprefix("loss."): weight for name, weight in twin.items()}
    assert ours.keys() == twin.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], twin[name], rtol=1e-9, atol=1e-9)
    assert len(curves[0]) == 8
    assert curves[0] == pytest.approx(curves[1], rel=1.2e-7)  # recorded in float32


QUICK = ("nt_xent", "sup_con", "info_nce loss.hardness=2 loss.false_negative_margin=0.1")


@pytest.mark.parametrize(
    "loss",
    [*QUICK, *slow(*(name for name in LOSSES if name not in QUICK), "nt_xent loss.dims=[1,2]")],
)
def test_every_loss_trains_and_passes_its_checks(train, tmp_path, loss):
    settings = f"loss={loss}".split()
    run = train(SMOKE, *settings, f"hydra.run.dir={tmp_path}/run", "trainer.max_epochs=1")
    assert run.status == 0, run.err
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["gradient_checks/run"] > 0
    assert results["gradient_checks/failed"] == 0


def test_broken_gradient_is_stopped_in_three_lines(train, tmp_path):
    run = train("experiment=broken_gradient", "loss.wrong_after=1", f"hydra.run.dir={tmp_path}/run")
    assert run.status == 1
    lines = run.err.strip().splitlines()
    assert len(lines) == 3, run.err
    assert "wrong in batch 1" in lines[0]
    file = lines[2].split()[-1]
    assert replay(file) == 1


@pytest.mark.slow
def test_multirun(train, tmp_path):
    run = train("-m", SMOKE, "loss=cosine_embedding,nt_xent", "seed=1,2", "trainer.max_epochs=1")
    assert run.status == 0, run.err
    found = sorted(path.parent for path in tmp_path.rglob("results.json"))
    assert [path.name for path in found] == ["0", "1", "2", "3"]
    configs = [yaml.safe_load((path / "config.yaml").read_text()) for path in found]
    assert [(c["loss"]["_target_"].rpartition(".")[2], c["seed"]) for c in configs] == [
        ("CosineEmbeddingLoss", 1),
        ("CosineEmbeddingLoss", 2),
        ("NTXentLoss", 1),
        ("NTXentLoss", 2),
    ]


@pytest.mark.slow
def test_optuna_looks_for_the_best_score(train, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs cosloss[sweep]")
    search = "sweep=optuna", "hydra.sweeper.n_trials=3", "seed=1", "loss.margin=interval(0, 0.5)"
    run = train("-m", SMOKE, *search, "trainer.max_epochs=1", "callbacks=no_checks")
    assert run.status == 0, run.err
    (found,) = tmp_path.rglob("optimization_results.yaml")
    best = yaml.safe_load(found.read_text())
    trials = sorted(path.parent for path in tmp_path.rglob("results.json"))
    assert [path.name for path in trials] == ["0", "1", "2"]
    settings, scores = [], []
    for path in trials:
        config = yaml.safe_load((path / "config.yaml").read_text())
        settings.append((config["optimizer"]["lr"], config["loss"]["margin"]))
        checkpoint = torch.load(path / "checkpoints/best.ckpt", weights_only=True)
        (state,) = (state for name, state in checkpoint["callbacks"].items() if "val/score" in name)
        scores.append(float(state["best_model_score"]))
    assert len(set(settings)) == 3
    assert all(1e-4 <= lr <= 1e-1 and 0 <= margin <= 0.5 for lr, margin in settings)
    assert best["best_value"] == pytest.approx(max(scores))
    parameters = best["best_params"]
    assert (parameters["optimizer.lr"], parameters["loss.margin"]) == settings[
        scores.index(max(scores))
    ]
