"""results.json as soon as there are results."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig

from experiments.simclr.evaluation import report
from experiments.simclr.program.errors import Diverged


class Results(L.Callback):
    """Write results.json at the end of the test; with nulls where training diverged.

    It must be the first callback: no picture that fails may cost the results.

    Args:
        path: of results.json.
        config: the run's.
        job: what a sweep's table tells this job by; empty without a sweep.
    """

    def __init__(self, path: Path, config: DictConfig, job: Mapping[str, Any]) -> None:
        self.path = path
        self.config = config
        self.job = job
        self._started = time.perf_counter()

    def on_test_end(self, trainer, module) -> None:
        self.write(trainer, module)

    def on_exception(self, trainer, module, exception) -> None:
        if isinstance(exception, Diverged):
            self.write(trainer, module, "the loss is no number")

    def write(self, trainer: L.Trainer, module: L.LightningModule, why: str = "") -> dict:
        """Write and return what there is; `why` says why nothing was measured."""
        results = report.scores_of(module.evaluation, self.config, why)
        results |= report.training_of(trainer, time.perf_counter() - self._started) | self.job
        if trainer.is_global_zero:
            report.write(results, self.path)
        return results
