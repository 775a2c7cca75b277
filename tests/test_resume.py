"""What a run leaves when it is killed, interrupted or out of disk, and how it goes on."""

import errno
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from experiments.simclr.callbacks.checkpointing import AtomicCheckpointIO
from experiments.simclr.program.errors import UserError
from tests.checkpoints import assert_same_bits, weights

ROOT = Path(__file__).parents[1]
SMOKE = "experiment=simclr_smoke"
LONG_EPOCHS = "data.num_images=2000", "trainer.max_epochs=2", "callbacks=no_checks"


def process(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    for _ in range(1800):
        if path.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    assert path.exists(), process.communicate()


def test_ckpt_path_last_finds_the_newest_run(train, tmp_path, smoke_run):
    for run in ("a", "b"):
        shutil.copytree(smoke_run, tmp_path / "logs" / run)
    os.utime(tmp_path / "logs/b/checkpoints/last.ckpt", (0, 0))
    more = f"hydra.run.dir={tmp_path}/c", "ckpt_path=last"
    assert train(SMOKE, "trainer.max_epochs=3", *more).status == 0
    assert torch.load(tmp_path / "c/checkpoints/last.ckpt", weights_only=True)["epoch"] == 2


@pytest.mark.slow
def test_killed_and_resumed_ends_with_the_same_bits(train, tmp_path):
    epochs = "trainer.max_epochs=6"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(SMOKE, epochs, f"hydra.run.dir={whole}").status == 0
    victim = process(SMOKE, epochs, f"hydra.run.dir={killed}")
    wait_for(killed / "checkpoints/last.ckpt", victim)
    victim.kill()
    victim.communicate()
    assert not (killed / "results.json").exists()
    again = process(SMOKE, epochs, f"hydra.run.dir={killed}", "ckpt_path=last")
    assert again.wait() == 0, again.communicate()
    assert_same_bits(weights(whole), weights(killed))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The directory of a finished run of two long epochs."""
    path = tmp_path_factory.mktemp("uninterrupted") / "run"
    run = process(SMOKE, *LONG_EPOCHS, f"hydra.run.dir={path}")
    assert run.wait() == 0, run.communicate()
    return path


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_an_epoch_and_resumed_ends_with_the_same_bits(
    tmp_path, train, uninterrupted, signum
):
    for run in (tmp_path / "run", tmp_path / "again", tmp_path / "once_more"):
        victim = process(SMOKE, *LONG_EPOCHS, f"hydra.run.dir={run}")
        # the checkpoint of the first epoch: then it is in the second, or about to begin it
        wait_for(run / "checkpoints/last.ckpt", victim)
        victim.send_signal(signum)
        out, err = victim.communicate(timeout=60)
        assert victim.returncode == 128 + signum, err
        assert "Traceback" not in err
        command = shlex.split(out.strip().splitlines()[-1])
        assert command[:2] == ["python", "train.py"]
        checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        if 0 < batches["current"]["processed"] < batches["total"]["ready"]:
            break
    assert 0 < batches["current"]["processed"] < batches["total"]["ready"]

    assert train(*command[2:]).status == 0
    assert_same_bits(weights(run), weights(uninterrupted))


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def full(checkpoint, file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"No space left on device; the previous one is intact"):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_killed_amid_a_checkpoint_and_resumed_leaves_nothing_unfinished(train, tmp_path):
    """A process that dies by SIGKILL within torch.save, then a second one that resumes."""
    run = tmp_path / "run"
    assert train(SMOKE, "trainer.max_epochs=1", f"hydra.run.dir={run}").status == 0
    before = (run / "checkpoints/last.ckpt").read_bytes()
    code = """
import os, signal, sys, torch
from pathlib import Path
from experiments.simclr.callbacks.checkpointing import AtomicCheckpointIO

def killed(checkpoint, file):
    file.write(b"half of it")
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = killed
AtomicCheckpointIO().save_checkpoint({}, Path(sys.argv[1]))
"""
    command = [sys.executable, "-c", code, str(run / "checkpoints/last.ckpt")]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    assert (run / "checkpoints/last.ckpt").read_bytes() == before
    assert len(list((run / "checkpoints").glob(".*"))) == 1
    (run / "checkpoints/.mine.tmp").touch()
    assert train(SMOKE, f"hydra.run.dir={run}", "ckpt_path=last").status == 0
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == [".mine.tmp", "best.ckpt", "last.ckpt"]
