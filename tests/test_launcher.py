"""Sweeps through submitit: the cluster's configuration, and a sweep on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

pytest.importorskip("submitit", reason="hydra-submitit-launcher is in the [cluster] extra")

ROOT = Path(__file__).parents[1]


def test_slurm_jobs_have_a_size():
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        overrides = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu"]
        config = compose("train", overrides, return_hydra_config=True)
    launcher = config.hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.gpus_per_node, launcher.cpus_per_task, launcher.timeout_min) == (1, 8, 720)
    assert launcher.partition == "gpu"


def test_a_sweep_on_this_machine(tmp_path):
    overrides = ("experiment=simclr_smoke", "callbacks=no_checks", "seed=3", "trainer=cpu")
    command = [sys.executable, "train.py", "-m", "hydra/launcher=submitit_local", *overrides]
    done = subprocess.run(
        [*command, f"hydra.sweep.dir={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "0" / "results.json").exists()
    assert "seed: 3" in (tmp_path / "0" / "config.yaml").read_text()
