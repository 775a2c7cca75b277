"""Failed gradient checks as files: written beside the log, and run again from there.

A file holds the inputs, and the loss as the name of its class with its plain attributes and
parameters: nothing that `torch.load(weights_only=True)` refuses.
"""

import dataclasses
import importlib
import runpy
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from enum import Enum
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from cosloss.arguments import check_kind, usable_device
from cosloss.gradient_check.cotangents import Cotangents
from cosloss.gradient_check.discrepancy import compare_calls
from cosloss.gradient_check.finite_differences import check_calls
from cosloss.gradient_check.module import PureLoss
from cosloss.gradient_check.nests import judged_inputs, map_tensors, tensors_in
from cosloss.gradient_check.point import FiniteDifferences
from cosloss.gradient_check.writes import overwrites

PLAIN = (type(None), bool, int, float, str, Tensor, torch.dtype, torch.device)


def save_failure(
    path: Path,
    loss: PureLoss,
    inputs: dict[str, Any],
    autocast: dict[str, torch.dtype],
    finding: str,
    check: dict[str, Any],
) -> None:
    """Write what `replay` needs.

    Args:
        path: the file to write; its folders are made.
        loss: the loss: an importable class whose attributes are plain data, modules or functions.
        inputs: the nest of inputs it was called with.
        autocast: the autocast dtype by device type, where autocast was on.
        finding: what was wrong, as text.
        check: "kind", gradcheck or gradient_discrepancy, and the options of `check_calls`;
            "overwrites" where it wrote over what another node reads.

    Raises:
        TypeError: the loss or an argument cannot be written as plain data.
    """
    record = {
        "loss": _encode(loss.module),
        "twin": _encode(loss.given_twin),
        "inputs": _encode(inputs),
        "autocast": autocast,
        "device": next(iter(tensors_in(inputs).values())).device.type,
        "finding": finding,
        "check": check,
        "main": str(Path(getattr(sys.modules["__main__"], "__file__", "")).resolve()),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(record, path)


def replay(path: str | Path, device: str | torch.device | None = None) -> int:
    """Run a failed check again and print what it finds.

    Args:
        path: a file that a callback wrote.
        device: where to run it; None for where it failed, or the CPU if that is not there.

    Returns:
        The exit status: 0 if the gradient is right now, 1 if it is still wrong.

    Raises:
        TypeError: path is no path, or device no device.
        OSError: the file cannot be read.
        ValueError: the file is not one of these, its loss cannot be imported, or this machine has
            no such device.
    """
    check_kind("path", path, (str, Path), "the path of a file")
    if device is not None:
        usable_device("device", device)
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError) as error:
        raise ValueError(f"{path} was not written by a gradient check") from error
    if not isinstance(record, dict) or "check" not in record:
        raise ValueError(f"{path} was not written by a gradient check")
    try:
        loss = PureLoss(_decode(record["loss"], record), _decode(record["twin"], record)).frozen()
        decoded = _decode(record["inputs"], record)
    except (ImportError, AttributeError, KeyError, FileNotFoundError) as error:
        raise ValueError(
            f"the loss cannot be imported ({error}); run this from your project's folder"
        ) from error
    if device is None:
        device = record["device"] if torch.cuda.is_available() else "cpu"
    where = torch.device(device)

    def place(name: str, t: Tensor) -> Tensor:
        return t.detach().to(where).requires_grad_(t.requires_grad)

    inputs = map_tensors(place, decoded)
    loss.module.to(where)
    print(f"{path}\n{record['finding']}\n\nnow:")
    with ExitStack() as stack:
        for dtype in record["autocast"].values():
            stack.enter_context(torch.autocast(where.type, dtype=dtype))
        report = _run(loss, inputs, dict(record["check"]))
    print(report)
    return 0 if report else 1


