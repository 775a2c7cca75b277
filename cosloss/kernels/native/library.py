"""The compiled kernels, in the build that suits this CPU.

One source is compiled for several levels of a CPU's vector instructions; torch says which one it
uses itself. The kernels run in torch's threads: they find its OpenMP among the symbols that torch
has loaded, so that there is one pool of threads.
"""

import ctypes
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from cosloss.kernels.native import stamp

FOLDER = Path(__file__).parent

# a CPU that runs one of them runs those after it
BUILDS = ("avx512_bf16", "avx512", "avx2", "baseline")
DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}

_POINTER, _SIZE, _FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_REAL = ctypes.c_double
_ROWS = (_POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _SIZE)
_ARGUMENTS = {
    # cosine_similarity.cpp
    "cosine_similarity_forward": (*_ROWS, _REAL, _FLAG, _POINTER, _POINTER),
    "cosine_similarity_backward": (_POINTER, *_ROWS, _REAL, _REAL, _POINTER, _POINTER, _POINTER),
    # pairwise_cosine_similarity.cpp
    "pairwise_mirror": (_POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _REAL),
    "pairwise_add_mirrored": (_POINTER, _SIZE, _SIZE, _SIZE, _POINTER),
    # unit_rows.cpp
    "unit_rows_forward": (*2 * (_POINTER, _SIZE), _SIZE, _SIZE, _REAL, _REAL, *3 * (_POINTER,)),
    "unit_rows_backward": (
        *(*3 * (_POINTER,), *2 * (_POINTER, _SIZE), _POINTER, _POINTER),
        *(_SIZE, _SIZE, _REAL, _REAL, _POINTER, _POINTER),
    ),
    # in_batch.cpp
    "in_batch_exp": (_POINTER,),
    "in_batch_softplus": (_POINTER,),
    "in_batch_hinge": (_POINTER,),
    "in_batch_logsumexp": (_POINTER,),
    "in_batch_elements": (_SIZE, _SIZE, _SIZE, _SIZE),
    "in_batch_pack_b": (_POINTER, _SIZE, _SIZE, _POINTER),
    "in_batch_pack_bt": (_POINTER, _SIZE, _SIZE, _POINTER),
}


def usable() -> tuple[str, ...]:
    """The builds that this CPU runs, the best first."""
    level = torch.backends.cpu.get_cpu_capability().lower()
    if level == "avx512" and torch.cpu.get_capabilities().get("avx512_bf16"):
        level = "avx512_bf16"
    return BUILDS[BUILDS.index(level) if level in BUILDS else -1 :]


@cache
def loaded() -> ctypes.CDLL | None:
    """The library, or None: not compiled, or not for the OpenMP that this torch has.

    What is missing is warned of once. A build of other sources, whose functions may take other
    arguments, is not used.
    """
    found, lacking = _search()
    if lacking is not None:
        instead = "eager operations, which are slower," if found is None else Path(found._name).name
        warnings.warn(f"{lacking}; until then {instead} will do", stacklevel=2)
    return found


def build() -> str | None:
    """Which of BUILDS is loaded; None without the library."""
    found = loaded()
    return None if found is None else Path(found._name).stem.removeprefix("_")


def absence() -> str | None:
    """Why the best build for this CPU is not used, and what to do; None if it is."""
    return _search()[1]


@cache
def function(name: str, dtype: torch.dtype | None = None) -> Callable[..., int]:
    """The kernel of that name; for tensors of that dtype, one of DTYPES, if there are several."""
    library = loaded()
    assert library is not None
    found = library[name if dtype is None else f"{name}_{DTYPES[dtype]}"]
    found.argtypes, found.restype = _ARGUMENTS[name], _SIZE
    return found


@cache
def has(name: str, dtype: torch.dtype) -> bool:
    """Whether the build that is loaded has that kernel."""
    return hasattr(loaded(), f"{name}_{DTYPES[dtype]}")


@cache
def in_batch_params() -> type[ctypes.Structure]:
    """InBatchParams of params.h: the fields that the library says it has, and no others."""
    lines = _asked(loaded(), "in_batch_params", ctypes.c_char_p).decode().splitlines()
    kinds = {"P": _POINTER, "q": _SIZE, "d": _REAL}
    fields = [(name, kinds[kind]) for kind, name in map(str.split, lines)]
    return type("InBatchParams", (ctypes.Structure,), {"__slots__": (), "_fields_": fields})


@cache
def in_batch_panel() -> int:
    """PANEL of gemm.h: rows are packed by so many, and so many divide their length."""
    return _asked(loaded(), "in_batch_panel", _SIZE)


def _search() -> tuple[ctypes.CDLL | None, str | None]:
    """The best build of these sources, and why a better one, or any, is not used."""
    expected, lacking = stamp.stamp_of(FOLDER), None
    for path in (FOLDER / f"_{build}.so" for build in usable()):
        if not path.exists():
            continue
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            # of the OpenMP that torch was built with, if of anything
            lacking = lacking or f"{path.name} does not load ({error}). {_cure()}"
            continue
        own = _stamp(library)
        if own and own == expected:
            return library, lacking
        lacking = lacking or (
            f"{path.name} is not used: it was compiled {_from(own)}, and the Python beside it goes "
            f"with kernels {_from(expected)}. {_cure()}"
        )
    return None, lacking or f"cosloss was installed without its compiled kernels. {_cure()}"


def _stamp(library: ctypes.CDLL) -> str | None:
    """The stamp of the sources that it was compiled from; None where it says nothing of them."""
    try:
        return _asked(library, "cosloss_stamp", ctypes.c_char_p).decode()
    except AttributeError:
        return None


def _from(its_stamp: str | None) -> str:
    return f"from the C++ sources {its_stamp}" if its_stamp else "from C++ sources without a stamp"


def _cure() -> str:
    if stamp.sources(FOLDER):
        return "In this checkout, compile them, with GCC: `pip install -e .`"
    return "Install it again, from a checkout with GCC: `pip install --force-reinstall --no-deps .`"


def _asked(library: ctypes.CDLL | None, name: str, kind: type[Any]) -> Any:
    assert library is not None
    function = library[name]
    function.restype = kind
    return function()
