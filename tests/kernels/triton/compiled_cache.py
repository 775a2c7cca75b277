"""Fill Triton's cache for a card that is not here, and pack it: beside the card nothing compiles.

It compiles what `python -m cosloss.verify` launches, and NT-Xent and the row-wise losses at the
sizes of `benchmarks gpu`. The versions of Python, torch and Triton must be those beside the card,
and the commit too: the cache's keys have Triton's files, and the kernels' source with its line
numbers. Machine code alone is packed. `unpack` puts it into Triton's cache there.

    python -m tests.kernels.triton.compiled_cache fill FILE [--card 90]
        [--ops NAME ...] [--dtypes NAME ...] [--cache FOLDER]
    python -m tests.kernels.triton.compiled_cache unpack FILE [--cache FOLDER]
"""

import argparse
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from multiprocessing import Pool
from pathlib import Path

import torch
import triton

from cosloss import cosine_similarity, nt_xent_loss
from cosloss.kernels import dispatch
from cosloss.testing import OPS
from cosloss.verify import verify
from tests.kernels.triton.compiling import CARDS, compiling

DTYPES = ("float32", "bfloat16", "float16")
MATRICES = ((512, 128), (4096, 128), (16384, 128), (8192, 512), (8192, 1024))
ROW_WISE = ((4096, 128), (1024, 2048))
PACKED = (".cubin", ".json")

Job = tuple[int, Callable[..., object], tuple[str, ...]]


def compile_op(name: str, dtype: str) -> None:
    """What an op of the table launches at its samples; what it answers means nothing."""
    op = next(op for op in OPS if op.name == name)
    verify([op], [dtype], show=lambda line: None)


def compile_sizes(dtype: str) -> None:
    """What the benchmark's sizes launch."""
    kind = getattr(torch, dtype)
    for n, d in MATRICES:
        z1, z2 = (torch.zeros(n // 2, d, dtype=kind, requires_grad=True) for _ in range(2))
        torch.autograd.grad(nt_xent_loss(z1, z2, 0.1), (z1, z2))
    for n, d in ROW_WISE:
        x1, x2 = (torch.zeros(n, d, dtype=kind, requires_grad=True) for _ in range(2))
        torch.autograd.grad(cosine_similarity(x1, x2).sum(), (x1, x2))


def compiled(job: Job) -> tuple[str, int]:
    """A line on a job, and how many kernels it launches."""
    capability, compile_all, arguments = job
    start = time.perf_counter()
    with dispatch.use("triton"), compiling(capability) as found:
        compile_all(*arguments)
    seconds = time.perf_counter() - start
    return f"{' '.join(arguments):<60} {len(found):4} kernels {seconds:6.1f} s", len(found)


def pack(cache: Path, target: Path) -> int:
    """Write an archive of the machine code in a cache; returns how many kernels it has."""
    files = sorted(path for path in cache.rglob("*") if path.suffix in PACKED)
    with tarfile.open(target, "w:xz") as archive:
        for path in files:
            archive.add(path, path.relative_to(cache))
    return sum(path.suffix == ".cubin" for path in files)


def unpack(source: Path, cache: Path) -> int:
    """Put an archive's machine code into a cache; returns how many kernels that are.

    Triton lists a kernel's files by where they are, those that were not packed too.
    """
    with tarfile.open(source) as archive:
        archive.extractall(cache, filter="data")
        groups = [cache / name for name in archive.getnames() if "/__grp__" in name]
    for group in groups:
        listed = json.loads(group.read_text())["child_paths"]
        here = {name: group.parent / name for name in listed if name.endswith(PACKED)}
        group.write_text(json.dumps({"child_paths": {k: str(path) for k, path in here.items()}}))
    return len(groups)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["fill", "unpack"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--card", type=int, choices=CARDS, default=90)
    parser.add_argument("--ops", nargs="+", choices=[op.name for op in OPS])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--cache", type=Path, help="of Triton; to fill, a temporary one by default")
    given = parser.parse_args()
    if given.what == "unpack":
        cache = (given.cache or Path(triton.knobs.cache.dir)).resolve()
        print(f"{cache}: {unpack(given.file, cache)} kernels more")
        return
    ops = given.ops or [op.name for op in OPS]
    jobs: list[Job] = [
        (given.card, compile_op, (op, dtype)) for op in ops for dtype in given.dtypes
    ]
    if given.ops is None:
        jobs += [(given.card, compile_sizes, (dtype,)) for dtype in given.dtypes]
    with tempfile.TemporaryDirectory() as folder:
        cache = given.cache or Path(folder)
        os.environ["TRITON_CACHE_DIR"] = str(cache)  # which the pool's processes take over
        with Pool() as pool:
            for line, _ in pool.imap(compiled, jobs):
                print(line, flush=True)
        kernels = pack(cache, given.file)
    size = given.file.stat().st_size / 1e6
    print(f"{given.file}: {kernels} kernels for {CARDS[given.card].name}, {size:.1f} MB")


if __name__ == "__main__":
    main()
