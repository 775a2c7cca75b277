"""Check a configuration's values against the types that their targets declare."""

import inspect
import pydoc
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beartype import BeartypeConf
from beartype.door import is_bearable
from omegaconf import DictConfig, OmegaConf

from experiments.simclr.program.errors import UserError

TOP_LEVEL = {"name": str, "seed": int, "debug": bool, "ckpt_path": str | None, "log_root": str}
GROUPS = {"data", "augmentation", "model", "loss", "optimizer", "callbacks", "logger", "trainer"}


def check_types(config: Mapping[str, Any]) -> None:
    """Raise UserError for the first key that nothing reads, or value that no target allows.

    Args:
        config: resolved configuration; a mapping with `_target_` names a callable by its path.
    """
    unknown = [key for key in config if key not in GROUPS and key not in TOP_LEVEL]
    if unknown:
        known = ", ".join(sorted(GROUPS | TOP_LEVEL.keys()))
        raise UserError(f"there is no setting {unknown[0]}; there are {known}")
    _check(config, TOP_LEVEL, "")
    _check_targets(config, "")


def refuse_unknown(config: Mapping[str, Any], name: str, place: str) -> None:
    """Raise UserError if the target of this part of the configuration takes no setting of a name.

    place: where the part is, and a dot. A target that passes settings on may take any.
    """
    function = pydoc.locate(config["_target_"])
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a callable of C, or one that is not there
        return
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters]
    if name not in known and not name.startswith("_"):
        target = config["_target_"].rpartition(".")[2]
        raise UserError(f"there is no setting {place}{name}; {target} has {', '.join(known)}")


def expand_home(config: DictConfig) -> None:
    """Let values that begin with ~/ name what lies in the home folder, as a shell does."""
    for key in config:
        if OmegaConf.is_missing(config, key) or OmegaConf.is_interpolation(config, key):
            continue
        value = config[key]
        if isinstance(value, DictConfig):
            expand_home(value)
        elif isinstance(value, str) and value.startswith("~/"):
            config[key] = str(Path(value).expanduser())


def _check_targets(config: Mapping[str, Any], place: str) -> None:
    if "_target_" in config:
        for name in config:
            refuse_unknown(config, name, place)
        _check(config, _declared_types(config["_target_"]), place)
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_targets(value, f"{place}{key}.")


def _declared_types(target: str) -> dict[str, Any]:
    function = pydoc.locate(target)
    if not inspect.isclass(function):
        return _hints(function)
    declared: dict[str, Any] = {}
    for cls in inspect.getmro(function):
        if "__init__" in vars(cls):
            declared = _hints(cls.__init__) | declared
            kinds = [p.kind for p in inspect.signature(cls.__init__).parameters.values()]
            if inspect.Parameter.VAR_KEYWORD not in kinds:  # nothing is passed on to a base
                break
    declared.pop("arguments", None)
    return declared


def _hints(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (AttributeError, NameError, TypeError):  # what is not annotated is not checked
        return {}


def _check(values: Mapping[str, Any], types: Mapping[str, Any], place: str) -> None:
    for name, value in values.items():
        # a nested mapping is an object still to be built
        if name not in types or isinstance(value, Mapping):
            continue
        if not is_bearable(value, types[name], conf=BeartypeConf(is_pep484_tower=True)):
            declared = types[name]
            wanted = declared.__name__ if isinstance(declared, type) else str(declared)
            wanted = wanted.replace("typing.", "")
            raise UserError(f"{place}{name} must be of type {wanted}; got {value!r}")
