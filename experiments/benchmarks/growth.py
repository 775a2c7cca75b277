"""How NT-Xent's time and memory grow with the batch: each size in a process of its own."""

import subprocess
import sys
from pathlib import Path

ROWS = (8192, 16384, 32768, 65536)
LARGEST_OF_RIVALS = 16384  # beyond, they need 12 GiB and more
CONTENDERS = {
    "cosloss": "from cosloss import nt_xent_loss; loss = lambda a, b: nt_xent_loss(a, b, 0.1)",
    "lean autograd": "from experiments.benchmarks.contrastive_rivals import nt_xent as loss",
    "lightly": "from lightly.loss import NTXentLoss; loss = NTXentLoss(temperature=0.1)",
}

STEP = """
import re, sys, time
from pathlib import Path
import torch
exec(sys.argv[2])

def peak():  # ru_maxrss would start at the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

z1, z2 = (torch.randn(int(sys.argv[1]) // 2, 128, requires_grad=True) for _ in range(2))
small = [torch.randn(64, 128, requires_grad=True) for _ in range(2)]
loss(*small).backward()  # libraries allocate at their first use
before = peak()
start = time.perf_counter()
loss(z1, z2).backward()
print(time.perf_counter() - start, peak() - before)
"""

Point = tuple[int, float, float]  # rows, seconds, MiB


def show_growth(plot: Path) -> None:
    """Print and plot seconds and MiB over the number of rows."""
    print("\nnt_xent_loss, one step in a fresh process, gradients included in the memory")
    print(f"{'':<16}{'rows 2N':>10}{'seconds':>10}{'MiB':>10}{'KiB per row':>13}{'matrix MiB':>12}")
    found: dict[str, list[Point]] = {}
    for name, source in CONTENDERS.items():
        sizes = [n for n in ROWS if name == "cosloss" or n <= LARGEST_OF_RIVALS]
        found[name] = [_measured(rows, source) for rows in sizes]
        for rows, seconds, memory in found[name]:
            print(
                f"{name:<16}{rows:>10}{seconds:>10.2f}{memory:>10.0f}{1024 * memory / rows:>13.2f}"
                f"{_matrix(rows):>12.0f}"
            )
    _draw(found, plot)
    print(f"plot: {plot}")


def _measured(rows: int, source: str) -> Point:
    command = [sys.executable, "-c", STEP, str(rows), source]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seconds, memory = map(float, out.split())
    return rows, seconds, memory


def _matrix(rows: int) -> float:
    return rows**2 * 4 / 2**20


def _draw(found: dict[str, list[Point]], plot: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    for name, points in found.items():
        rows, seconds, memory = zip(*points, strict=True)
        time_axes.loglog(rows, seconds, "o-", base=2, label=name)
        memory_axes.loglog(rows, memory, "o-", base=2, label=name)
    time_axes.set(ylabel="seconds, forward and backward")
    memory_axes.loglog(
        ROWS, [_matrix(n) for n in ROWS], "--", base=2, label="one similarity matrix"
    )
    memory_axes.set(ylabel="MiB")
    for axes in (time_axes, memory_axes):
        axes.set_xlabel("rows 2N")
        axes.set_xticks(ROWS, [f"{n:,}" for n in ROWS])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    figure.legend(*memory_axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(plot, dpi=150)
