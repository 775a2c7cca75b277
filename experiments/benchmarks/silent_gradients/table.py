"""The results as Markdown, with the hardware, the date and the versions."""

import datetime
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from experiments.benchmarks.silent_gradients.cases import FAULTS
from experiments.benchmarks.silent_gradients.processes import FAULTS as PROCESS_FAULTS
from experiments.benchmarks.silent_gradients.runner import same_bits

PACKAGES = (
    "torch",
    "lightning",
    "torchvision",
    "lightly",
    "pytorch-metric-learning",
    "kornia",
    "torchmetrics",
    "pytorch-optimizer",
)


def markdown(results: list[dict[str, Any]]) -> str:
    """Counts, a table of the faults and one of the right functions that something accuses."""
    ran = [r for r in results if not r.get("skip")]
    wrong = [r for r in ran if r["what"] == "fault"]
    fine = [r for r in ran if r["what"] == "right"]
    return "\n".join(
        [_setting(), "", _counts(wrong, fine), "", *_faults(wrong), "", *_accused(fine), ""]
    )


def caught(result: dict[str, Any]) -> bool:
    """Whether the callbacks called it wrong, with or without a twin; of a fault, and not mended."""
    if result.get("mended", {}).get("word") in ("wrong", "ended the run"):
        return False
    return accused(result)


def caught_at_first(result: dict[str, Any]) -> bool:
    """Whether it was caught in the first batch, on which all checks are due."""
    words = (result.get(k, {}) for k in ("watched", "with a twin"))
    return caught(result) and any(word.get("first") for word in words)


def accused(result: dict[str, Any]) -> bool:
    """Whether the callbacks called it wrong, with or without a twin."""
    return any(result.get(k, {}).get("word") == "wrong" for k in ("watched", "with a twin"))


def _setting() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return (
        f"{datetime.date.today()}, {_processor()}, Python {platform.python_version()}, "
        + ", ".join(found)
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _counts(wrong: list[dict[str, Any]], fine: list[dict[str, Any]]) -> str:
    def share(rows: list[dict[str, Any]], test: Any) -> str:
        return f"{sum(map(bool, map(test, rows)))} of {len(rows)}"

    ended = lambda r: r["watched"]["word"] == "ended the run"  # noqa: E731
    rows = [
        ("callbacks", share(wrong, caught), share(fine, accused)),
        (
            "torch.autograd.gradcheck",
            share(wrong, lambda r: r.get("gradcheck") == "wrong"),
            share(fine, lambda r: r.get("gradcheck") == "wrong"),
        ),
        (
            "alarm on gradient norms",
            share(wrong, lambda r: r["alarm"]["word"] == "rings"),
            share(fine, lambda r: r["alarm"]["word"] == "rings"),
        ),
    ]
    lines = ["| | faults caught | right functions called wrong |", "|---|---|---|"]
    lines += [f"| {a} | {b} | {c} |" for a, b, c in rows]
    lines += [
        "",
        (
            "A fault counts as caught by the callbacks if they call it wrong and its mended "
            f"version not. At the first check: {share(wrong, caught_at_first)}."
        ),
        "",
        (
            f"Weights identical to the bit with callbacks: {share(fine, same_bits)} right "
            f"functions. Runs ended by a check: {sum(map(ended, wrong + fine))}. Right functions "
            f"not checked: {sum(r['watched']['word'] == 'not checked' for r in fine)}."
        ),
    ]
    return "\n".join(lines)


def _faults(rows: list[dict[str, Any]]) -> list[str]:
    known = {c.name: c for c in [*FAULTS, *PROCESS_FAULTS]}
    lines = [
        "| fault | kind | callbacks | with a twin | its mended version | gradcheck | alarm |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        case = known[r["name"]]
        name = r["name"].replace("_", " ")
        lines.append(
            f"| [{name}]({case.source}) | {case.kind} | {r['watched']['word']} | "
            f"{r.get('with a twin', {}).get('word', '')} | "
            f"{r.get('mended', {}).get('word', '')} | {r.get('gradcheck', '')} | "
            f"{r['alarm']['word']} |"
        )
    return lines


def _accused(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| right function that is accused or disturbed | callbacks | weights | reason |",
        "|---|---|---|---|",
    ]
    for r in rows:
        word = "wrong" if accused(r) else r["watched"]["word"]
        if word in ("right", "not checked") and same_bits(r):
            continue
        reasons = [x for k in ("watched", "with a twin") for x in r.get(k, {}).get("reasons", [])]
        reason = reasons[0].replace("|", "/") if reasons else ""
        bits = "same" if same_bits(r) else "other"
        lines.append(f"| {r['name']} | {word} | {bits} | {reason} |")
    return lines if len(lines) > 2 else ["No right function is accused or disturbed."]
