"""The compiled kernels, in the build that suits this CPU.

One source is compiled for several levels of a CPU's vector instructions; torch says which one it
uses itself. The kernels run in torch's threads: they find its OpenMP among the symbols that torch
has loaded, so that there is one pool of threads.
"""

import ctypes
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

BUILDS = ("avx512", "avx2", "baseline")  # a CPU that runs one of them runs those after it
DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}

_POINTER, _SIZE, _FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SINGLE, _REAL = ctypes.c_float, ctypes.c_double
_ROWS = (_POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _SIZE)
_ADD = (_POINTER, _SIZE, _SIZE, _SINGLE, _POINTER, _POINTER)
_SLOPE = (_POINTER, _SIZE, _SINGLE)
_ARGUMENTS = {
    # cosine_similarity.cpp
    "cosine_similarity_forward": (*_ROWS, _REAL, _FLAG, _POINTER, _POINTER),
    "cosine_similarity_backward": (_POINTER, *_ROWS, _REAL, _REAL, _POINTER, _POINTER, _POINTER),
    # pairwise_cosine_similarity.cpp
    "pairwise_mirror": (_POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _REAL),
    "pairwise_add_mirrored": (_POINTER, _SIZE, _SIZE, _SIZE, _POINTER),
    # unit_rows.cpp
    "unit_rows_forward": (_POINTER, _SIZE, _SIZE, _SIZE, _REAL, _REAL, _POINTER, _POINTER),
    "paired_products": (_POINTER, _SIZE, _SIZE, _POINTER),
    "unit_rows_backward": (*4 * (_POINTER,), *4 * (_SIZE,), _REAL, _REAL, _POINTER),
    # tiles.cpp
    "add_exp": _ADD,
    "add_softplus": _ADD,
    "add_hinge": _ADD,
    "slope_exp": _SLOPE,
    "slope_softplus": _SLOPE,
    "slope_hinge": _SLOPE,
    "weigh": (_POINTER, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER),
    "add_logsumexp": (_POINTER, _SIZE, _SIZE, *4 * (_POINTER,)),
    "slope_logsumexp": (_POINTER, _SIZE, _SIZE, _POINTER, _POINTER),
    "weigh_logsumexp": (_POINTER, _SIZE, _SIZE, *5 * (_POINTER,)),
}


def usable() -> tuple[str, ...]:
    """The builds that this CPU runs, the best first."""
    level = torch.backends.cpu.get_cpu_capability().lower()
    return BUILDS[BUILDS.index(level) if level in BUILDS else -1 :]


@cache
def loaded() -> ctypes.CDLL | None:
    """The library, or None: not compiled, or not for the OpenMP that this torch has."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    paths = (Path(__file__).with_name(f"_{build}{suffix}") for build in usable())
    path = next(filter(Path.exists, paths), None)
    try:
        return None if path is None else ctypes.CDLL(str(path))
    except OSError:
        return None


@cache
def function(name: str, dtype: torch.dtype) -> Callable[..., int]:
    """The kernel of that name for tensors of that dtype, one of DTYPES."""
    library = loaded()
    assert library is not None
    found = library[f"{name}_{DTYPES[dtype]}"]
    found.argtypes = _ARGUMENTS[name]
    return found
