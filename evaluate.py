"""Evaluate a checkpoint: python evaluate.py ckpt_path=FILE|RUN|last [out=DIR] [KEY=VALUE ...]

The run's own configuration, which the checkpoint holds, says which data and model; data=,
trainer=, their keys, model.knn_k= and seed= may say otherwise. results.json, the pictures and
TensorBoard's files go to out, by default the folder `evaluation` in the run's directory.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.simclr.program.interruption import end_at_signals

    end_at_signals()

import sys
import time
from pathlib import Path

import lightning as L
from hydra.utils import instantiate

from experiments.simclr.evaluation import report
from experiments.simclr.evaluation.overview import OverviewLogger
from experiments.simclr.program.command_line import USER_ERRORS, command, one_line_errors
from experiments.simclr.program.quiet import silence_routine_messages
from experiments.simclr.program.saved_run import SavedRun, load_run

CALLBACKS = ("progress", "pictures")
ONE_DEVICE = {"devices": 1, "num_nodes": 1, "strategy": "auto", "sync_batchnorm": False}


def main(arguments: list[str]) -> None:
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    started = time.perf_counter()
    silence_routine_messages()
    with one_line_errors(expected=(*USER_ERRORS, ValueError, TypeError)):
        run = load_run(arguments)
        L.seed_everything(run.config.seed, workers=True, verbose=False)
        data, model = run.data(), run.model()
        out = Path(run.config.out or run.directory / "evaluation")
        trainer = build_trainer(run, out)
    with one_line_errors():
        trainer.test(model, data, verbose=False)
        results = report.scores_of(model.evaluation, run.config)
        results |= {
            "checkpoint": str(run.path),
            "steps": run.step,
            "wall_seconds": round(time.perf_counter() - started, 2),
        }
        report.write(results, out / "results.json")
        report.show(results, {"results": out / "results.json", "pictures": out / "pictures"}, out)


def build_trainer(run: SavedRun, out: Path) -> L.Trainer:
    callbacks = run.config.callbacks
    return instantiate(
        run.config.trainer,
        **ONE_DEVICE,
        callbacks=[instantiate(callbacks[name]) for name in CALLBACKS if name in callbacks],
        logger=OverviewLogger(out, "test"),
    )


if __name__ == "__main__":
    with command():
        main(sys.argv[1:])
