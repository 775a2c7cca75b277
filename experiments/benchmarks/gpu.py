"""The losses on a GPU: checked, then timed by CUDA events beside the rivals that can be had.

Writes gpu.md, gpu.json and gpu.png, again after every result, so that whatever ends it loses none.
The copy bandwidth and the matrix rates that the results are held against are measured in the same
run. Nothing is timed unless every check passed, in this run or, with skip_checks, in one before.
"""

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cosloss import cosine_similarity, nt_xent_loss, verify
from experiments.benchmarks.contrastive_rivals import chunked_nt_xent
from experiments.benchmarks.contrastive_rivals import nt_xent as lean_nt_xent
from experiments.benchmarks.gpu_results import Result, write

# in the order of their worth, the one that takes longest last
ROW_WISE = ((1 << 20, 128), (1 << 16, 2048))
NT_XENT = ((512, 128), (4096, 128), (8192, 512), (65536, 128), (8192, 1024))
LARGEST = ((1 << 20, 128),)
LARGEST_MATRIX = 1 << 36  # bytes of (2N)^2 float32 logits that a rival may try to allocate
TEMPERATURE = 0.1
# products of the whole similarity matrix that a symmetric one takes if it is not kept: half for the
# similarities, half for them again, one for the gradient
G = 2.0

Step = Callable[[], object]


def run(rounds: int, folder: Path, skip_checks: bool = False, minutes: float | None = None) -> int:
    """Check, time, and write the results; the exit status.

    Args:
        rounds: timed calls of each contender.
        folder: where the results go.
        skip_checks: for a device that passed them before.
        minutes: begin no further shape after so many.
    """
    started = time.monotonic()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was checked or timed")
        return 2
    if not skip_checks and not verify.verify(device="cuda"):
        print("an op is beyond its error budget: nothing was timed")
        return 1
    machine = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": import_module("triton").__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "copy_gb_per_s": copy_bandwidth(rounds) / 1e9,
        "bfloat16_tflop_per_s": matrix_rate(torch.bfloat16, rounds) / 1e12,
        # to float32's accuracy: three products of TF32
        "float32_tflop_per_s": tf32_rate(rounds) / 3 / 1e12,
    }
    results: list[Result] = []
    for found in _shapes(rounds, machine):
        if minutes is not None and time.monotonic() - started > 60 * minutes:
            print(f"after {minutes:g} min: the shapes that are left were not timed")
            break
        for result in found:
            results.append(result)
            write(results, machine, folder)
    print((folder / "gpu.md").read_text() if results else "nothing was timed")
    return 0


def _shapes(rounds: int, machine: Mapping[str, Any]) -> Iterator[Iterator[Result]]:
    """The results of every shape and dtype, which are measured as they are asked for."""
    for shape in NT_XENT:
        for dtype in (torch.bfloat16, torch.float32):
            yield _nt_xent(shape, dtype, rounds, machine)
    for shape in ROW_WISE:
        for dtype in (torch.bfloat16, torch.float32):
            yield _row_wise(shape, dtype, rounds, machine)
    for shape in LARGEST:
        for dtype in (torch.bfloat16, torch.float32):
            yield _nt_xent(shape, dtype, min(rounds, 2), machine)


def milliseconds(step: Step, rounds: int) -> list[float]:
    """The times of `rounds` calls, each between two CUDA events, after two that warm up."""
    for _ in range(2):
        step()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times


