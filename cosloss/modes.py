"""The state of torch that a call runs in: which transforms, compilers and wrappers look on.

Private interfaces of torch are used in this file alone. They were tried with torch 2.11, 2.14 and
2.15; `tests/test_modes.py` names the one that is missing when torch moves it.
"""

import sys
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

PLAIN = (Tensor, torch.nn.Parameter)


def differentiates_itself(*tensors: Tensor | None) -> bool:
    """Whether torch, or a wrapper, is to see an op as the plain operations that it consists of.

    True under torch.compile, torch.export and make_fx, inside a torch.func transform, for tensors
    with forward-mode tangents, for wrappers (`__torch_dispatch__` subclasses, fake tensors) and
    for meta tensors. An op that is tiled, in place and differentiable once then gives way to the
    formula with the whole matrix.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    if torch._C._len_torch_dispatch_stack() and _traced():
        return True
    for x in tensors:  # loops and no helpers here and below: every loss asks
        if x is None:
            continue
        if type(x) not in PLAIN and torch._C._dispatch_keys(x).has(torch._C.DispatchKey.Python):
            return True
        # a backward pass with is_grads_batched sees the older kind of batched tensor
        if x.is_meta or torch._C._functorch.is_legacy_batchedtensor(x):
            return True
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
            return True
    return False


def autograd_composite() -> bool:
    """Whether a row-wise op gives way to the operations that its kernel consists of.

    - Under torch.compile and torch.export, where Inductor fuses them with their derivative.
    - Under forward-mode AD, torch.func.jvp and jacfwd included: a Function's jvp is not
      differentiated again, so that jacfwd of jacfwd is silently 0, and Dynamo refuses it.
    """
    return torch.compiler.is_compiling() or forward_mode()


def transforming() -> bool:
    """Whether a torch.func transform is active, be it over other tensors than an op's own."""
    return torch._C._are_functorch_transforms_active()


def recording() -> bool:
    """Whether torch.jit.trace is recording."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


def forward_mode() -> bool:
    """Whether a forward-mode AD level is open."""
    return forward_ad._current_level >= 0


def plain(tensors: Iterable[Tensor]) -> bool:
    """Whether these are plain numbers, on any device, that nothing else looks on at."""
    return (
        not forward_mode()
        and not torch._C._len_torch_dispatch_stack()
        and all(
            type(x) in PLAIN
            and not torch._C._functorch.is_functorch_wrapped_tensor(x)
            and not torch._C._functorch.is_legacy_batchedtensor(x)
            for x in tensors
        )
    )


def in_memory(tensors: Iterable[Tensor], dtypes: Collection[torch.dtype]) -> bool:
    """Whether these are plain numbers of such dtypes in a CPU's memory, and nothing looks on."""
    if (
        forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    ):
        return False
    for x in tensors:
        keys = torch._C._dispatch_keys(x).raw_repr()
        if type(x) not in PLAIN or x.dtype not in dtypes or keys not in _KEYS_IN_MEMORY:
            return False
    return True


def readable(x: Tensor) -> bool:
    """Whether Python may look at the numbers without waiting for a device."""
    return (
        type(x) in PLAIN
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and not torch._C._functorch.is_legacy_batchedtensor(x)
        and not torch._C._len_torch_dispatch_stack()
    )


def shares_memory(x: Tensor, y: Tensor) -> bool:
    """Whether a tensor that was made from another shares its numbers, which no mode replaced.

    torch.compile sees no mode; a tensor that a transform wraps shares none.
    """
    if torch.compiler.is_compiling():
        return True
    return bool(torch._C._is_alias_of(x, y))  # type: ignore[attr-defined]


def next_node() -> int:
    """The sequence number of the next node of this thread's graph."""
    return torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]


def current_backward() -> int:
    """The number of the backward pass that calls a hook."""
    return torch._C._current_graph_task_id()


def will_execute(node: Any) -> bool | None:
    """Whether the backward pass that calls a hook goes on to this node of the graph.

    None for a leaf in torch.autograd.grad, which torch does not say.
    """
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return None


def holders_of(grads: tuple[Tensor | None, ...], number: int) -> int:
    """How many hold the gradient that a hook before a node was handed; 0 where torch can't say."""
    # not by a name of its own: that would be one more
    if grads[number] is None or not hasattr(Tensor, "_use_count"):
        return 0
    count: int = grads[number]._use_count()  # type: ignore[union-attr]
    return count


def autocast_dtype(like: Tensor) -> torch.dtype | None:
    """The dtype that torch.autocast takes products to on this tensor's device; None without it."""
    kind = like.device.type
    # torch answers for devices that know autocast, and raises for the others
    known = kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)
    return torch.get_autocast_dtype(kind) if known and torch.is_autocast_enabled(kind) else None


def without_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """A context in which products are in the dtype of their operands."""
    if autocast_dtype(like) is None:
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)


def multiplies_tf32() -> bool:
    """Whether a GPU may take the factors of a float32 matrix product to TF32, 11 bits each.

    By whichever interface it was allowed: the older getters raise after the newer setters.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _traced() -> bool:
    # imported by whoever traces; its import would cost everybody else a second
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return proxies is not None and proxies.get_proxy_mode() is not None


def _keys_of_a_new_tensor(inference: bool) -> int:
    with torch.inference_mode(inference):
        return torch._C._dispatch_keys(torch.empty(0, device="cpu")).raw_repr()


# a tensor that is batched, wrapped, negated, sparse, quantised or elsewhere has other dispatch keys
_KEYS_IN_MEMORY = {_keys_of_a_new_tensor(inference) for inference in (False, True)}
