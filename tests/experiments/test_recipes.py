"""The recipes of configs/experiment for real images: each composes, and trains a few steps."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.experiments.test_torchvision_sets import write_cifar10

ROOT = Path(__file__).parents[2]
# what a CPU can do in seconds; precision and memory format stay the recipe's
FEW_STEPS = (
    "trainer.accelerator=cpu",
    "model.encoder.compile=false",
    "data.batch_size=8",
    "trainer.max_epochs=1",
    "trainer.check_val_every_n_epoch=1",
    "+trainer.limit_train_batches=2",
)


def check_run(run, path, loss):
    assert run.status == 0, run.err
    results = json.loads((path / "results.json").read_text())
    assert results["steps"] == 2
    assert 0 <= results["test/knn"] <= 1
    assert results["gradient_checks/run"] > 0
    assert results["gradient_checks/failed"] == 0
    config = yaml.safe_load((path / "config.yaml").read_text())
    assert config["loss"]["_target_"].endswith(loss)
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "loss"),
    [
        ("simclr_cifar10", "NTXentLoss"),
        ("cosine_cifar10", "CosineEmbeddingLoss"),
        ("supcon_cifar10", "TwoViewSupConLoss"),
    ],
)
def test_cifar10_recipe(train, tmp_path, monkeypatch, experiment, loss):
    (tmp_path / "data").mkdir()
    write_cifar10(tmp_path / "data", monkeypatch)
    where = f"data.root={tmp_path}/data", f"hydra.run.dir={tmp_path}/run"
    run = train(f"experiment={experiment}", *FEW_STEPS, *where)
    config = check_run(run, tmp_path / "run", loss)
    assert config["trainer"]["precision"] == "bf16-mixed"
    assert config["model"]["encoder"]["channels_last"]


def test_recipe_for_own_images(train, tmp_path, pictures):
    where = f"data.root={pictures}", f"hydra.run.dir={tmp_path}/run", "data.image_size=64"
    run = train("experiment=simclr_imagefolder", *FEW_STEPS, *where)
    check_run(run, tmp_path / "run", "NTXentLoss")


def test_supervised_loss_gets_each_images_label_and_refuses_images_without(train, tmp_path):
    for i in range(80):
        Image.effect_noise((24, 20), 100).save(tmp_path / f"{i}.png")
    run = train(
        "experiment=simclr_smoke", "loss=sup_con", "data=image_folder", f"data.root={tmp_path}"
    )
    assert run.status == 2
    assert "TwoViewSupConLoss needs labels" in run.err
