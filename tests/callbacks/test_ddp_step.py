"""Two gloo processes: what StepCheckCallback says of losses that gather, rightly and wrongly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("ddp_step.py")
ROOT = SCRIPT.parents[2]
BATCHES = 3  # of each process


RIGHT = (
    "cosloss",
    "all_gather",
    "global",
    "sync_batch_norm",
    "batch_norm",
    "local",
    "accumulated",
)


WRONG = {
    "gather": "the gradient of the step is not the slope of its loss",
    "stopped_and_gather": "the gradient of the step is not the slope of its loss",
    "gather_no_grad": "the gradient of the step is not the slope of its loss",
    "gather_both": "0.5 = 1/world_size times the right one in every module",
    "as_if_gathered": "2 = world_size times the right one in every module",
    "times_the_processes": "2 = world_size times the right one in every module",
    "one_rank": "`encoder`: 1.5 times the right one",
    "unequal": "the parameters differ between processes: `encoder` (rank 1",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Per case, of each rank: counts, last state and warnings."""
    folder = tmp_path_factory.mktemp("ddp_step")
    cases = [*RIGHT, *(f"{case}-unchecked" for case in RIGHT), *WRONG, "stopped", "raises"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(folder), *cases]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    return {case: [_read(folder / case / f"rank{rank}") for rank in range(2)] for case in cases}


def _read(file):
    counts, state, *texts = file.read_text().split("\n")
    return tuple(map(int, counts.split())), state, "\n".join(texts)


@pytest.mark.parametrize("case", RIGHT)
def test_a_right_step_is_silent_and_the_same_to_the_bit(case, found):
    for (counts, state, text), (_, without, _) in zip(
        found[case], found[f"{case}-unchecked"], strict=True
    ):
        assert counts == (BATCHES, 0, 0), text
        assert state == without


@pytest.mark.parametrize("case", WRONG)
def test_a_fault_is_seen_at_every_check(case, found):
    for counts, _, text in found[case]:
        assert counts == (BATCHES, BATCHES, 0), text
        assert WRONG[case] in text


def test_what_a_loss_stops_on_purpose_is_not_wrong(found):
    for counts, _, text in found["stopped"]:
        assert counts == (0, 0, BATCHES)
        assert "the step stops gradients at ddp_step.py" in text


def test_an_exception_on_one_process_does_not_hang_the_other(found):
    for counts, _, text in found["raises"]:
        assert counts == (0, 0, BATCHES)
        assert "KeyError: 'not twice' (rank 1)" in text
