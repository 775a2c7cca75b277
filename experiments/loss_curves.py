"""The curves of loss=X and loss=X_reference in one picture: python -m experiments.loss_curves

Each loss trains experiment=simclr from the same seed as its twin in plain autograd operations, in
float32 and in float64, by train.py itself. Below the curves is how far apart they are.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
LOSSES = ("cosine_embedding", "nt_xent", "info_nce", "sigmoid_contrastive")
PRECISIONS = ("32-true", "64-true")
RESOLUTION = 2.0**-24  # event files hold float32


def curve(loss: str, precision: str, logs: Path, overrides: list[str]) -> np.ndarray:
    """train/loss at every step of a run of train.py; a finished run is not repeated."""
    run = logs / f"{loss}-{precision}"
    if not (run / "results.json").exists():
        settings = [f"loss={loss}", f"trainer.precision={precision}", f"hydra.run.dir={run}"]
        every_step = ["trainer.log_every_n_steps=1", "callbacks=no_checks"]
        command = [sys.executable, "train.py", "experiment=simclr", *settings, *every_step]
        subprocess.run([*command, *overrides], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    events = EventAccumulator(str(run), {"scalars": 0})
    events.Reload()
    return np.array([point.value for point in events.Scalars("train/loss")])


def figure_of(curves: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]) -> Figure:
    """One column per loss: both curves, and their relative difference in each precision."""
    figure = Figure(figsize=(3.4 * len(curves), 5.2), dpi=120, layout="constrained")
    axes = figure.subplots(2, len(curves), squeeze=False, sharex=True)
    for column, (loss, by_precision) in enumerate(curves.items()):
        above, below = axes[:, column]
        ours, twin = by_precision[PRECISIONS[0]]
        above.plot(ours, linewidth=3, alpha=0.4, label=f"loss={loss}")
        above.plot(twin, linewidth=1, linestyle="--", color="black", label="its twin")
        above.legend(fontsize="small")
        for precision, (ours, twin) in by_precision.items():
            difference = np.abs(ours - twin) / np.abs(twin)
            below.semilogy(np.maximum(difference, RESOLUTION), label=f"float{precision[:2]}")
        below.axhline(RESOLUTION, color="grey", linewidth=0.8, linestyle=":")
        below.set_ylim(RESOLUTION / 2, 1)
        below.legend(fontsize="small")
        below.set_xlabel("step")
    axes[0, 0].set_ylabel("training loss, float32")
    axes[1, 0].set_ylabel("relative difference\n(dotted: what is recorded)")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--losses", nargs="+", default=LOSSES)
    parser.add_argument("--logs", type=Path, default=Path("logs/loss_curves"))
    parser.add_argument("--out", type=Path, default=Path("docs/loss_curves.png"))
    parser.add_argument("overrides", nargs="*", help="for train.py: trainer.max_epochs=2")
    arguments = parser.parse_args()
    logs = arguments.logs.absolute()
    curves = {
        loss: {
            precision: (
                curve(loss, precision, logs, arguments.overrides),
                curve(f"{loss}_reference", precision, logs, arguments.overrides),
            )
            for precision in PRECISIONS
        }
        for loss in arguments.losses
    }
    figure_of(curves).savefig(arguments.out)
    for loss, by_precision in curves.items():
        for precision, (ours, twin) in by_precision.items():
            worst = np.max(np.abs(ours - twin) / np.abs(twin))
            print(f"{loss}, {precision}: {len(ours)} steps, at most {worst:.1e} apart")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
