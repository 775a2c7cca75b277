"""Where findings go: loggers, and files beside the log for failures."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from cosloss.callbacks.finding import Finding
from cosloss.callbacks.observed import Observation
from cosloss.gradient_check.module import PureLoss
from cosloss.replay import save_failure

FILES_PER_LOSS = 3


class Record:
    """Writes what one callback finds during one fit."""

    def __init__(self, prefix: str, directory: Path, rank: int) -> None:
        self.prefix = prefix
        self.directory = directory
        self.rank = rank
        self._saved: dict[str, int] = {}

    def log(
        self,
        loggers: Iterable[Logger],
        name: str,
        scalars: dict[str, float],
        finding: Finding,
        step: int,
        details: Callable[[Any], None],
    ) -> None:
        """Scalars to every logger; `details` and a failure's text to TensorBoard writers."""
        for logger in loggers:
            logger.log_metrics({f"{self.prefix}/{name}/{k}": v for k, v in scalars.items()}, step)
            writer: Any = getattr(logger, "experiment", None)
            if hasattr(writer, "add_custom_scalars"):
                details(writer)
                if not finding.passed:
                    writer.add_text(f"{self.prefix}/{name}/failure", finding.table, step)
                    writer.flush()
            if not finding.passed:
                logger.save()

    def failure(
        self,
        name: str,
        batch: int,
        finding: Finding,
        observation: Observation,
        loss: PureLoss,
        settings: dict[str, Any],
    ) -> str:
        """The three lines that say what is wrong; the inputs are saved for the first few."""
        lines = [
            f"{self.prefix}: the gradient of `{name}` ({loss.title}) is wrong in batch {batch}",
            finding.reason,
        ]
        self._saved[name] = self._saved.get(name, 0) + 1
        if self._saved[name] <= FILES_PER_LOSS:
            rank = f"-rank{self.rank}" if self.rank else ""
            path = self.directory / f"{self.prefix}-{name}-batch{batch:06d}{rank}.pt"
            check = {"kind": self.prefix, **settings}
            try:
                save_failure(
                    path, loss, observation.inputs, observation.autocast, finding.reason, check
                )
                lines.append(f"reproduce it: python -m cosloss.verify --replay {path}")
            except (OSError, TypeError) as error:
                lines.append(f"it could not be saved to be reproduced: {error}")
        finding.table = "\n\n".join([*lines, finding.table])
        return "\n  ".join(lines)
