"""The kernels compile for a GPU, down to machine code, on a machine that has none."""

import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_kernels_compile_for_compute_capability_9():
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
    for kernel in ("in_batch_fwd", "in_batch_bwd"):
        tensor_cores = [line for line in lines if kernel in line]
        assert len(tensor_cores) >= 2
        assert all("wgmma" in line for line in tensor_cores)
