"""What the programs share: errors said in one line."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from cosloss.callbacks import GradientError
from experiments.callbacks.interruption import Interrupted
from experiments.errors import UserError
from experiments.run_directory import RunDirectory

USER_ERRORS = (
    UserError,
    HydraException,
    OmegaConfBaseException,
    MisconfigurationException,
    OSError,
)


@contextmanager
def one_line_errors(
    run: RunDirectory | None = None, expected: tuple[type[Exception], ...] = USER_ERRORS
) -> Iterator[None]:
    """Say in one line what went wrong and leave with a status: 2 for a mistake of the user.

    A wrong gradient leaves with 1, an interruption with 128 and the signal's number. Anything
    unexpected is a fault of this program, and keeps its traceback.
    """
    try:
        yield
    except Interrupted as interruption:
        command = run.resume_command(HydraConfig.get().overrides.task)
        print(f"\n{interruption}: saved {run.last}\nresume with:\n  {command}")
        raise SystemExit(interruption.exit_status) from None
    except GradientError as error:
        print(f"\n{error}", file=sys.stderr)
        raise SystemExit(1) from None
    except expected as error:
        if "debug=true" in sys.argv:
            raise
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        if run is not None:
            run.remove_if_empty()
        raise SystemExit(2) from None


def in_one_line(error: BaseException) -> str:
    """The message that helps: of the cause, where Hydra wraps it, with its place in the config."""
    text, _, place = str(error).partition("full_key: ")
    text = text.partition("Config search path")[0]
    if place:
        text = f"{place.split()[0]}: {error.__cause__ or text}"
    return "; ".join(line.strip() for line in text.splitlines() if line.strip()).rstrip("; ")
