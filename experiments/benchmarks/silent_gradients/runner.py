"""Every case in a child process of its own, with limits; results as they come, and the table."""

import fnmatch
import json
import multiprocessing
import resource
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from experiments.benchmarks.silent_gradients import (
    faults,
    processes,
    right,
    training,
    two_processes,
)
from experiments.benchmarks.silent_gradients.cases import FAULTS, RIGHT, Case, Fault

SECONDS = 60
GIBIBYTES = 8

assert faults
assert right


def run(
    only: str = "*", minutes: float | None = None, out: Path = Path("silent_gradients")
) -> bool:
    """Run the cases whose name fits, and write results.jsonl and table.md into a folder."""
    from experiments.benchmarks.silent_gradients.table import markdown

    out.mkdir(parents=True, exist_ok=True)
    stop = time.monotonic() + 60 * minutes if minutes else float("inf")
    results = []
    with (out / "results.jsonl").open("w") as file:
        for result in _results(only, stop):
            results.append(result)
            file.write(json.dumps(result) + "\n")
            file.flush()
            print(f"{result['name']:<58} {result.get('skip') or result['summary']}", flush=True)
    (out / "table.md").write_text(markdown(results))
    print(f"table: {out / 'table.md'}")
    return bool(results)


def _results(only: str, stop: float) -> Iterable[dict[str, Any]]:
    for case in [*FAULTS, *RIGHT]:
        if fnmatch.fnmatch(case.name, only) and time.monotonic() < stop:
            yield _in_a_child(case)
    names = [c.name for c in processes.FAULTS if fnmatch.fnmatch(c.name, only)]
    if names and time.monotonic() < stop:
        yield from (r | {"summary": summary(r)} for r in two_processes.results(names))


def _in_a_child(case: Case) -> dict[str, Any]:
    base = {"name": case.name, "what": "fault" if isinstance(case, Fault) else "right"}
    if case.missing():
        return base | {"skip": f"needs {case.missing()}"}
    # fork: torch is imported once; nothing in this process has computed yet, so no threads are lost
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(case, queue))
    child.start()
    parts: dict[str, Any] = {}
    end = time.monotonic() + SECONDS
    while "end" not in parts and time.monotonic() < end:
        try:
            parts |= queue.get(timeout=0.2)
        except Empty:
            if not child.is_alive():
                break
    child.kill()
    child.join()
    ended = {"word": "ended the run", "checks": 0, "reasons": ["out of time or memory"]}
    if "watched" not in parts:
        parts["watched"] = ended
    if case.twin and not case.stops and "with a twin" not in parts and "end" not in parts:
        parts["with a twin"] = ended
    result = base | parts
    return result | {"summary": summary(result)}


def _child(case: Case, queue: Any) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (GIBIBYTES << 30, GIBIBYTES << 30))
    steps: dict[str, Callable[[], Any]] = {
        "alarm": lambda: training.unwatched(case, case.make),
        "watched": lambda: training.watched(case, case.make, None),
    }
    if case.twin:
        steps["with a twin"] = lambda: training.watched(case, case.make, case.twin)
    if isinstance(case, Fault):
        twin = case.twin if case.stops else None
        steps["mended"] = lambda: training.watched(case, case.mend, twin)
    steps["gradcheck"] = lambda: training.gradcheck(case, case.make)
    for name, step in steps.items():
        try:
            queue.put({name: step()})
        except Exception:
            queue.put({name: {"word": "error", "reasons": [traceback.format_exc()[-400:]]}})
    queue.put({"end": True})


def summary(result: dict[str, Any]) -> str:
    """One line: the callbacks' words, gradcheck's and the alarm's, and whether bits are equal."""
    parts = [f"callbacks: {result['watched']['word']}"]
    if "with a twin" in result:
        parts.append(f"with a twin: {result['with a twin']['word']}")
    if "mended" in result:
        parts.append(f"mended: {result['mended']['word']}")
    parts.append(f"gradcheck: {result.get('gradcheck', 'out of time')}")
    parts.append(f"alarm: {result.get('alarm', {}).get('word')}")
    parts.append("same bits" if same_bits(result) else "OTHER BITS")
    return "; ".join(parts)


def same_bits(result: dict[str, Any]) -> bool:
    """Whether the run with callbacks left the weights of the run without them."""
    alone = result.get("alarm", {}).get("weights")
    runs = [result[k] for k in ("watched", "with a twin") if k in result]
    return alone is not None and all(run.get("weights") == alone for run in runs)
