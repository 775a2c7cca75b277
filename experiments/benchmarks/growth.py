"""How NT-Xent's time and memory grow with the batch: each size in a process of its own."""

import subprocess
import sys
from pathlib import Path

ROWS = (8192, 16384, 32768, 65536)

STEP = """
import re, sys, time
from pathlib import Path
import torch
from cosloss import nt_xent_loss

def peak():  # ru_maxrss would start at the parent's
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

z1, z2 = (torch.randn(int(sys.argv[1]) // 2, 128, requires_grad=True) for _ in range(2))
small = [torch.randn(64, 128, requires_grad=True) for _ in range(2)]
nt_xent_loss(*small, 0.1).backward()  # libraries allocate at their first use
before = peak()
start = time.perf_counter()
nt_xent_loss(z1, z2, 0.1).backward()
print(time.perf_counter() - start, peak() - before)
"""


def show_growth(plot: Path) -> None:
    """Print and plot seconds and MiB over the number of rows."""
    found = []
    print("\nnt_xent_loss, one step in a fresh process, gradients included in the memory")
    print(f"{'rows 2N':>10}{'seconds':>10}{'MiB':>10}{'MiB per 1000 rows':>20}{'matrix MiB':>12}")
    for rows in ROWS:
        out = subprocess.run(
            [sys.executable, "-c", STEP, str(rows)], capture_output=True, text=True, check=True
        ).stdout
        seconds, memory = map(float, out.split())
        found.append((rows, seconds, memory))
        matrix = rows**2 * 4 / 2**20
        print(
            f"{rows:>10}{seconds:>10.2f}{memory:>10.0f}{1e3 * memory / rows:>20.2f}{matrix:>12.0f}"
        )
    _draw(found, plot)
    print(f"plot: {plot}")


def _draw(found: list[tuple[int, float, float]], plot: Path) -> None:
    from matplotlib.figure import Figure

    rows, seconds, memory = zip(*found, strict=True)
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    time_axes.loglog(rows, seconds, "o-", base=2)
    time_axes.set(xlabel="rows 2N", ylabel="seconds, forward and backward")
    memory_axes.loglog(rows, memory, "o-", base=2, label="cosloss")
    matrix = [n**2 * 4 / 2**20 for n in rows]
    memory_axes.loglog(rows, matrix, "--", base=2, label="the similarity matrix alone")
    memory_axes.set(xlabel="rows 2N", ylabel="MiB")
    memory_axes.legend()
    figure.savefig(plot, dpi=150)
