"""The study's runs and its table."""

import json

import numpy as np
from PIL import Image

from experiments.studies import compare_losses as study


def write_pictures(root):
    """Twenty pictures of noise for training and ten for the test, of each of two classes."""
    generator = np.random.default_rng(0)
    for part, rows in (("train", 20), ("test", 10)):
        for i in range(2 * rows):
            path = root / part / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)


def test_a_finished_run_is_not_run_again_and_the_table_has_means(tmp_path, monkeypatch, capsys):
    def no_run(*arguments, **keywords):
        raise AssertionError("it ran")

    monkeypatch.setattr("experiments.studies.compare_losses.subprocess.run", no_run)
    for i, name in enumerate(study.SETTINGS):
        for seed in (3, 5):
            folder = tmp_path / name / f"seed{seed}"
            folder.mkdir(parents=True)
            knn = 0.1 * i + 0.01 * seed
            results = {
                "test/knn": knn,
                "test/linear": knn + 0.05,
                "raw_pixels/knn": 0.3,
                "wall_seconds": 100 + seed,
            }
            (folder / "results.json").write_text(json.dumps(results))
    study.main(["data.root=DIR", "--out", str(tmp_path), "--seeds", "3", "5"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| raw pixels | 30.0 % | | |"
    assert lines[3] == "| random encoder | 4.0 ± 1.4 % | 9.0 ± 1.4 % | 104 |"
    assert len(lines) == 3 + len(study.SETTINGS)


def test_one_run_of_the_study(tmp_path, monkeypatch, train):
    """Its command line, in this process."""
    write_pictures(tmp_path / "pictures")
    tiny = (
        "trainer=cpu",
        "data.batch_size=8",
        "data.train_per_class=10",
        "data.eval_per_class=1",
        "trainer.max_epochs=1",
        f"data.root={tmp_path}/pictures",
    )

    def in_this_process(command, check):
        assert check
        assert train(*command[2:]).status == 0

    monkeypatch.setattr("experiments.studies.compare_losses.subprocess.run", in_this_process)
    weighted = study.SETTINGS["in-batch cosine, negative_weight 4"]
    folder = tmp_path / "in-batch cosine, negative_weight 4" / "seed1"
    results = study.run(folder, "seed=1", *weighted, *tiny)
    assert results["steps"] == 2
    assert results["gradient_checks/failed"] == 0
    assert "negative_weight: 4" in (folder / "config.yaml").read_text()
