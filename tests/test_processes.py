"""A process that was one of several ends without an abort."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.simclr.program.processes import leave_process_group

pytestmark = pytest.mark.slow

# what now and then aborts without the last line: one in eight pairs of processes
STEP = """
import sys
import torch
import torch.distributed as dist
from experiments.simclr.program.processes import leave_process_group

store, rank = sys.argv[1:]
dist.init_process_group("gloo", init_method="file://" + store, rank=int(rank), world_size=2)
module = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
module(torch.randn(2, 4)).sum().backward()
leave_process_group()
assert not dist.is_initialized()
"""


def test_the_end_after_a_collective(tmp_path):
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", STEP, str(tmp_path / "store"), rank],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    for process in pair:
        error = process.communicate(timeout=120)[1]
        assert process.returncode == 0, error


def test_a_process_alone_has_nothing_to_leave():
    leave_process_group()
