"""Copies of tensors and modules that share nothing with their originals, strides kept."""

import copy
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# programs around the module, which no forward pass needs of its own
BY_REFERENCE = ("lightning", "pytorch_lightning", "lightning_fabric", "logging", "threading")
DENSE = 4  # a view may span so many times its own entries before it is copied without the gaps


def copy_tensor(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A detached copy with the same strides: gaps and expanded dimensions stay as they are."""
    t = t.detach()
    if t.layout is not torch.strided or type(t) not in (Tensor, nn.Parameter) or t.is_quantized:
        t = t.clone()
        return t if dtype is None else t.to(dtype)
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    if t.numel() == 0 or span > DENSE * t.numel() or t.is_conj() or t.is_neg():
        t = t.clone()
        return t if dtype is None else t.to(dtype)
    window = t.as_strided((span,), (1,)).clone()
    window = window if dtype is None else window.to(dtype)
    return window.as_strided(t.shape, t.stride(), 0)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 or complex128 for floating-point and complex dtypes; others as they are."""
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


class _CopyTensors(TorchFunctionMode):
    """Deep copies of tensors by `copy_tensor`: also of non-leaves, which torch refuses to copy."""

    def __init__(self, wide: bool) -> None:
        super().__init__()
        self.wide = wide

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        original, memo = args
        if id(original) in memo:
            return memo[id(original)]
        copied = copy_tensor(original, wide_dtype(original.dtype) if self.wide else None)
        memo[id(original)] = copied.requires_grad_(original.requires_grad)
        return copied


def copy_state(value: Any, memo: dict[int, Any] | None = None, wide: bool = False) -> Any:
    """A deep copy of a module or a function, by which no call can reach the original.

    Hooks stay behind, but those with which torch.nn.utils computes a weight; so do the programs
    that a module may know, its trainer or its logger.

    Args:
        value: what to copy.
        memo: what stands for an object, by its id: the tensors that take parameters' places.
        wide: floating-point and complex tensors become float64 and complex128.
    """
    memo = {} if memo is None else memo
    owners = [value, getattr(value, "forward", None)]  # a function's stand-in has its own forward
    for owner in owners:
        owner = owner.__self__ if isinstance(owner, types.MethodType) else owner
        for module in owner.modules() if isinstance(owner, nn.Module) else ():
            _leave_behind(module, memo)
    with _CopyTensors(wide):
        return copy.deepcopy(value, memo)


def _leave_behind(module: nn.Module, memo: dict[int, Any]) -> None:
    for name in HOOKS:
        hooks = vars(module).get(name)
        if hooks is not None:
            kept = OrderedDict((k, h) for k, h in hooks.items() if _computes_a_weight(h))
            memo.setdefault(id(hooks), kept)
    for attribute in vars(module).values():
        if type(attribute).__module__.partition(".")[0] in BY_REFERENCE:
            memo.setdefault(id(attribute), attribute)


def _computes_a_weight(hook: Callable[..., Any]) -> bool:
    return type(hook).__module__.startswith("torch.nn.utils")
