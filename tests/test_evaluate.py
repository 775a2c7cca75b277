"""python evaluate.py as a person runs it: the run's own figures again, other data, mistakes."""

import json
import shutil

import pytest
import torch
from PIL import Image

import evaluate as program

SCORES = ("test/knn", "test/linear", "test/linear_10_percent", "test/linear_1_percent")


@pytest.fixture
def evaluate(in_process):
    """evaluate("ckpt_path=...", ...) runs evaluate.py."""
    return lambda *arguments: in_process(program.main, list(arguments))


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_a_run_evaluated_again_has_its_own_figures(evaluate, smoke_run, tmp_path):
    run = evaluate(f"ckpt_path={smoke_run}", f"out={tmp_path}/again")
    assert run.status == 0, run.err
    trained, again = results(smoke_run), results(tmp_path / "again")
    for name in (*SCORES, "raw_pixels/knn", "data", "steps"):
        assert again[name] == trained[name], name
        assert again[name] is not None
    assert again["checkpoint"] == str(smoke_run / "checkpoints/last.ckpt")
    assert str(tmp_path / "again/results.json") in run.out
    for name in ("nearest_neighbours", "confusion_matrix"):
        with Image.open(tmp_path / f"again/pictures/{name}.png") as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(2**24)) > 10
    assert list((tmp_path / "again/test").glob("events.out.tfevents*"))


def test_a_lone_checkpoint_is_enough(evaluate, smoke_run, tmp_path):
    shutil.copy(smoke_run / "checkpoints/best.ckpt", tmp_path / "mine.ckpt")
    run = evaluate(f"ckpt_path={tmp_path}/mine.ckpt", "model.knn_k=1")
    assert run.status == 0, run.err
    assert results(tmp_path / "evaluation")["test/knn"] <= 1


def test_what_is_set_differently_counts(evaluate, smoke_run, tmp_path):
    other = f"ckpt_path={smoke_run}", f"out={tmp_path}/out"
    assert evaluate(*other, "data.num_classes=2").status == 0
    two_classes = results(tmp_path / "out")
    assert two_classes["test/knn"] > 0.25
    assert two_classes["raw_pixels/knn"] > 0.25
    assert results(smoke_run)["test/knn"] < 0.25


def test_other_data_without_labels(evaluate, smoke_run, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(40):
        Image.effect_noise((24, 20), 100).save(tmp_path / f"images/{i}.png")
    run = evaluate(
        f"ckpt_path={smoke_run}",
        f"out={tmp_path}/out",
        "data=image_folder",
        f"data.root={tmp_path}/images",
        "data.batch_size=8",
    )
    assert run.status == 0, run.err
    found = results(tmp_path / "out")
    assert found["data"] == "ImageFolder"
    assert [found[name] for name in SCORES] == [None] * 4
    pictures = sorted(path.name for path in (tmp_path / "out/pictures").iterdir())
    assert pictures == ["nearest_neighbours.png"]


MISTAKES = {
    "no checkpoint": (["seed=1"], "ckpt_path"),
    "no such file": (["ckpt_path=nothing"], "nothing"),
    "not a checkpoint": (["ckpt_path=train.py"], "train.py is not a whole checkpoint"),
    "what was trained": (["RUN", "loss=nt_xent"], "loss is as it was trained"),
    "misspelt": (["RUN", "data.batchsize=3"], "batchsize"),
    "added": (["RUN", "+data.foo=3"], "+data.foo=3: give one value as KEY=VALUE"),
    "swept": (["RUN", "seed=1,2"], "seed=1,2: give one value"),
    "wrong type": (["RUN", "data.batch_size=many"], "data.batch_size"),
    "wrong value": (["RUN", "data.batch_size=0"], "data.batch_size must be at least 1; got 0"),
    "unknown data": (["RUN", "data=nothing"], "nothing"),
    "no grammar": (["RUN", "seed"], "seed"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_and_status_2(evaluate, smoke_run, mistake):
    arguments, words = MISTAKES[mistake]
    before = sorted(smoke_run.rglob("*"))
    run = evaluate(*(f"ckpt_path={smoke_run}" if a == "RUN" else a for a in arguments))
    assert run.status == 2, run.err
    assert len(run.err.strip().splitlines()) == 1, run.err
    assert words in run.err
    assert sorted(smoke_run.rglob("*")) == before


def test_a_checkpoint_whose_model_differs(evaluate, smoke_run, tmp_path):
    saved = torch.load(smoke_run / "checkpoints/last.ckpt", weights_only=True)
    saved["hyper_parameters"]["model"]["encoder"]["width"] = 4
    torch.save(saved, tmp_path / "other.ckpt")
    run = evaluate(f"ckpt_path={tmp_path}/other.ckpt")
    assert run.status == 2
    assert "is from another model" in run.err


def test_help_says_how(evaluate):
    run = evaluate()
    assert run.status == 0
    assert "python evaluate.py ckpt_path=" in run.out
