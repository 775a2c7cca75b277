"""What the program does at a signal: it ends with 128 and the signal's number, and says so.

SIGUSR1, SIGUSR2 and SIGXCPU are what batch systems announce the end of a job's time with, SIGHUP
that the terminal has gone. One that the program was started to ignore, as nohup does, is ignored.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)


class Interrupted(BaseException):
    """The program was asked to stop. No Exception: what catches those must not keep it.

    Args:
        signum: of the signal.
        saved: whether a checkpoint was written for it.
    """

    def __init__(self, signum: int, saved: bool = False) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_status = 128 + signum
        self.saved = saved


class _Interruption:
    """The signal that came first, and whether somebody will see to it.

    Attributes:
        received: the signal's number; None before one has come.
        awaited: whether the training step that is running will be finished and saved first.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.awaited = False

    def handle(self, signum: int, frame: object) -> None:
        if self.received is not None:
            name = signal.Signals(signum).name
            os.write(2, f"\n{name}: ended at once, a second signal after the first\n".encode())
            os._exit(128 + signum)
        self.received = signum
        if not self.awaited:
            raise Interrupted(signum)


interruption = _Interruption()


def end_at_signals() -> None:
    """From now on a signal ends the process, with its status and a line: for a program's start."""
    for signum in SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _end)


def _end(signum: int, frame: object) -> None:
    name = signal.Signals(signum).name
    os.write(2, f"\n{name}: ended before there was anything to save\n".encode())
    os._exit(128 + signum)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within it a signal raises Interrupted, at once or after the step; a second one ends all."""
    interruption.received, interruption.awaited = None, False
    previous = {signum: signal.getsignal(signum) for signum in SIGNALS}
    for signum, handler in previous.items():
        if handler is not signal.SIG_IGN:
            signal.signal(signum, interruption.handle)
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
