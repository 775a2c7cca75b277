"""Two gloo processes: all run the same collectives, and a failure on one reaches the other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("ddp_run.py")
ROOT = SCRIPT.parents[2]


def run(mode, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(folder), mode]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def counts(folder):
    """Checks run, checks failed and batches seen, per rank and callback."""
    return [
        [tuple(map(int, line.split())) for line in (folder / f"rank{rank}").read_text().split("\n")]
        for rank in range(2)
    ]


def test_a_gathering_loss_is_checked_in_its_local_form(tmp_path):
    done = run("right", tmp_path)
    assert done.returncode == 0, done.stderr
    # 6 batches of 12 rows are 3 on each process: 0 and 2
    assert counts(tmp_path) == [[(2, 0, 3), (2, 0, 3)]] * 2


@pytest.mark.parametrize("mode", ["stop", "raise"])
def test_a_failure_on_one_process_reaches_the_other(mode, tmp_path):
    done = run(mode, tmp_path)
    if mode == "raise":
        assert done.returncode != 0
        assert "GradientError" in done.stderr
        assert not (tmp_path / "rank0").exists()
    else:
        assert done.returncode == 0, done.stderr
        (first, _), (second, _) = counts(tmp_path)
        assert first == (1, 0, 1)
        assert second == (1, 1, 1)
        assert len(list((tmp_path / "gradient_failures").glob("*-rank1.pt"))) == 2
