"""Two gloo processes: all run the same collectives, and a failure on one reaches the other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("ddp_run.py")
ROOT = SCRIPT.parents[2]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The folder of three runs, one after the other, and how the process ended in the last one."""
    folder = tmp_path_factory.mktemp("ddp")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(folder), "right", "stop", "raise"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    return folder, done


def counts(folder):
    """Checks run, checks failed and batches seen, per rank and callback."""
    return [
        [tuple(map(int, line.split())) for line in (folder / f"rank{rank}").read_text().split("\n")]
        for rank in range(2)
    ]


def test_a_gathering_loss_is_checked_in_its_local_form(ended):
    folder, done = ended
    assert (folder / "stop").exists(), done.stderr  # the first run came to its end
    # 6 batches of 12 rows are 3 on each process: 0 and 2
    assert counts(folder / "right") == [[(2, 0, 3), (2, 0, 3)]] * 2


def test_a_failure_on_one_process_stops_the_other(ended):
    folder, done = ended
    assert (folder / "raise").exists(), done.stderr
    (first, _), (second, _) = counts(folder / "stop")
    assert first == (1, 0, 1)
    assert second == (1, 1, 1)
    assert len(list((folder / "stop/gradient_failures").glob("*-rank1.pt"))) == 2


def test_an_error_on_one_process_ends_the_other(ended):
    folder, done = ended
    assert done.returncode != 0
    assert "GradientError" in done.stderr
    assert not (folder / "raise/rank0").exists()
