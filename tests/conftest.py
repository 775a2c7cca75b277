"""What several test files use: running train.py in this process."""

import sys
from dataclasses import dataclass

import pytest


@dataclass
class Run:
    """What a run left: its exit status, standard output and standard error."""

    status: int
    out: str
    err: str


@pytest.fixture
def train(monkeypatch, capsys, tmp_path):
    """train("experiment=simclr_smoke", ...) runs train.py with its logs below tmp_path."""
    import train as program

    def run(*arguments: str) -> Run:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments, f"log_root={tmp_path}/logs"])
        status = 0
        try:
            program.command_line()
        except SystemExit as leave:
            status = int(leave.code or 0)
        return Run(status, *capsys.readouterr())

    return run
