"""Which backend computes an op: Triton on a GPU, native on a CPU, where they can be had.

A backend is a package of kernels; eager computes everything everywhere. `COSLOSS_BACKEND=eager`,
`native` or `triton` in the environment, or `use`, decides for every device: Triton then computes
CPU tensors too, in its interpreter (TRITON_INTERPRET=1).
"""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from cosloss import modes
from cosloss.kernels import eager, native
from cosloss.kernels.native import library

BACKENDS = ("eager", "native", "triton")
NARROW_OR_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_GPU = (8, 0)  # NVIDIA's compute capability from which Triton has bfloat16 products

_forced = os.environ.get("COSLOSS_BACKEND")


@contextmanager
def use(name: str | None) -> Iterator[None]:
    """Force a backend, in every thread; None goes back to the choice by device."""
    global _forced
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def backend(*tensors: Tensor | None) -> ModuleType:
    """The backend for these tensors, of which None are left out.

    Triton computes plain numbers. Whatever torch is to differentiate again or to batch, and
    float64, in which the other dtypes are judged, are eager's.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    plain = not torch.is_grad_enabled() and modes.plain(given)
    return _triton() if plain and wants_triton(*given) else eager


def in_batch(*rows: Tensor | None, guided: bool = False) -> ModuleType:
    """The backend of an in-batch loss of these plain embeddings: its `unit_rows` and `in_batch`.

    guided: whether the loss's mask has guides.
    """
    if guided:
        return eager
    given = [x for x in rows if x is not None]
    if wants_native(*given, dtypes=NARROW_OR_SINGLE):
        return native
    return _triton() if wants_triton(*given) and modes.plain(given) else eager


def product_dtype(rows: Tensor) -> torch.dtype:
    """The dtype of the matrix products of an in-batch loss of rows like these."""
    autocast, dtype = modes.autocast_dtype(rows), rows.dtype
    if autocast is not None and dtype != torch.float64:  # which torch.autocast leaves alone
        dtype = autocast
    if dtype in (torch.bfloat16, torch.float16) and wants_triton(rows):
        return dtype  # its logits and gradients are in float32 all the same
    return wide_product_dtype(rows)


def wide_product_dtype(rows: Tensor) -> torch.dtype:
    """The dtype of products that come out in that of their factors: wide, but under autocast."""
    if rows.dtype != torch.float64 and modes.autocast_dtype(rows) == torch.bfloat16:
        return torch.bfloat16
    # not float16: it holds neither exp(40) nor a gradient of 1e-8
    return torch.promote_types(rows.dtype, torch.float32)


def wants_native(*tensors: Tensor, dtypes: Collection[torch.dtype] = library.DTYPES) -> bool:
    """Whether the compiled kernels compute these: plain tensors of such dtypes on a CPU."""
    if _forced == "native" and library.loaded() is None:
        raise RuntimeError(f"backend native: {library.absence()}")
    return (
        _forced in (None, "native")
        and modes.in_memory(tensors, dtypes)
        and library.loaded() is not None
    )


def wants_row_blocks(*tensors: Tensor) -> bool:
    """Whether eager operations compute a row-wise op of these in blocks: plain tensors."""
    like = tensors[0]
    # the range of float64 is looked at, for which an accelerator would be waited for
    known = like.is_cpu or not (like.is_meta or like.dtype == torch.float64)
    return (
        known and not wants_triton(*tensors) and not modes.transforming() and modes.plain(tensors)
    )


def wants_triton(*tensors: Tensor) -> bool:
    """Whether Triton is the backend for plain tensors like these."""
    if _forced is None:
        device = tensors[0].device
        # torch.compile itself needs Triton on a GPU
        compiling = torch.compiler.is_compiling()
        usable = device.type == "cuda" and (compiling or runs_triton(device))
    elif _forced in BACKENDS:
        usable = _forced == "triton"
    else:
        raise ValueError(f"COSLOSS_BACKEND must be one of {', '.join(BACKENDS)}; got {_forced!r}")
    return usable and all(tensor.dtype != torch.float64 for tensor in tensors)


@cache
def runs_triton(device: torch.device) -> bool:
    try:
        _triton()
    except ImportError:
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= OLDEST_GPU


def _triton() -> ModuleType:
    return import_module("cosloss.kernels.triton")
