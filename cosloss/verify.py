"""Check every op of the table on this machine: `python -m cosloss.verify --device cuda`.

For each op and dtype: the worst error of the value and of the gradients against the float64 twin,
at generic and at hard inputs, for our op and for torch's own function where there is one. A row
fails when our op errs by more than its twin allows (`cosloss.testing.op`); then the exit status
is 1. Torch's columns are for comparison, and do not decide. A second section puts every op in
other people's surroundings (`cosloss.testing.surroundings`): another default device or dtype,
torch.func, autocast, inference mode, torch.export with a dynamic batch. With `--replay FILE`, one
failure that a callback saved is run again instead; the exit status is 0 if it is right now, 1 if it
is still wrong, and 2 if it cannot be run.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cosloss.arguments import check_callable, check_dtype, check_each, usable_device
from cosloss.replay import replay
from cosloss.testing import OPS, Errors, Op, Sample, errors
from cosloss.testing.surroundings import SURROUNDINGS, TOLERANCE, Surrounding

DTYPES = ("float64", "float32", "bfloat16", "float16")
COLUMNS = ("op", "dtype", "inputs", "value", "gradient", "budget", "torch", "torch grad", "")
NAMES = max(len(op.name) for op in OPS)
SURROUNDING = "{:<16} {:<9} {:>6} {:>9} {:>9}  {}"
ROW = f"{{:<{NAMES}}} " + "{:<9} {:<8} {:>9} {:>9} {:>9} {:>9} {:>10}  {}"


def verify(
    ops: Sequence[Op] = OPS,
    dtypes: Sequence[str] = DTYPES,
    device: str = "cpu",
    show: Callable[[str], object] = print,
) -> bool:
    """Show the table, one line per op, dtype and kind of input; True if every op kept its budget.

    Args:
        ops: rows of `cosloss.testing.OPS`.
        dtypes: names of torch dtypes.
        device: where the ops run.
        show: receives each line.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: this machine has no such device.

    Example:
        >>> verify(OPS[:1], ["float32"], show=lambda line: None)
        True
    """
    ops = _checked(ops, dtypes, device, show)
    show(ROW.format(*COLUMNS))
    passed = True
    for op in ops:
        for name in dtypes:
            dtype: torch.dtype = getattr(torch, name)
            budget = op.budget(dtype, device)
            for kind, samples in (("generic", op.generic()), ("hard", op.hard(dtype))):
                listed = list(samples)
                ours, sample = _worst(op.function, op, listed, dtype, device, budget)
                theirs = _peer(op, listed, dtype, device, budget)
                verdict = "ok" if ours.within(budget) else f"FAIL at {sample}"
                passed &= ours.within(budget)
                numbers = (*ours, max(budget), *theirs)
                cells = ("-" if number is None else f"{number:.1e}" for number in numbers)
                show(ROW.format(op.name, name, kind, *cells, verdict))
    return passed


def verify_surroundings(
    ops: Sequence[Op] = OPS,
    dtypes: Sequence[str] = ("float64", "float32"),
    device: str = "cpu",
    show: Callable[[str], object] = print,
) -> bool:
    """Show a line per surrounding and dtype; True if every op is there what it is elsewhere.

    Args:
        ops: rows of `cosloss.testing.OPS`.
        dtypes: names of torch dtypes.
        device: where the ops run.
        show: receives each line.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: this machine has no such device.

    Example:
        >>> verify_surroundings(OPS[:1], ["float32"], show=lambda line: None)
        True
    """
    ops = _checked(ops, dtypes, device, show)
    show(SURROUNDING.format("surrounding", "dtype", "calls", "change", "budget", ""))
    passed = True
    for surrounding in SURROUNDINGS:
        for name in dtypes:
            dtype: torch.dtype = getattr(torch, name)
            budget = TOLERANCE * torch.finfo(dtype).eps
            worst, calls, failure = 0.0, 0, ""
            for op in ops:
                for sample in op.generic():
                    found, why = _change(surrounding, op, sample, dtype, device)
                    if not found <= budget and not failure:
                        failure = f"FAIL: {op.name} at {sample.name!r} {why}".rstrip()
                    worst, calls = max(worst, found), calls + 1
            cells = (calls, f"{worst:.1e}", f"{budget:.1e}", failure or "ok")
            show(SURROUNDING.format(surrounding.__name__, name, *cells))
            passed &= not failure
    return passed


def _checked(ops: Any, dtypes: Any, device: Any, show: Any) -> list[Op]:
    check_each("ops", ops, Op, "rows of cosloss.testing.OPS")
    check_each("dtypes", dtypes, str, "names of torch dtypes")
    for name in dtypes:
        check_dtype("each of dtypes", getattr(torch, name, name))
    usable_device("device", device)
    check_callable("show", show, "a function of a line")
    return list(ops)


def _device(name: str) -> str:
    """The device, if this machine has it."""
    try:
        usable_device("it", name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def _change(
    surrounding: Surrounding, op: Op, sample: Sample, dtype: torch.dtype, device: str
) -> tuple[float, str]:
    """The change of value and gradients there, and the error if there is one."""
    try:
        return surrounding(op, sample, dtype, device), ""
    except Exception as error:  # whatever a surrounding makes of the op is a finding
        return torch.inf, f"({type(error).__name__}: {str(error).splitlines()[0]})"


def _worst(
    function: Callable[..., Tensor],
    op: Op,
    samples: Sequence[Sample],
    dtype: torch.dtype,
    device: str,
    budget: Errors,
) -> tuple[Errors, str]:
    """The worst value and gradient errors, and the name of a sample beyond the budget, if any."""
    worst, name = Errors(0.0, 0.0), ""
    for sample in samples:
        found = errors(function, op.twin, sample, dtype, device)
        worst = Errors(max(worst.value, found.value), max(worst.gradient, found.gradient))
        if not found.within(budget):
            name = repr(sample.name)
    return worst, name


def _peer(
    op: Op, samples: Sequence[Sample], dtype: torch.dtype, device: str, budget: Errors
) -> tuple[float | None, float | None]:
    if op.peer is None:
        return None, None
    return _worst(op.peer, op, samples, dtype, device, budget)[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cosloss.verify", description=__doc__)
    parser.add_argument("--device", type=_device, help="cpu (the default), cuda, cuda:1, ...")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=DTYPES)
    parser.add_argument("--replay", metavar="FILE", help="a failure that a callback wrote")
    options = parser.parse_args(arguments)
    if options.replay:
        try:
            return replay(options.replay, options.device)
        except (OSError, ValueError) as error:  # 1 would say that the gradient is still wrong
            print(error, file=sys.stderr)
            return 2
    device = options.device or "cpu"
    within = verify(dtypes=options.dtype, device=device)
    print("every op is within its budget" if within else "an op is beyond its budget")
    print()
    wide = [name for name in options.dtype if name in ("float64", "float32")]
    same = verify_surroundings(dtypes=wide, device=device)
    if wide:
        print("every op is itself in every surrounding" if same else "a surrounding changes an op")
    return 0 if within and same else 1


if __name__ == "__main__":
    raise SystemExit(main())