@dataclasses.dataclass(frozen=True)
class _Overwriting:
    """Whether a call still writes over what others read; true if not."""

    reason: str

    def __bool__(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        return self.reason or "it writes over nothing that it is given"


def _run(loss: PureLoss, inputs: dict[str, Any], check: dict[str, Any]) -> Any:
    wanted = judged_inputs(inputs)
    if check.pop("overwrites", False):
        return _Overwriting(overwrites(loss, inputs, wanted))
    if check.pop("kind") == "gradient_discrepancy":
        return compare_calls(loss, loss.twin, inputs, wanted, Cotangents(0), layouts=True)
    surrogate, seed, rows = (check.pop(name) for name in ("surrogate", "seed", "rows"))
    how = FiniteDifferences(**check)
    return check_calls(loss, inputs, wanted, how, seed, loss.twin if surrogate else None, rows)


def _encode(value: Any) -> Any:
    """Plain data for what a loss is made of; containers become lists with their kind in front."""
    if isinstance(value, PLAIN) and not isinstance(value, Enum):
        return value
    if isinstance(value, Enum):
        return ["enum", _name(type(value)), value.name]
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, nn.Module)):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return ["dataclass", _name(type(value)), _encode(fields)]
    if isinstance(value, nn.Module):
        if vars(type(value)).get("forward") is None and "forward" in vars(value):
            return ["function module", _encode(value.forward)]
        kept = vars(nn.Module())
        attributes = {k: v for k, v in vars(value).items() if k not in kept}
        state = {**value._parameters, **value._buffers}
        return ["module", _name(type(value)), _encode(attributes), state, _encode(value._modules)]
    if isinstance(value, Mapping):
        return ["dict", [[_encode(k), _encode(v)] for k, v in value.items()]]
    if isinstance(value, (tuple, list)):
        kind = "list" if isinstance(value, list) else "tuple"
        return [kind, [_encode(item) for item in value]]
    if isinstance(value, partial):
        return ["partial", _encode(value.func), _encode(value.args), _encode(value.keywords)]
    if callable(value):
        return ["name", _name(value)]
    raise TypeError(f"a {type(value).__name__} is not plain data")


def _decode(value: Any, record: dict[str, Any]) -> Any:
    if not isinstance(value, list):
        return value
    kind, *parts = value
    if kind == "name":
        return _import(parts[0], record)
    if kind == "module":
        module_class = _import(parts[0], record)
        if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
            raise ValueError(f"{parts[0]} is not an nn.Module")
        module = module_class.__new__(module_class)
        nn.Module.__init__(module)
        for name, attribute in _decode(parts[1], record).items():
            setattr(module, name, attribute)
        for name, tensor in parts[2].items():
            if isinstance(tensor, nn.Parameter) or tensor is None:
                module.register_parameter(name, tensor)
            else:
                module.register_buffer(name, tensor)
        for name, child in _decode(parts[3], record).items():
            module.add_module(name, child)
        return module
    if kind == "enum":
        return _kind(parts[0], record, Enum)[parts[1]]
    if kind == "dataclass":
        found: Any = _kind(parts[0], record, object)
        if not hasattr(found, "__dataclass_fields__"):
            raise ValueError(f"{parts[0]} is not a dataclass")
        # as it was, without a constructor: frozen ones and fields set afterwards too
        made: Any = found.__new__(found)
        for name, field in _decode(parts[1], record).items():
            object.__setattr__(made, name, field)
        return made
    if kind == "function module":
        module = nn.Module()
        module.forward = _decode(parts[0], record)
        return module
    if kind == "partial":
        function, args, keywords = (_decode(part, record) for part in parts)
        return partial(function, *args, **keywords)
    if kind == "dict":
        return {_decode(k, record): _decode(v, record) for k, v in parts[0]}
    items = [_decode(item, record) for item in parts[0]]
    return tuple(items) if kind == "tuple" else items


def _kind(name: str, record: dict[str, Any], base: type) -> Any:
    """The class of that name.

    Raises:
        ValueError: it is none, or not one of `base`.
    """
    found = _import(name, record)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{name} is not a class of {base.__name__}")
    return found


def _name(value: Any) -> str:
    """Where a class or function is imported from, "package.module:name"."""
    module = getattr(value, "__module__", None)
    # the qualified name of one of torch's builtins leads nowhere, the plain one does
    for path in (getattr(value, "__qualname__", ""), getattr(value, "__name__", "")):
        found: Any = sys.modules.get(module or "")
        for attribute in path.split("."):
            found = getattr(found, attribute, None)
        if found is not None and found is value:
            return f"{module}:{path}"
    raise TypeError(f"{value!r} has no name to import it by")


def _import(name: str, record: dict[str, Any]) -> Any:
    module, _, path = name.partition(":")
    if module == "__main__":
        found: Any = runpy.run_path(record["main"], run_name="__replay__")
        first, *rest = path.split(".")
        found = found[first]
    else:
        found, rest = importlib.import_module(module), path.split(".")
    for attribute in rest:
        found = getattr(found, attribute)
    return found