def extra_memory(step: Step) -> float:
    """The most that one step allocates beyond what was there, in MiB."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_bandwidth(rounds: int) -> float:
    """Bytes per second, read and written, of a copy of 1 GiB."""
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    seconds = statistics.median(milliseconds(lambda: target.copy_(source), rounds)) / 1e3
    return 2 * source.nbytes / seconds


def matrix_rate(dtype: torch.dtype, rounds: int) -> float:
    """Floating-point operations per second of a product of two 8192 x 8192 matrices."""
    a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    seconds = statistics.median(milliseconds(lambda: a @ a, rounds)) / 1e3
    return 2 * 8192**3 / seconds


def tf32_rate(rounds: int) -> float:
    """The rate of float32 products whose factors the tensor cores take to TF32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        return matrix_rate(torch.float32, rounds)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _row_wise(
    shape: tuple[int, int], dtype: torch.dtype, rounds: int, machine: Mapping[str, Any]
) -> Iterator[Result]:
    x, y = torch.randn(2, *shape, device="cuda", dtype=dtype)
    contenders = {
        "cosloss": cosine_similarity,
        "torch": F.cosine_similarity,
        "torch.compile of torch": torch.compile(F.cosine_similarity, dynamic=False),
    }
    # x and y are read forward and backward, and their gradients written
    seconds = 6 * x.nbytes / machine["copy_gb_per_s"] / 1e9
    yield from _timed("cosine_similarity", (x, y), contenders, rounds, seconds)


def _nt_xent(
    shape: tuple[int, int], dtype: torch.dtype, rounds: int, machine: Mapping[str, Any]
) -> Iterator[Result]:
    rows, columns = shape
    z1, z2 = torch.randn(2, rows // 2, columns, device="cuda", dtype=dtype)
    contenders: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cosloss": _ours}
    if rows**2 * 4 <= LARGEST_MATRIX:
        contenders |= rivals()
    if rows <= 4096:
        contenders["cosloss, torch.compile"] = torch.compile(_ours, dynamic=False)
    rate = machine[f"{str(dtype).removeprefix('torch.')}_tflop_per_s"] * 1e12
    seconds = G * 2 * rows**2 * columns / rate
    yield from _timed("nt_xent_loss", (z1, z2), contenders, rounds, seconds)


def rivals() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """NT-Xent by others: what is installed, and what torch has."""
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "lean autograd": lean_nt_xent,
        "torch.compile of lean": torch.compile(lean_nt_xent, dynamic=False),
    }
    try:
        lightly = import_module("lightly.loss").NTXentLoss(temperature=TEMPERATURE)
    except ImportError:
        print("lightly is not installed")
    else:
        found["lightly"] = lightly
    if hasattr(F, "linear_cross_entropy"):
        found["torch, chunked"] = chunked_nt_xent
    try:
        found["Inf-CLIP, one-way"] = _inf_clip(import_module("inf_cl"))
    except ImportError:
        print("Inf-CLIP is not installed")
    return found


def _ours(z1: Tensor, z2: Tensor) -> Tensor:
    return nt_xent_loss(z1, z2, TEMPERATURE)


def _inf_clip(package: Any) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(z1: Tensor, z2: Tensor) -> Tensor:
        scale = torch.tensor(1 / TEMPERATURE, device=z1.device)
        return package.cal_inf_loss(F.normalize(z1), F.normalize(z2), scale=scale).mean()

    return loss


def _timed(
    op: str,
    inputs: tuple[Tensor, ...],
    contenders: Mapping[str, Callable[..., Tensor]],
    rounds: int,
    ideal: float,
) -> Iterator[Result]:
    torch.compiler.reset()
    leaves = [x.detach().requires_grad_() for x in inputs]
    shape = " x ".join(map(str, inputs[0].shape))
    for name, function in contenders.items():

        def step(function: Callable[..., Tensor] = function) -> object:
            value = function(*leaves)
            return torch.autograd.grad(value, leaves, torch.full_like(value, 0.37))

        try:
            times, memory = milliseconds(step, rounds), extra_memory(step)
        except (RuntimeError, TypeError) as error:  # a rival's limit, or no memory for it
            print(f"{op}, {shape}, {name}: {str(error).splitlines()[0]}")
            continue
        median = statistics.median(times)
        yield Result(
            op,
            shape,
            str(inputs[0].dtype).removeprefix("torch."),
            name,
            median,
            min(times),
            max(times),
            memory,
            ideal / (median / 1e3),
        )
