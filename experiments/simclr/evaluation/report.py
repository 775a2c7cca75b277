"""What a finished run says: results.json and a short table."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning as L
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.simclr.evaluation.frozen import Evaluation

ROWS = {
    "test/knn": "test k-NN accuracy",
    "test/linear": "test linear-probe accuracy",
    "test/linear_10_percent": "… with 10 % of the labels",
    "test/linear_1_percent": "… with 1 % of the labels",
    "raw_pixels/knn": "raw pixels, k-NN accuracy",
}


def scores_of(evaluation: Evaluation | None, config: Mapping, why: str = "") -> dict:
    """The evaluation's part of results.json; an accuracy that could not be measured is None.

    Then `not_measured` says why: `why`, or what the evaluation found.
    """
    measured = {} if evaluation is None else evaluation.scores
    scores: dict = {name: measured.get(name) for name in ROWS}
    scores["data"] = config["data"]["_target_"].rpartition(".")[2]
    if not measured:
        found = "nothing was tested" if evaluation is None else evaluation.not_measured
        scores["not_measured"] = why or found
    return scores


def training_of(trainer: L.Trainer, seconds: float) -> dict:
    """The training's part of results.json."""
    checks = [c for c in trainer.callbacks if hasattr(c, "checks_run")]
    return {
        "gradient_checks/run": sum(c.checks_run for c in checks),
        "gradient_checks/failed": sum(c.checks_failed for c in checks),
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "wall_seconds": round(seconds, 2),
    }


def write(results: Mapping, path: Path) -> None:
    """Write results.json whole; what is no finite number becomes null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in results.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(finite, indent=2) + "\n")
    temporary.replace(path)


def show(results: Mapping, files: Mapping[str, Path], logs: Path) -> None:
    """Print the table, where things lie and, if TensorBoard has any, how to look at its pages."""
    table = Table(show_header=False)
    for name, title in ROWS.items():
        table.add_row(title, percent(results[name], results.get("not_measured", "")))
    if "gradient_checks/run" in results:
        table.add_row("gradient checks", _checks(results))
    table.add_row("wall time", _wall_time(results))
    Console().print(table)
    # plain prints: a path must stay on one line to be copied
    for name, path in files.items():
        print(f"{name + ':':<12} {path if path.exists() else 'none was written'}")
    if not any(logs.glob("*/events.out.tfevents.*")):
        return
    print(f"look at it:  tensorboard --logdir {logs}")
    if "gradient_checks/run" in results:
        checked = ", gradients" if results["gradient_checks/run"] else ""
        print(f"{'':<12} TIME SERIES: training{checked}; CUSTOM SCALARS: a chart per number")


def show_jobs(jobs: Sequence[Mapping], logs: Path) -> None:
    """Print a table of a sweep's jobs, told apart by the overrides that not all of them have.

    Args:
        jobs: each job's results and, if it failed, why.
        logs: the sweep's directory.
    """
    if not jobs:
        return
    common = set.intersection(*(set(job["overrides"]) for job in jobs))
    table = Table()
    for column in ("job", "settings", "k-NN", "linear probe", "gradient checks", "wall time"):
        table.add_column(column)
    for job in jobs:
        settings = " ".join(word for word in job["overrides"] if word not in common)
        cells = ["failed"]
        if "why" not in job:
            scores = [percent(job[name]) for name in ("test/knn", "test/linear")]
            cells = [*scores, _checks(job), _wall_time(job)]
        table.add_row(*map(escape, (str(job["job"]), settings, *cells)))
    Console().print(table)
    print(f"look at them: tensorboard --logdir {logs}")


def percent(accuracy: float | None, why: str = "") -> str:
    if accuracy is None or math.isnan(accuracy):
        return f"not measured: {why}" if why else "not measured"
    return f"{100 * accuracy:.1f} %"


def _wall_time(results: Mapping) -> str:
    minutes, seconds = divmod(round(results["wall_seconds"]), 60)
    return f"{minutes} min {seconds:02d} s"


def _checks(results: Mapping) -> str:
    run, failed = results["gradient_checks/run"], results["gradient_checks/failed"]
    if run == 0:
        return "none run"
    return f"all {run} passed" if failed == 0 else f"{failed} of {run} FAILED"
