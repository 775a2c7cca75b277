"""Which part of a module has the wrong gradient.

The module's recorded call is made once more on a copy, and the calls of its parts are judged.
"""

from functools import partial
from typing import Any

import torch
from torch import nn

from cosloss.gradient_check.calls import copied_inputs, outputs_of, undisturbed, without_autocast
from cosloss.gradient_check.module import PureLoss
from cosloss.watch.checks import Differences, Discrepancy, cotangents_of, in_autocast, judge
from cosloss.watch.finding import Finding
from cosloss.watch.hooks import hook_calls
from cosloss.watch.recording import Recording

CALLS = 64
NAMED = 3


def wrong_part(recording: Recording, seed: int) -> str:
    """One line that names the innermost parts that are wrong; empty if nothing can be said."""
    module = recording.loss.module
    if not isinstance(module, nn.Module) or not any(module.children()):
        return ""
    try:
        with undisturbed():
            calls = _calls(recording, seed)
        findings = {name: _worst(call, seed) for name, call in calls.items()}
    except Exception:  # an explanation that fails is none
        return ""
    wrong = {name: f for name, f in findings.items() if f.verdict == "wrong"}
    inner = [n for n in wrong if not any(other.startswith(f"{n}.") for other in wrong)]
    if inner:
        names = ", ".join(
            f"`{n}` ({type(module.get_submodule(n)).__name__})" for n in inner[:NAMED]
        )
        return f"wrong in its part {names}: {wrong[inner[0]].reason}"
    outer = [n for n in findings if "." not in n]
    if outer and all(f.verdict == "right" for f in findings.values()):
        names = ", ".join(f"`{n}`" for n in outer[:NAMED])
        return f"its parts ({names}{', …' * (len(outer) > NAMED)}) are right by themselves"
    return ""


def _calls(recording: Recording, seed: int) -> dict[str, Recording]:
    """The first call of every part, with its gradients."""
    open_calls: dict[str, Recording] = {}
    calls: dict[str, Recording] = {}

    def before(name: str, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name not in calls and len(open_calls) < CALLS:
            open_calls[name] = Recording(PureLoss(part), args, kwargs)

    def after(name: str, part: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        call = open_calls.get(name)
        if call is not None and name not in calls and call.judged and call.finish(result):
            calls[name] = call

    copies, _ = copied_inputs(recording.inputs, recording.judged)
    module = recording.loss.fresh(copies)[0]
    for name, part in module.named_modules():
        if name:
            hook_calls(part, partial(before, name), partial(after, name))
    try:
        with in_autocast(recording):
            outputs = outputs_of(module.forward(*copies["args"].values(), **copies["kwargs"]))
        with without_autocast(outputs):
            weights = cotangents_of(recording, seed).on(outputs)
            # as training does it: hooks ask which leaves are reached
            torch.autograd.backward(list(outputs.values()), weights)
    finally:
        for call in open_calls.values():
            call.release()
    return calls


def _worst(call: Recording, seed: int) -> Finding:
    """What either judge has against a call."""
    first, second = (judge(check, call, seed) for check in (Discrepancy(), Differences()))
    return first if first.verdict == "wrong" or second.verdict == "not checked" else second
