"""Runs beside one another: directories of their own, sweeps in which a job fails, resuming."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import train as train_program
from experiments.simclr.module import SimCLR
from experiments.simclr.program.jobs import Directories, new_directory, quoted
from experiments.simclr.program.run_directory import RunDirectory
from tests.slow import slow

ROOT = Path(__file__).parents[1]
NO_PICTURES = "callbacks=no_checks", "~callbacks.pictures"
SMOKE = ("experiment=simclr_smoke", "trainer.max_epochs=1", *NO_PICTURES)


@pytest.fixture
def same_second(monkeypatch):
    clock = SimpleNamespace(now=lambda: SimpleNamespace(strftime=lambda pattern: "now"))
    monkeypatch.setattr("hydra.core.utils.datetime", clock)


def test_runs_of_the_same_second_have_a_directory_each(train, tmp_path, same_second):
    for _ in range(2):
        assert train(*SMOKE).status == 0
    found = {path.parent.name for path in tmp_path.glob("logs/simclr_smoke/*/results.json")}
    assert found == {"now", "now_2"}


def test_sweeps_of_the_same_second_have_a_directory_each(train, tmp_path, same_second):
    for _ in range(2):
        assert train("-m", *SMOKE, "seed=1,2").status == 0
    root = tmp_path / "logs/simclr_smoke"
    found = {str(path.parent.relative_to(root)) for path in root.glob("*/*/results.json")}
    assert found == {"now/0", "now/1", "now_2/0", "now_2/1"}


def test_a_directory_is_made_by_one_of_many_threads_each(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(new_directory, [tmp_path / "a/run"] * 40))
    assert len(set(made)) == 40


def test_two_writers_are_never_in_one_directory(train, tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    with run.claimed():
        second = train(*SMOKE, f"hydra.run.dir={run.path}")
        assert second.status == 2
        assert "another process is writing this run" in second.err
        assert run.path.exists(), "it took away the directory of the first"
        (run.path / "config.yaml").touch()
    with RunDirectory(run.path).claimed():
        pass
    assert run.path.exists()


def test_the_jobs_of_a_sweep_go_on_where_one_fails(train, tmp_path):
    run = train("-m", *SMOKE, "loss.margin=0,7,0.5", f"hydra.sweep.dir={tmp_path}/s")
    assert run.status == 1
    assert "Traceback" not in run.err
    assert Directories.sweep is None, "what this process does next would be told of it"
    found = sorted(path.parent.name for path in tmp_path.glob("s/*/results.json"))
    assert found == ["0", "2"]
    at_once, summary = run.err.split("1 of the jobs failed")
    for text in (at_once, summary):
        assert "job 1 (experiment=simclr_smoke" in text
        assert "loss.margin=7" in text
        assert "margin must be in" in text
    failure = tmp_path / "s/1/failed.json"
    assert "margin" in json.loads(failure.read_text())["why"]
    again = train(*SMOKE, f"hydra.run.dir={failure.parent}", "trainer.max_epochs=0")
    assert again.status == 0, again.err
    assert not failure.exists(), "it would be listed once more"


def test_a_sweep_ends_with_a_table_of_its_jobs(train, tmp_path):
    checked = "experiment=simclr_smoke", "trainer.max_epochs=1", "~callbacks.pictures"
    run = train("-m", *checked, "loss.margin=0,7,0.5", f"hydra.sweep.dir={tmp_path}/s")
    lines = run.out.splitlines()
    header = next(i for i, line in enumerate(lines) if "settings" in line)
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines[header:]]
    jobs = [row for row in rows[1:] if len(row) == 6]
    assert [row[:2] for row in jobs] == [
        ["0", "loss.margin=0"],
        ["1", "loss.margin=7"],
        ["2", "loss.margin=0.5"],
    ]
    assert jobs[1][2:] == ["failed", "", "", ""]
    for number in (0, 2):
        results = json.loads((tmp_path / f"s/{number}/results.json").read_text())
        assert jobs[number][2] == f"{100 * results['test/knn']:.1f} %"
        assert jobs[number][3] == f"{100 * results['test/linear']:.1f} %"
        assert jobs[number][4] == f"all {results['gradient_checks/run']} passed"
    assert lines[-1] == f"look at them: tensorboard --logdir {tmp_path}/s"


@pytest.mark.parametrize(
    ("wrong", "first", "why"),
    [
        ("loss=nt_xent,nt_xnt", "loss=nt_xnt", "Could not find 'loss/nt_xnt'"),
        ("model.knn=5,7", "model.knn=5", "there is no setting model.knn; SimCLR has encoder, "),
    ],
)
def test_a_job_that_cannot_be_composed_is_named_before_any_is_run(
    train, tmp_path, wrong, first, why
):
    """Hydra composes all jobs of a sweep before the first."""
    run = train("-m", *SMOKE, "seed=1", wrong, f"hydra.sweep.dir={tmp_path}/s")
    assert run.status == 2
    (line,) = run.err.strip().splitlines()
    assert line.startswith("error: no job was run, since one cannot be: experiment=simclr_smoke ")
    assert " seed=1 " in line
    assert f" {first} " in line
    assert why in line
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_fault_in_a_job_keeps_its_traceback_and_the_others_go_on(train, tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("a fault")

    monkeypatch.setattr("experiments.simclr.module.SimCLR.test_step", broken)
    run = train("-m", *SMOKE, "seed=1,2", f"hydra.sweep.dir={tmp_path}/s")
    assert run.status == 1
    assert run.err.count("Traceback") == 2
    assert "2 of the jobs failed" in run.err
    assert "RuntimeError: a fault" in run.err.split("2 of the jobs failed")[1]


@pytest.mark.parametrize(("margins", "finished"), [("choice(0, 7)", 1), *slow(("choice(7, 8)", 0))])
def test_a_search_goes_on_where_trials_fail(train, tmp_path, margins, finished):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs cosloss[sweep]")
    import optuna

    optuna.logging.disable_default_handler()  # it holds on to the stderr of an earlier test
    search = "sweep=optuna", "hydra.sweeper.n_trials=2", f"loss.margin={margins}", "seed=0"
    run = train("-m", *SMOKE, *search, f"hydra.sweep.dir={tmp_path}/s")
    assert run.status == 1, run.err
    assert f"{2 - finished} of the jobs failed" in run.err
    assert "Traceback" not in run.err
    assert (tmp_path / "s/optimization_results.yaml").exists() == bool(finished)
    assert len(list(tmp_path.glob("s/*/results.json"))) == finished


def test_what_is_quoted_is_read_back():
    parser, generator = OverridesParser.create(), random.Random(0)
    for _ in range(500):
        characters = generator.choices("ab/=,'\"\\ $()[]{}~ü:x", k=generator.randint(1, 9))
        value = "".join(characters)
        override = parser.parse_override(f"key={quoted(value)}")
        config = OmegaConf.create({"key": override.value()})
        assert config.key == value


@pytest.mark.parametrize("value", ["~/x", "/tmp/bü", "/tmp/a=b"])
def test_a_path_that_hydra_cannot_read_is_shown_quoted(train, value):
    run = train(*SMOKE, "data=image_folder", f"data.root={value}")
    assert run.status == 2
    (line,) = run.err.strip().splitlines()
    (shown,) = shlex.split(line.partition("shell: ")[2])
    assert OverridesParser.create().parse_override(shown).value() == value


@pytest.fixture
def signalled(monkeypatch):
    """From now on each training step begins with a SIGTERM."""
    step = SimCLR.training_step

    def signalled_step(self, batch, batch_idx):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SimCLR, "training_step", signalled_step)


@pytest.mark.slow
def test_the_printed_command_runs_with_flags_and_from_another_folder(
    in_process, tmp_path, monkeypatch, signalled
):
    """Own configurations, and a run directory that Hydra and the shell would each misread."""
    own = tmp_path / "my configs"
    own.mkdir()
    (own / "mine.yaml").write_text("defaults: [_self_, train]\n")
    run = tmp_path / "lr=0.1, it's $HOME (ü)"
    monkeypatch.chdir(tmp_path)
    flags = "--config-dir", "my configs", "-cn", "mine"
    more = f"hydra.run.dir={quoted(str(run))}", "++loss.margin=0.25"
    monkeypatch.setattr(sys, "argv", [f"{ROOT}/train.py", *flags, *SMOKE, *more])
    first = in_process(train_program.command_line)
    assert first.status == 128 + signal.SIGTERM, first.err
    command = first.out.strip().splitlines()[-1]
    assert not (run / "results.json").exists()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    second = subprocess.run(
        command, env={**os.environ, "PATH": path}, shell=True, capture_output=True, text=True
    )
    assert second.returncode == 0, second.stderr
    assert json.loads((run / "results.json").read_text())["steps"] == 4
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["name"], config["loss"]["margin"]) == ("simclr_smoke", 0.25)


def test_the_command_leaves_a_sweeps_own_settings_out(train, tmp_path, signalled):
    where = f"hydra.sweep.dir={tmp_path}/s"
    run = train("-m", *SMOKE, "seed=1,2", "hydra/sweeper=basic", where)
    assert run.status == 128 + signal.SIGTERM
    command = shlex.split(run.out.strip().splitlines()[-1])
    assert "seed=1" in command
    assert f"hydra.run.dir={tmp_path}/s/0" in command
    assert not [word for word in command if "sweep" in word and not word.startswith("hydra.run")]
    assert not (tmp_path / "s/1").exists(), "an interruption ends the sweep"
