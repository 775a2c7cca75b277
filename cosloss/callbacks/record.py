"""Where findings go in Lightning: to every logger, with more for TensorBoard's writers."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from cosloss.callbacks.packages import Logger
from cosloss.watch.finding import Finding


def log(
    loggers: Iterable[Logger],
    tag: str,
    scalars: dict[str, float],
    finding: Finding,
    step: int,
    details: Callable[[Any], None],
) -> None:
    """Scalars to every logger; `details` and a failure's text to TensorBoard writers."""
    failed = finding.verdict == "wrong"
    for logger in loggers:
        logger.log_metrics({f"{tag}/{k}": v for k, v in scalars.items()}, step)
        for writer in tensorboard_writers([logger]):
            details(writer)
            if failed:
                writer.add_text(f"{tag}/failure", finding.table, step)
                writer.flush()
        if failed:
            logger.save()


def tensorboard_writers(loggers: Iterable[Logger]) -> Iterator[Any]:
    """The SummaryWriters among what the loggers write with."""
    for logger in loggers:
        writer: Any = getattr(logger, "experiment", None)
        if hasattr(writer, "add_custom_scalars"):
            yield writer
