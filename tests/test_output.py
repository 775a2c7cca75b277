"""What is printed, drawn and shown never costs a run its results."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.simclr.callbacks import tensorboard
from experiments.simclr.program.output import tolerant_output

ROOT = Path(__file__).parents[1]
SMOKE = ("experiment=simclr_smoke", "callbacks=no_checks", "trainer.max_epochs=2")


def printing(encoding: str, raw) -> str:
    """What is in the file after a program printed into it within tolerant_output."""
    stream = io.TextIOWrapper(raw, encoding=encoding)
    before, sys.stdout = sys.stdout, stream
    try:
        with tolerant_output():
            print("74 % …\udcff", "ü")
            assert sys.stdout is not stream
    finally:
        sys.stdout = before
    return encoding


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", b"74 % \\u2026\\udcff \\xfc\n"),
        ("latin-1", b"74 % \\u2026\\udcff \xfc\n"),
        ("utf-8", "74 % …\\udcff ü\n".encode()),
    ],
)
def test_a_character_that_the_encoding_lacks_is_escaped(tmp_path, encoding, expected):
    with (tmp_path / "out").open("wb") as raw:
        printing(encoding, raw)
    assert (tmp_path / "out").read_bytes() == expected


def test_a_pipe_that_has_closed_is_written_to_in_vain():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as raw:  # noqa: PTH123
        printing("utf-8", raw)


def test_without_a_standard_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with tolerant_output():
        print("to nobody")
    assert sys.stdout is None


@pytest.mark.slow
def test_a_run_whose_reader_has_gone_and_whose_encoding_is_ascii_has_results(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "train.py", *SMOKE, f"hydra.run.dir={tmp_path}/run"],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "80"},
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/results.json").read_text())["steps"] == 8


def test_a_picture_that_cannot_be_drawn_is_left_out(train, tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no font")

    for name in ("view_figure", "neighbour_figure"):
        monkeypatch.setattr(tensorboard.pictures, name, broken)
    with pytest.warns(UserWarning, match="left out: RuntimeError: no font") as told:
        run = train(*SMOKE, f"hydra.run.dir={tmp_path}/run")
    assert run.status == 0, run.err
    assert len([w for w in told if "no font" in str(w.message)]) == 2
    assert json.loads((tmp_path / "run/results.json").read_text())["test/knn"] is not None


def test_the_results_are_there_before_the_pictures(train, tmp_path, monkeypatch):
    found = []

    def looks(*arguments):
        found.append((tmp_path / "run/results.json").exists())
        raise KeyboardInterrupt

    monkeypatch.setattr(tensorboard, "evaluation_figures", looks)
    train(*SMOKE, f"hydra.run.dir={tmp_path}/run")
    assert found == [True]
    assert json.loads((tmp_path / "run/results.json").read_text())["test/knn"] is not None


def test_into_a_file_progress_goes_line_by_line(train, tmp_path):
    run = train(*SMOKE, f"hydra.run.dir={tmp_path}/run", "callbacks.progress.seconds=0")
    lines = [line for line in run.out.splitlines() if line.startswith("epoch ")]
    places = [line.split(", ")[:2] for line in lines]
    batches = [[f"epoch {e}/2", f"batch {b}/4"] for e in (1, 2) for b in (1, 2, 3, 4)]
    assert places == batches
    assert "train/loss " in lines[0]
    assert "val/knn " in lines[3]
    assert "lr " in lines[-1]
    assert "left 0:00:00" in lines[-1]
    assert "━" not in run.out
