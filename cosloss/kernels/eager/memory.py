"""Fresh memory for large results on the CPU.

A gradient is written once, into memory the system has not backed yet. For two float32 gradients of
65536 x 128 the page faults take longer than the arithmetic; 2 MiB pages need 512 times fewer.
"""

import ctypes
import sys
from collections.abc import Callable, Sequence

from torch import Tensor

_HUGE_PAGE = 1 << 21
_MADV_HUGEPAGE = 14


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor with like's dtype, in huge pages where the system offers them."""
    result = like.new_empty(shape)
    if result.nbytes < _HUGE_PAGE or not result.is_cpu or _madvise is None:
        return result
    start = -(-result.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    size = (result.data_ptr() + result.nbytes - start) // _HUGE_PAGE * _HUGE_PAGE
    if size > 0:
        # advice only: where it is refused, the pages are small ones
        _madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_HUGEPAGE)
    return result


def _system_madvise() -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    return ctypes.CDLL(None).madvise


_madvise = _system_madvise()
