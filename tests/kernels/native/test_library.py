"""Which builds load, what is done without any, and what the choice of a backend chooses."""

import os
import subprocess
import sys

import pytest
import torch
import torch.utils.flop_counter

import cosloss
from cosloss import verify
from cosloss.kernels import dispatch, native
from cosloss.kernels import eager as eager_kernels
from cosloss.kernels.dispatch import wants_native
from cosloss.kernels.eager import row_blocks
from cosloss.kernels.native import library

WITHOUT_LIBRARY = """
import ctypes
import torch


class Refused(ctypes.CDLL):
    def __init__(self, name, *rest, **more):
        if name and "cosloss" in name:
            raise OSError("undefined symbol: GOMP_parallel")
        super().__init__(name, *rest, **more)


ctypes.CDLL = Refused
import cosloss
z1, z2 = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
loss = cosloss.cosine_embedding_loss(z1, z2, torch.ones(4)) + cosloss.nt_xent_loss(z1, z2)
(loss + cosloss.pairwise_cosine_similarity(z1, z2).sum()).backward()
assert z1.grad.norm() > 0
"""


def test_they_are_there(build):
    assert library.loaded() is not None
    assert library.loaded()._name.count(f"_{library.usable()[0]}.") == 1


def test_work_has_the_fields_that_the_library_says_and_no_others(build):
    work = library.in_batch_params()(n=3)
    assert (work.n, work.m, work.grad_r) == (3, 0, None)
    with pytest.raises(AttributeError, match="columns"):
        work.columns = 1
    with pytest.raises(AttributeError, match="columns"):
        library.in_batch_params()(columns=1)


def test_under_a_dispatch_mode_it_is_not_plain():
    x = torch.ones(2, 3)
    assert wants_native(x)
    assert not wants_native(x.half())
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert not wants_native(x)


def test_without_a_compiled_build_all_is_eagers(no_build, values_and_gradients):
    x, y = (torch.randn(4, 5, requires_grad=True) for _ in range(2))
    assert not wants_native(x, y)
    ours = values_and_gradients(cosloss.pairwise_cosine_similarity, x, y)
    with dispatch.use("eager"):
        torch.testing.assert_close(
            ours, values_and_gradients(cosloss.pairwise_cosine_similarity, x, y), rtol=0, atol=0
        )
    with (
        dispatch.use("native"),
        pytest.raises(RuntimeError, match="without its compiled kernels"),
    ):
        cosloss.cosine_similarity(x, y)


def test_a_library_that_does_not_load_is_done_without():
    program = [sys.executable, "-c", WITHOUT_LIBRARY]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    environment = os.environ | {"COSLOSS_BACKEND": "native"}
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert "does not load (undefined symbol: GOMP_parallel)" in done.stderr


def test_use_chooses_between_the_compiled_kernels_and_the_eager_ones(monkeypatch):
    called = []
    for module, name in ((native.cosine_similarity, "native"), (row_blocks, "eager")):
        original = module.forward
        monkeypatch.setattr(
            module,
            "forward",
            lambda *a, name=name, original=original: called.append(name) or original(*a),
        )
    x = torch.randn(2, 3)
    for name in ("native", "eager", None):
        with dispatch.use(name):
            cosloss.cosine_similarity(x, x)
    assert called == ["native", "eager", "native"]


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_the_table_judges_the_backend_that_runs(monkeypatch, backend):
    """Each op is right by either, and a wrong backward of its own is what the table then sees."""
    ops = [op for op in verify.OPS if op.name.endswith("cosine_similarity")]
    ops += [op for op in verify.OPS if op.name == "cosine_embedding_loss"]
    lines: list[str] = []

    def judged():
        lines.clear()
        with dispatch.use(backend):
            verify.verify(ops, ["float32"], show=lines.append)
        return [line.rsplit("  ", 1)[-1][:4].strip() for line in lines[1:]]

    assert judged() == ["ok"] * 6
    kernels = {
        "native": (native.cosine_similarity, native.pairwise_cosine_similarity),
        "eager": (row_blocks, eager_kernels.pairwise_cosine_similarity),
    }
    for kernel in kernels[backend]:
        monkeypatch.setattr(kernel, "backward", off_by_five_per_cent(kernel.backward))
    assert judged() == ["FAIL"] * 6


def off_by_five_per_cent(backward):
    return lambda *a: [None if g is None else 1.05 * g for g in backward(*a)]
