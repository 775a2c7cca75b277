"""What several test files use: running the programs in this process; and Triton without a GPU."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

SMOKE = "experiment=simclr_smoke"

if not torch.cuda.is_available():
    # read when triton is imported: its kernels then run on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs):
    """Processes share the cores: threads that wait for work leave them to others."""
    threads = max(2, os.cpu_count() // len(specs))  # two, so that what they divide is tested
    settings = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "OMP_NUM_THREADS": threads}
    for name, value in settings.items():
        os.environ.setdefault(name, str(value))


@dataclass
class Run:
    """What a run left: its exit status, standard output and standard error."""

    status: int
    out: str
    err: str


@pytest.fixture
def in_process(capsys):
    """in_process(main, *arguments) calls a program's main, and returns what it leaves."""

    def run(main, *arguments) -> Run:
        status = 0
        try:
            main(*arguments)
        except SystemExit as leave:
            status = int(leave.code or 0)
        return Run(status, *capsys.readouterr())

    return run


@pytest.fixture
def train(monkeypatch, in_process, tmp_path):
    """train("experiment=simclr_smoke", ...) runs train.py with its logs below tmp_path."""
    import train as program

    def run(*arguments: str) -> Run:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments, f"log_root={tmp_path}/logs"])
        return in_process(program.command_line)

    return run


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory) -> Path:
    """The directory of a finished run of experiment=simclr_smoke, to be read only.

    Beside it is a file `stdout`, of what the run said.
    """
    base = tmp_path_factory.getbasetemp()
    # the processes of pytest-xdist have folders in one folder
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    directory = base / "smoke" / "run"
    with FileLock(base / "smoke.lock"):
        if not (directory / "results.json").exists():
            said = subprocess.run(
                [sys.executable, "train.py", SMOKE, f"hydra.run.dir={directory}"],
                cwd=Path(__file__).parents[1],
                check=True,
                capture_output=True,
                text=True,
            )
            (base / "smoke" / "stdout").write_text(said.stdout)
    return directory


@pytest.fixture
def pictures(tmp_path):
    """A folder of two classes, twenty pictures of noise in each."""
    generator = np.random.default_rng(0)
    for i in range(40):
        path = tmp_path / "pictures" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    return tmp_path / "pictures"
