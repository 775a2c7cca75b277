"""The stamp of the C++ sources: setup.py compiles it into the kernels, library.py compares it.

setup.py runs this file by its path, where neither cosloss nor torch is installed.
"""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

WRITTEN = "stamp.txt"  # beside the kernels in a wheel, which has no sources


def sources(folder: Path, endings: Sequence[str] = (".cpp", ".h")) -> list[Path]:
    """The folder's files in C++, always in the same order."""
    return sorted(x for x in folder.iterdir() if x.suffix in endings and x.is_file())


def stamp_of(folder: Path) -> str | None:
    """The digest of the folder's sources; without any, the one that a build wrote down, or None."""
    digest, found = sha256(), sources(folder)
    for path in found:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    if found:
        return digest.hexdigest()[:16]
    written = folder / WRITTEN
    return written.read_text().strip() if written.exists() else None
