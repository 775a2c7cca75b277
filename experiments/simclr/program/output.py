"""Standard output and error that never cost a run its results."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class TolerantFile(io.FileIO):
    """A file whose reader may go away: what can no longer be written is dropped."""

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError:  # a closed pipe, a terminal that has gone, a full disk
            return len(data)


@contextmanager
def tolerant_output() -> Iterator[None]:
    """Within it printing never fails: a closed pipe is written to in vain, and what the encoding
    lacks is escaped. Output to a file is there line by line."""
    previous = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    for name, stream in previous.items():
        setattr(sys, name, _tolerant(stream))
    try:
        yield
    finally:
        for name, stream in previous.items():
            with suppress(OSError, ValueError):
                getattr(sys, name).flush()
            setattr(sys, name, stream)


def _tolerant(stream: io.TextIOBase | None) -> io.TextIOBase:
    if stream is None:  # as a shell's >&- has it
        return Path(os.devnull).open("w")
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # not a file: a notebook's, a test's
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(TolerantFile(number, "w", closefd=False)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=True,
    )
