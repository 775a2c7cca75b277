"""What the programs share: errors said in one line, signals, output that never fails."""

import shlex
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import hydra
import lightning
import torch
from hydra.errors import ConfigCompositionException, HydraException, OverrideParseException
from hydra.plugins.sweeper import Sweeper
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from cosloss.callbacks import GradientError
from experiments.simclr.program.config_types import refuse_unknown
from experiments.simclr.program.errors import Diverged, UserError
from experiments.simclr.program.interruption import Interrupted, interruptible
from experiments.simclr.program.jobs import (
    Directories,
    JobFailed,
    fail_job,
    in_a_sweep,
    job_name,
    leave_if_jobs_failed,
    quoted,
    resume_command,
)
from experiments.simclr.program.output import tolerant_output
from experiments.simclr.program.run_directory import RunDirectory

USER_ERRORS = (
    UserError,
    HydraException,
    OmegaConfBaseException,
    MisconfigurationException,
    torch.OutOfMemoryError,
    OSError,
)
KEY_ERRORS = ConfigAttributeError, ConfigKeyError
REFUSALS = ValueError, TypeError, RuntimeError
LIBRARIES = {Path(library.__file__).parent for library in (hydra, lightning)}


@contextmanager
def command() -> Iterator[None]:
    """What a program runs in: errors, signals and output as this module has them."""
    Directories.sweep = None
    with tolerant_output(), one_line_errors(), interruptible():
        yield


@contextmanager
def one_line_errors(
    run: RunDirectory | None = None, expected: tuple[type[Exception], ...] = USER_ERRORS
) -> Iterator[None]:
    """Say in one line what went wrong and leave with a status: 2 for a mistake of the user.

    A wrong gradient and a loss that is no number leave with 1, an interruption with 128 and the
    signal's number. Anything unexpected is a fault of this program, and keeps its traceback. A job
    of a sweep does not leave: it says so, and the other jobs go on.
    """
    try:
        yield
    except Interrupted as interruption:
        if rank_zero_only.rank == 0:  # of several processes, which all end alike
            print(f"\n{_interrupted(interruption, run)}")
        raise SystemExit(interruption.exit_status) from None
    except JobFailed:
        if run is None:  # the sweep is at its end
            leave_if_jobs_failed()
        raise
    except GradientError as error:
        _leave(run, f"\n{error}", str(error), 1)
    except Diverged as error:
        _leave(run, f"\ntraining has stopped: {error}", str(error), 1, alike=True)
    except Exception as error:
        if isinstance(error, expected) or _refused_by_a_library(error):
            if "debug=true" in sys.argv:
                raise
            line = _job_before_any(error) + in_one_line(error)
            _leave(run, f"error: {line}", line, 2)
        if run is None:
            leave_if_jobs_failed()  # a search in which all did has no best one, and trips over it
        if run is None or not in_a_sweep():
            raise
        traceback.print_exc()
        _leave(run, "error: as above", f"{type(error).__name__}: {in_one_line(error)}", 1)


def in_one_line(error: BaseException) -> str:
    """The message that helps: of the cause, where Hydra wraps it, with its place in the config."""
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is full: choose a smaller data.batch_size"
    if str(error).startswith("Config group override must be a string"):
        given = next((word for word in sys.argv if word.endswith("=null")), "GROUP=null")
        return f"{given}: a group is left out with {given.removesuffix('null')}[]"
    unknown = _unknown_setting(error)
    if unknown:
        return unknown
    text, _, place = str(error).partition("full_key: ")
    text = text.partition("Config search path")[0]
    if place:
        text = f"{place.split()[0]}: {error.__cause__ or text}"
    line = "; ".join(line.strip() for line in text.splitlines() if line.strip()).rstrip("; ")
    if isinstance(error, OverrideParseException) and "=" in error.override:
        key, _, value = error.override.partition("=")
        line += f"; quote it for Hydra and for the shell: {shlex.quote(f'{key}={quoted(value)}')}"
    return line


def _unknown_setting(error: BaseException) -> str:
    """Which settings there are, where Hydra could not override one that no target takes."""
    cause = error.__cause__
    if not isinstance(error, ConfigCompositionException) or not isinstance(cause, KEY_ERRORS):
        return ""
    node, name = cause.parent_node, str(cause.key)
    if not isinstance(node, DictConfig) or "_target_" not in node:
        return ""
    place = str(cause.full_key).removesuffix(name)
    try:
        refuse_unknown(node, name, place)
    except UserError as refusal:
        return str(refusal)
    return ""  # Hydra's words say how to add what the file leaves out


def _job_before_any(error: Exception) -> str:
    """Which job it is whose configuration cannot be composed: Hydra tries all before the first."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code is Sweeper.validate_batch_is_legal.__code__:
            overrides = " ".join(frame.f_locals["overrides"])
            return f"no job was run, since one cannot be: {overrides}: "
    return ""


def _refused_by_a_library(error: Exception) -> bool:
    """Whether Hydra or Lightning itself has raised it, which they do for a value in a setting."""
    frames = traceback.extract_tb(error.__traceback__)
    raised_in = Path(frames[-1].filename).parents if frames else ()
    return isinstance(error, REFUSALS) and not LIBRARIES.isdisjoint(raised_in)


def _interrupted(interruption: Interrupted, run: RunDirectory | None) -> str:
    if run is None or not run.last.exists():
        return f"{interruption}: ended before there was anything to save"
    what = "saved" if interruption.saved else "ended; training is in"
    return f"{interruption}: {what} {run.last}\nresume with:\n  {resume_command(run)}"


def _leave(
    run: RunDirectory | None, message: str, why: str, status: int, alike: bool = False
) -> NoReturn:
    """Say the message and leave; in a job of a sweep name the job, and let the others go on.

    `alike`: whether several processes come here together, of which one is to speak.
    """
    if run is not None and in_a_sweep():
        print(f"\n{job_name()}: {message}", file=sys.stderr)
        raise fail_job(run, why) from None
    if not alike or rank_zero_only.rank == 0:
        print(message, file=sys.stderr)
    raise SystemExit(status) from None
