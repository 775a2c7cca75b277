"""Features of a small encoder under several losses and seeds, as a table of means and spreads.

    python -m experiments.studies.compare_losses data.root=DIR

DIR holds train/ and test/, each with a folder per class. Every run is one of `train.py
experiment=simclr_cifar10_small`; those that have finished are not run again. The overrides are for
all of them.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TRAIN = Path(__file__).parents[2] / "train.py"
SETTINGS = {
    "random encoder": ("trainer.max_epochs=0",),
    "NT-Xent": ("loss=nt_xent",),
    "in-batch cosine, negative_weight 4": ("loss=cosine_embedding", "loss.negative_weight=4"),
    "in-batch cosine": ("loss=cosine_embedding",),
}
RAW_PIXELS = "raw pixels"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.studies.compare_losses", description=__doc__
    )
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("logs/study"), help="the runs' folder")
    options = parser.parse_args(arguments)
    found = {
        name: [
            run(options.out / name / f"seed{seed}", f"seed={seed}", *settings, *options.overrides)
            for seed in options.seeds
        ]
        for name, settings in SETTINGS.items()
    }
    print(table(found))


def run(folder: Path, *overrides: str) -> dict[str, float]:
    """The results of the run in this folder, which is trained if it has not finished."""
    results = folder / "results.json"
    if not results.exists():
        command = [sys.executable, str(TRAIN), "experiment=simclr_cifar10_small"]
        # in quotes: a comma would make Hydra see two values
        where = f"hydra.run.dir='{folder.absolute()}'"
        subprocess.run([*command, where, *overrides], check=True)
    return json.loads(results.read_text())


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Accuracies in Markdown, mean and standard deviation over the seeds; seconds, the median."""
    lines = ["| features | k-NN, test | linear probe, test | seconds |", "|---|---|---|---|"]
    raw = next(iter(found.values()))[0]["raw_pixels/knn"]
    lines.append(f"| {RAW_PIXELS} | {100 * raw:.1f} % | | |")
    for name, runs in found.items():
        knn, linear = (spread([r[f"test/{probe}"] for r in runs]) for probe in ("knn", "linear"))
        seconds = statistics.median(r["wall_seconds"] for r in runs)
        lines.append(f"| {name} | {knn} | {linear} | {seconds:.0f} |")
    return "\n".join(lines)


def spread(accuracies: Sequence[float]) -> str:
    """Mean and, of several, the sample's standard deviation, in percent.

    Example:
        >>> spread([0.4, 0.42, 0.44])
        '42.0 ± 2.0 %'
    """
    mean = f"{100 * statistics.mean(accuracies):.1f}"
    if len(accuracies) == 1:
        return f"{mean} %"
    return f"{mean} ± {100 * statistics.stdev(accuracies):.1f} %"


if __name__ == "__main__":
    main()
