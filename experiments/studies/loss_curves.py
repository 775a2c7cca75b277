"""The curves of loss=X and loss=X_reference in one picture.

    python -m experiments.studies.loss_curves

Each loss trains experiment=simclr from the same seed as its twin in plain autograd operations, in
float32 and in float64, by train.py itself. Beside the curves is how far apart they are; and, as a
control, how far the loss's own curve moves when one weight starts one float32 apart.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[2]
LOSSES = ("cosine_embedding", "nt_xent", "info_nce", "sup_con", "sigmoid_contrastive")
TWIN, CONTROL, TWIN_64 = "twin, float32", "one weight moved, float32", "twin, float64"
RESOLUTION = 2.0**-24  # event files hold float32

Pair = tuple[np.ndarray, np.ndarray]


class MoveOneWeight(L.Callback):
    """The control: the encoder's first weight starts at the next float32."""

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        weights = next(module.encoder.parameters()).data
        weight = weights[(0,) * weights.ndim]  # whatever their layout in memory
        weight.copy_(torch.nextafter(weight, torch.tensor(torch.inf)))


def pairs_of(loss: str, logs: Path, overrides: list[str]) -> dict[str, Pair]:
    """The loss's curve beside another, by what the other is."""

    def trained(name: str, *settings: str) -> np.ndarray:
        return curve(logs / f"{loss}-{name}", [*settings, *overrides])

    own, twin, double = f"loss={loss}", f"loss={loss}_reference", "trainer.precision=64-true"
    moved = "+callbacks.control._target_=experiments.studies.loss_curves.MoveOneWeight"
    ours = trained("32", own)
    return {
        TWIN: (ours, trained("32-twin", twin)),
        CONTROL: (ours, trained("32-control", own, moved)),
        TWIN_64: (trained("64", own, double), trained("64-twin", twin, double)),
    }


def curve(run: Path, settings: list[str]) -> np.ndarray:
    """train/loss at every step of a run of train.py; a finished run is not repeated."""
    if not (run / "results.json").exists():
        command = [sys.executable, "train.py", "experiment=simclr", f"hydra.run.dir={run}"]
        every_step = ["trainer.log_every_n_steps=1", "callbacks=no_checks"]
        command += [*every_step, *settings]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    events = EventAccumulator(str(run / "train"), {"scalars": 0})
    events.Reload()
    return np.array([point.value for point in events.Scalars("train/loss")])


def apart(pair: Pair) -> np.ndarray:
    """The relative difference of two curves at each step."""
    one, other = pair
    return np.abs(one - other) / np.abs(other)


def figure_of(curves: dict[str, dict[str, Pair]]) -> Figure:
    """One row per loss: on the left both curves in float32, on the right all differences."""
    rows = len(curves)
    figure = Figure(figsize=(8, 1.85 * rows + 1.1), dpi=110, layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False, sharex=True)
    colors = {TWIN: "tab:blue", CONTROL: "tab:orange", TWIN_64: "tab:green"}
    for (left, right), (loss, pairs) in zip(axes, curves.items(), strict=True):
        ours, twin = pairs[TWIN]
        left.plot(ours, color="tab:blue", linewidth=4, alpha=0.35, label="loss=X")
        left.plot(twin, color="black", linewidth=0.9, label="loss=X_reference")
        left.set_ylabel(loss)
        for name, pair in pairs.items():
            difference = np.maximum(apart(pair), RESOLUTION)
            right.semilogy(difference, color=colors[name], linewidth=1.2, label=name)
        right.axhline(RESOLUTION, color="grey", linewidth=0.8, linestyle=":")
        right.set_ylim(RESOLUTION / 3, 1)
        right.set_yticks([1e-6, 1e-4, 1e-2, 1])
    titles = "training loss, float32", "relative difference (dotted: the least that is recorded)"
    for top, bottom, title in zip(axes[0], axes[-1], titles, strict=True):
        lines = [line for line in top.lines if not line.get_label().startswith("_")]
        above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 2, "frameon": False}
        top.legend(handles=lines, title=title, fontsize="small", **above)
        bottom.set_xlabel("step")
    figure.align_ylabels(axes[:, 0])
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--losses", nargs="+", default=LOSSES)
    parser.add_argument("--logs", type=Path, default=Path("logs/loss_curves"))
    parser.add_argument("--out", type=Path, default=Path("docs/loss_curves.png"))
    parser.add_argument("overrides", nargs="*", help="for train.py: trainer.max_epochs=2")
    arguments = parser.parse_args()
    logs = arguments.logs.absolute()
    curves = {loss: pairs_of(loss, logs, arguments.overrides) for loss in arguments.losses}
    figure_of(curves).savefig(arguments.out)
    for loss, pairs in curves.items():
        for name, pair in pairs.items():
            found = apart(pair)
            print(
                f"{loss} beside {name}: {len(found)} steps, "
                f"apart by {np.median(found):.1e} in the median, at most {found.max():.1e}"
            )
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
