"""What the GPU benchmark found, as JSON, a Markdown table and a plot."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Result:
    """One contender at one shape: milliseconds (median, spread), MiB beyond the inputs, a share.

    share: of the copy bandwidth for the row-wise op, of the matrix rate for NT-Xent.
    """

    op: str
    shape: str
    dtype: str
    contender: str
    median: float
    fastest: float
    slowest: float
    memory: float
    share: float


def write(results: list[Result], machine: Mapping[str, Any], folder: Path) -> None:
    """gpu.json, gpu.md and gpu.png."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"machine": dict(machine), "results": [asdict(result) for result in results]}
    (folder / "gpu.json").write_text(json.dumps(content, indent=2))
    (folder / "gpu.md").write_text(markdown(results, machine))
    _draw(results, folder / "gpu.png")


def markdown(results: list[Result], machine: Mapping[str, Any]) -> str:
    """The table, one line per contender, below the machine that it was measured on."""
    about = ", ".join(
        f"{name} {value:.0f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in machine.items()
    )
    names = ("op", "rows x D", "dtype", "contender", "median ms", "fastest to slowest")
    names += ("extra MiB", "of the limit", "cosloss is")
    lines = [f"Forward and backward, {about}.", "", f"| {' | '.join(names)} |"]
    lines.append("|---" * len(names) + "|")
    ours = {(r.op, r.shape, r.dtype): r.median for r in results if r.contender == "cosloss"}
    for r in results:
        own = ours.get((r.op, r.shape, r.dtype))
        faster = "" if own is None else f"{r.median / own:.2f}x"
        lines.append(
            f"| {r.op} | {r.shape} | {r.dtype} | {r.contender} | {r.median:.3f} "
            f"| {r.fastest:.3f} to {r.slowest:.3f} | {r.memory:.1f} | {r.share:.0%} | {faster} |"
        )
    return "\n".join(lines) + "\n"


def _draw(results: list[Result], path: Path) -> None:
    from matplotlib.figure import Figure

    groups = sorted({(r.op, r.dtype) for r in results})
    figure = Figure(figsize=(9, 3 * len(groups)), layout="constrained")
    for axes, (op, dtype) in zip(
        figure.subplots(len(groups), squeeze=False)[:, 0], groups, strict=True
    ):
        chosen = [r for r in results if (r.op, r.dtype) == (op, dtype)]
        for name in dict.fromkeys(r.contender for r in chosen):
            own = [r for r in chosen if r.contender == name]
            axes.plot([r.shape for r in own], [r.median for r in own], "o-", label=name)
        axes.set(title=f"{op}, {dtype}", ylabel="ms, forward and backward", yscale="log")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
