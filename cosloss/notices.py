"""Warnings about a call, given once for each line of the caller's that makes it."""

import sys
import warnings

import torch

_OWN = (
    "cosloss.functional",
    "cosloss.losses",
    "cosloss.notices",
    "cosloss.distributed",
    "torch",
)
_given: set[tuple[str, str, int]] = set()


def warn_once(message: str) -> None:
    """Warn at the line outside of the losses that led here, unless it was warned of this before.

    Not under torch.compile, and not for the calls that a gradient check makes of its own.
    """
    if torch.compiler.is_compiling():
        return
    frame = sys._getframe(1)
    while frame.f_back is not None and _below(frame.f_globals.get("__name__", ""), _OWN):
        frame = frame.f_back
    module = frame.f_globals.get("__name__", "")
    place = (message, frame.f_code.co_filename, frame.f_lineno)
    if place in _given or _below(module, ("cosloss",)):
        return
    _given.add(place)
    warnings.warn_explicit(message, UserWarning, *place[1:], module=module)


def _below(module: str, packages: tuple[str, ...]) -> bool:
    return module in packages or module.startswith(tuple(f"{name}." for name in packages))
