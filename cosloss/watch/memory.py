"""Whether there is memory for a check: what the system ends for want of it raises nothing."""

import re
from pathlib import Path

from torch import Tensor

MEMINFO = Path("/proc/meminfo")
# a check's peak, in tensors of float64 as large as all inputs and outputs: 14 where an RMSNorm is
# wrong, 5 where it is right
COPIES = 16
SHARE = 0.5  # of what is free; the rest is training's


def too_large(tensors: dict[str, Tensor]) -> str:
    """Why a check of a call with these inputs and outputs is not made; empty if it is.

    A GPU's memory is not looked at: its allocator raises where there is not enough.
    """
    own = {t.data_ptr(): t.numel() for t in tensors.values() if t.device.type == "cpu"}
    needed, free = COPIES * 8 * sum(own.values()), available()
    if free is None or needed <= SHARE * free:
        return ""
    return (
        f"it is too large: a check may take {needed / 2**30:.1f} GiB of memory, and "
        f"{free / 2**30:.1f} GiB are free"
    )


def available() -> int | None:
    """The bytes that the system can still give, its file cache among them; None if unknown."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", MEMINFO.read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
