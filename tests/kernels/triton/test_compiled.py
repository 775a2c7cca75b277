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
    environment = {**os.environ, "TRITON_INTERPRET": "0", "COSLOSS_ON_TRIAL": "1"}
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
    assert any("POLYNOMIAL=8" in line for line in lines)


@pytest.mark.parametrize(
    ("capability", "spilled", "kib", "serialised", "loop", "said"),
    [
        (80, 128, 163, False, Loop(400, 26, 0, 31), ""),
        (80, 129, 163, False, Loop(400, 0, 0, 31), "SPILLS MORE THAN 128 B"),
        (86, 0, 100, False, Loop(400, 0, 0, 31), "TAKES MORE THAN 99 KIB"),
        (90, 0, 227, True, Loop(400, 0, 0, 31), "WGMMAS WAIT FOR ONE ANOTHER"),
        (90, 0, 227, False, Loop(400, 27, 0, 31), "MASKS THE TILES WITHOUT A MASK"),
        (90, 0, 227, False, Loop(400, 0, 1, 31), "READS BACK WHAT IT ADDS TO"),
        (90, 0, 227, False, Loop(400, 0, 0, 32), "LEAVES ALL EXPONENTIALS TO THE SPECIAL UNITS"),
    ],
)
def test_what_is_refused(capability, spilled, kib, serialised, loop, said, monkeypatch):
    monkeypatch.setattr(Launch, "usage", lambda launch: (255, spilled))
    monkeypatch.setattr(Launch, "serialised", lambda launch: serialised)
    monkeypatch.setattr(Launch, "main_loop", lambda launch: loop)
    metadata = SimpleNamespace(name="in_batch_kernel", shared=kib * 1024, num_warps=4, num_stages=2)
    constants = {
        "KIND": "exp",
        "BLOCK": 64,
        "WHOLE": True,
        "POLYNOMIAL": 8,
    }  # 32 logits of each thread
    launch = Launch(SimpleNamespace(metadata=metadata, asm={"ptx": "wgmma"}), constants, 1.0)
    line, allowed = judged(launch, capability, torch.bfloat16, 128)
    assert allowed == (not said)
    assert line.endswith(said)
