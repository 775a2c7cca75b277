"""A signal at any time: 128 and its number, one line, and what can be saved is saved."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.simclr.callbacks.progress import TrainingFigures
from experiments.simclr.module import SimCLR
from experiments.simclr.program.interruption import (
    SIGNALS,
    Interrupted,
    interruptible,
    interruption,
)
from tests.checkpoints import assert_same_bits, weights
from tests.slow import slow

ROOT = Path(__file__).parents[1]
NO_PICTURES = "callbacks=no_checks", "~callbacks.pictures"
SMOKE = ("experiment=simclr_smoke", "trainer.max_epochs=2", *NO_PICTURES)


def send(signum):
    os.kill(os.getpid(), signum)


@pytest.fixture
def at(monkeypatch):
    """at(owner, name, signum, call=1): the owner's function sends the signal when it is called."""

    def patch(owner, name, signum, call=1):
        function, calls = getattr(owner, name), []

        def signalled(*arguments, **keywords):
            calls.append(name)
            if len(calls) == call:
                send(signum)
            return function(*arguments, **keywords)

        monkeypatch.setattr(owner, name, signalled)

    return patch


def check(run, signum, path, steps):
    """One line on what was saved, the command that resumes, and the checkpoint of these steps."""
    assert run.status == 128 + signum
    assert "Traceback" not in run.err
    said = [line for line in run.out.splitlines() if line.startswith(signal.Signals(signum).name)]
    assert len(said) == 1, run.out
    assert f"{path}/checkpoints/last.ckpt" in said[0]
    assert run.out.strip().splitlines()[-1].strip().startswith("python train.py experiment=")
    saved = torch.load(path / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == steps
    assert not (path / "results.json").exists()


@pytest.mark.parametrize(("signum", "step"), list(zip(SIGNALS, (3, 1, 2, 5, 8, 4), strict=True)))
def test_within_a_step(train, tmp_path, at, signum, step):
    at(SimCLR, "training_step", signum, call=step)
    run = train(*SMOKE, f"hydra.run.dir={tmp_path}/run")
    check(run, signum, tmp_path / "run", step)


def test_between_the_start_of_fit_and_the_first_step(train, tmp_path, at):
    """Where Lightning's own handler would end the run with status 0."""
    at(SimCLR, "on_train_start", signal.SIGTERM)
    run = train(*SMOKE, f"hydra.run.dir={tmp_path}/run")
    check(run, signal.SIGTERM, tmp_path / "run", 1)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("experiments.simclr.data.random_images.RandomImages", "load"),
        ("experiments.simclr.module.SimCLR", "configure_optimizers"),
        ("train", "check_types"),
    ],
)
def test_before_there_is_anything_to_save(train, tmp_path, at, owner, name):
    import pydoc

    at(pydoc.locate(owner), name, signal.SIGTERM)
    run = train(*SMOKE, f"hydra.run.dir={tmp_path}/run")
    assert run.status == 128 + signal.SIGTERM
    assert run.out.strip().splitlines()[-1].startswith("SIGTERM: ended before")
    assert "Traceback" not in run.err
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.fixture
def batches(monkeypatch):
    """The step of each batch of training and validation, in the order in which they ran."""
    ran = []

    def note(name):
        step = getattr(SimCLR, name)

        def noted(self, batch, batch_idx):
            ran.append((name, self.trainer.current_epoch, batch_idx))
            return step(self, batch, batch_idx)

        monkeypatch.setattr(SimCLR, name, noted)

    note("training_step")
    note("validation_step")
    return ran


