"""The kernels compile for cards, down to machine code, on a machine that has none."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.kernels.triton.compiled import judged
from tests.kernels.triton.compiling import Launch, Loop


@pytest.mark.slow
def test_kernels_compile_and_fit_where_memory_and_registers_are_short():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.triton.compiled", "--quick"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    row_wise = [
        f"{op}_{way}" for op in ("cosine_similarity", "unit_rows") for way in ("fwd", "bwd")
    ]
    for kernel in (*row_wise, "in_batch_stats"):
        assert any(kernel in line for line in lines)
    for card, cores in (("sm_90", "wgmma"), ("sm_89", "mma.sync"), ("sm_80", "mma.sync")):
        for kernel in ("in_batch_fwd", "in_batch_bwd"):
            tensor_cores = [line for line in lines if card in line and kernel in line]
            assert tensor_cores
            assert all(cores in line for line in tensor_cores)
            assert all("instructions for" in line for line in tensor_cores)


@pytest.mark.parametrize(
    ("capability", "spilled", "kib", "serialised", "selects", "loads", "said"),
    [
        (80, 128, 163, False, 26, 0, ""),
        (80, 129, 163, False, 0, 0, "SPILLS MORE THAN 128 B"),
        (86, 0, 100, False, 0, 0, "TAKES MORE THAN 99 KIB"),
        (90, 0, 227, True, 0, 0, "WGMMAS WAIT FOR ONE ANOTHER"),
        (90, 0, 227, False, 27, 0, "MASKS THE TILES WITHOUT A MASK"),
        (90, 0, 227, False, 0, 1, "READS BACK WHAT IT ADDS TO"),
    ],
)
def test_what_is_refused(capability, spilled, kib, serialised, selects, loads, said, monkeypatch):
    monkeypatch.setattr(Launch, "usage", lambda launch: (255, spilled))
    monkeypatch.setattr(Launch, "serialised", lambda launch: serialised)
    monkeypatch.setattr(Launch, "main_loop", lambda launch: Loop(400, selects, loads))
    metadata = SimpleNamespace(name="in_batch_kernel", shared=kib * 1024, num_warps=4, num_stages=2)
    constants = {"KIND": "exp", "BLOCK": 64, "WHOLE": True}  # 32 logits of each thread
    launch = Launch(SimpleNamespace(metadata=metadata, asm={"ptx": "wgmma"}), constants, 1.0)
    line, allowed = judged(launch, capability, torch.bfloat16, 128)
    assert allowed == (not said)
    assert line.endswith(said)
