"""Hydra's part of a run: directories of its own, the jobs of a sweep, the command that resumes."""

import json
import re
import shlex
import shutil
import sys
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig

from experiments.simclr.evaluation import report
from experiments.simclr.program.run_directory import RunDirectory

PLAIN = re.compile(r"[\w./-]+", re.ASCII)
CONFIGS = Path(__file__).parents[3] / "configs"
# of a sweep, and not of the one job of it that is resumed
SWEEP = ("hydra.mode", "hydra.sweep", "hydra.sweeper", "hydra.launcher")
SWEEP_GROUPS = ("hydra/sweeper", "hydra/launcher", "sweep")


class Directories(Callback):
    """A run, and a sweep, gets a directory that no other has, also one of the same second.

    Attributes:
        sweep: that of the sweep whose jobs this process starts, if there is one.
    """

    sweep: ClassVar[Path | None] = None

    def on_run_start(self, config: DictConfig, **kwargs: object) -> None:
        config.hydra.run.dir = self._directory(config, "hydra.run.dir", config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: object) -> None:
        directory = self._directory(config, "hydra.sweep.dir", config.hydra.sweep.dir)
        config.hydra.sweep.dir = directory
        Directories.sweep = Path(directory)
        # each job's configuration is composed anew, with these
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir={quoted(directory)}")

    def _directory(self, config: DictConfig, key: str, value: str) -> str:
        path = Path(value).expanduser()
        given = any(key_of(o) == key for o in config.hydra.overrides.hydra)
        if given or rank_zero_only.rank != 0:  # of several processes one writes
            return str(path)
        with suppress(OSError):  # which Hydra will say as well
            return str(new_directory(path))
        return str(path)

    def on_multirun_end(self, config: DictConfig, **kwargs: object) -> None:
        # some sweepers, Optuna's for one, come to their end with jobs that failed
        leave_if_jobs_failed()


def new_directory(path: Path) -> Path:
    """Make and return `path`, or the first of `path_2`, `path_3`, … that nobody has made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        candidate = path if number == 1 else path.with_name(f"{path.name}_{number}")
        with suppress(FileExistsError):
            candidate.mkdir()
            return candidate
    raise AssertionError


class JobFailed(Exception):
    """A job of a sweep could not be done; it has said why, and the other jobs go on."""


def in_a_sweep() -> bool:
    """Whether this is a job of several."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def fail_job(run: RunDirectory, message: str) -> JobFailed:
    """What to raise in a job of a sweep for which `message` says why it failed.

    The message stays in the job's directory, where the sweep's summary finds it whatever
    process, or machine, the job ran on.
    """
    job = {**this_job(), "name": job_name(), "why": message}
    run.path.mkdir(exist_ok=True)  # an empty one has been taken away
    run.failure.write_text(json.dumps(job, indent=2) + "\n")
    return JobFailed(message)


def this_job() -> dict:
    """The job's number in its sweep and its overrides, for its results; empty without a sweep."""
    if not in_a_sweep():
        return {}
    hydra = HydraConfig.get()
    return {"job": hydra.job.num, "overrides": list(hydra.overrides.task)}


def leave_if_jobs_failed() -> None:
    """Show the table of the sweep's jobs; name on stderr those that failed, and leave with 1.

    The sweep is over then: what else this process does has no part in it.
    """
    sweep, Directories.sweep = Directories.sweep, None
    if sweep is None:
        return
    if rank_zero_only.rank == 0:
        report.show_jobs(_jobs(sweep, RunDirectory.RESULTS, RunDirectory.FAILURE), sweep)
    failures = _jobs(sweep, RunDirectory.FAILURE)
    if not failures:
        return
    print(f"\n{len(failures)} of the jobs failed, in {sweep}:", file=sys.stderr)
    for job in failures:
        print(f"  {job['name']}: {job['why']}", file=sys.stderr)
    raise SystemExit(1)


def _jobs(sweep: Path, *names: str) -> list[dict]:
    """What the sweep's jobs have left in files of these names, one dict a job, in their order."""
    jobs: dict[int, dict] = {}
    for name in names:
        for path in sweep.glob(f"*/{name}"):
            job = json.loads(path.read_text())
            if "job" in job:  # a run of its own may lie there
                jobs[job["job"]] = jobs.get(job["job"], {}) | job
    return [jobs[number] for number in sorted(jobs)]


def job_name() -> str:
    """How a job of a sweep is called in a message."""
    hydra = HydraConfig.get()
    return f"job {hydra.job.num} ({' '.join(hydra.overrides.task)})"


def resume_command(run: RunDirectory) -> str:
    """The command that continues the run, with its flags and overrides, in its own directory."""
    hydra = HydraConfig.get()
    given = [*hydra.overrides.task, *hydra.overrides.hydra]
    kept = [override for override in given if _is_kept(key_of(override))]
    flags = []
    for source in hydra.runtime.config_sources:
        if source.provider == "command-line":
            flags += ["--config-dir", source.path]
        elif source.provider == "main" and Path(source.path) != CONFIGS:
            flags += ["--config-path", source.path]
    if hydra.job.config_name != "train":
        flags += ["--config-name", hydra.job.config_name]
    more = [f"hydra.run.dir={quoted(str(run.path.absolute()))}", "ckpt_path=last"]
    return shlex.join([_python(), _script(Path(hydra.runtime.cwd)), *flags, *kept, *more])


def quoted(value: str) -> str:
    r"""A value as Hydra's grammar reads it back.

    Example:
        >>> print(quoted("logs/run"), quoted("a=b, c"), quoted("it's"))
        logs/run 'a=b, c' 'it\'s'
    """
    if PLAIN.fullmatch(value):
        return value
    # a backslash stands for itself, unless a quote, an interpolation or the end comes after it
    escaped = re.sub(r"(\\*)('|\$\{|\Z)", lambda m: 2 * m[1] + ("\\" + m[2] if m[2] else ""), value)
    return f"'{escaped}'"


def key_of(override: str) -> str:
    """The key, or the group, that an override sets."""
    return OverridesParser.create().parse_override(override).key_or_group


def _is_kept(key: str) -> bool:
    within = key.partition(".")[0] == "hydra" and ".".join(key.split(".")[:2])
    return key not in ("ckpt_path", "hydra.run.dir", *SWEEP_GROUPS) and within not in SWEEP


def _python() -> str:
    found = shutil.which("python")
    here = Path(sys.executable)
    return "python" if found and Path(found).parent == here.parent else str(here)


def _script(folder: Path) -> str:
    script = folder / sys.argv[0]
    return script.name if script.parent.samefile(folder) else str(script)