@pytest.mark.parametrize(
    ("settings", "place", "call", "left"),
    [
        ((), "on_validation_start", 1, 1),
        ((), "training_step", 4, 0),  # the last of its epoch, which is still to be validated
        (("+trainer.val_check_interval=0.5",), "validation_step", 4, 2),
        *slow(
            ((), "validation_step", 2, 2),
            (("+trainer.val_check_interval=0.5",), "validation_step", 1, 1),
        ),
    ],
)
def test_a_validation_is_left_after_a_batch_and_begun_anew(
    train, tmp_path, at, monkeypatch, batches, settings, place, call, left
):
    small = "data.num_images=128", "data.batch_size=16", *settings  # two batches validate
    whole = train(*SMOKE, *small, f"hydra.run.dir={tmp_path}/whole")
    assert whole.status == 0, whole.err
    expected = batches.copy()
    batches.clear()
    with monkeypatch.context():
        at(SimCLR, place, signal.SIGINT, call=call)
        run = train(*SMOKE, *small, f"hydra.run.dir={tmp_path}/run")
    assert run.status == 128 + signal.SIGINT, run.err
    first = batches.copy()
    assert [name for name, *_ in first[len(first) - left :]] == ["validation_step"] * left
    batches.clear()
    again = train(*shlex.split(run.out.strip().splitlines()[-1])[2:])
    assert again.status == 0, again.err
    assert first[: len(first) - left] + batches == expected
    assert_same_bits(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_a_signal_among_accumulated_batches_waits_for_the_optimizers_step(
    train, tmp_path, at, monkeypatch, batches
):
    three = "trainer.accumulate_grad_batches=3", "data.batch_size=16"
    assert train(*SMOKE, *three, f"hydra.run.dir={tmp_path}/whole").status == 0
    expected = batches.copy()
    batches.clear()
    with monkeypatch.context():
        at(SimCLR, "training_step", signal.SIGTERM, call=2)
        run = train(*SMOKE, *three, f"hydra.run.dir={tmp_path}/run")
    check(run, signal.SIGTERM, tmp_path / "run", 1)
    assert len(batches) == 3
    assert train(*shlex.split(run.out.strip().splitlines()[-1])[2:]).status == 0
    assert batches == expected
    assert_same_bits(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_after_the_last_epochs_end_it_is_not_forgotten(train, tmp_path, at):
    at(TrainingFigures, "on_train_end", signal.SIGTERM)
    run = train(*SMOKE, f"hydra.run.dir={tmp_path}/run")
    check(run, signal.SIGTERM, tmp_path / "run", 8)


def test_while_the_sanity_of_the_validation_is_checked(train, tmp_path, at):
    at(SimCLR, "validation_step", signal.SIGUSR1)
    run = train(*SMOKE, "trainer.num_sanity_val_steps=1", f"hydra.run.dir={tmp_path}/run")
    assert run.status == 128 + signal.SIGUSR1
    assert run.out.strip().splitlines()[-1].startswith("SIGUSR1: ended before")
    assert "Traceback" not in run.err


def test_after_training_the_command_goes_on_with_the_evaluation(train, tmp_path, at, monkeypatch):
    with monkeypatch.context():
        at(SimCLR, "test_step", signal.SIGHUP)
        run = train(*SMOKE, f"hydra.run.dir={tmp_path}/run")
        check(run, signal.SIGHUP, tmp_path / "run", 8)
    command = shlex.split(run.out.strip().splitlines()[-1])
    assert train(*command[2:]).status == 0
    assert (tmp_path / "run/results.json").exists()


def test_handlers_are_given_back_and_an_ignored_signal_stays_ignored():
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup starts a program
    try:
        with interruptible():
            send(signal.SIGHUP)
            with pytest.raises(Interrupted, match="SIGUSR1"):
                send(signal.SIGUSR1)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])
    assert {signum: signal.getsignal(signum) for signum in SIGNALS} == before


def test_the_second_signal_ends_at_once_with_a_line(tmp_path):
    code = """
import os, signal
from experiments.simclr.program.interruption import interruptible, interruption
with interruptible():
    interruption.awaited = True
    os.kill(os.getpid(), signal.SIGTERM)
    print("the step goes on", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("never")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 128 + signal.SIGINT
    assert done.stdout == "the step goes on\n"
    assert done.stderr.strip() == "SIGINT: ended at once, a second signal after the first"


def test_a_signal_while_a_checkpoint_is_written_leaves_it_whole(train, tmp_path, at):
    at(os, "fsync", signal.SIGTERM)
    run = train(*SMOKE, f"hydra.run.dir={tmp_path}/run")
    check(run, signal.SIGTERM, tmp_path / "run", 4)
    assert interruption.awaited is False


def test_while_the_program_is_imported(tmp_path):
    """The first seconds of a process: no traceback through the imports."""
    hydra = tmp_path / "hydra.py"
    hydra.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, "train.py", *SMOKE],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    # the script's folder comes first, and has no module of that name
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr.strip() == "SIGINT: ended before there was anything to save"
