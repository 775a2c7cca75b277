"""Which backend is chosen, by device and by force, and that everything works without Triton."""

import importlib.util
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from cosloss.kernels import dispatch, eager
from cosloss.kernels.native import library

ON_GPU = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # every import of it fails
import torch
from cosloss import NTXentLoss, cosine_similarity
from cosloss.kernels import dispatch
z1, z2 = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
(NTXentLoss()(z1, z2) + cosine_similarity(z1, z2).sum()).backward()
assert z1.grad.norm() > 0
assert not dispatch.runs_triton(torch.device("cuda", 0))
"""
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def run(program, **environment):
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of compute capability 9.0, as far as the choice goes."""
    dispatch.runs_triton.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    yield monkeypatch
    dispatch.runs_triton.cache_clear()


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_with_a_compiler_the_kernels_are_compiled():
    assert library.loaded() is not None, "install again: pip install -e ."


def test_cpu_tensors_are_eagers():
    assert dispatch.backend(torch.ones(2), None) is eager


@needs_triton
def test_a_gpus_tensors_are_tritons_but_for_float64(gpu):
    assert dispatch.wants_triton(ON_GPU, ON_GPU)
    wide = SimpleNamespace(device=ON_GPU.device, dtype=torch.float64)
    assert not dispatch.wants_triton(ON_GPU, wide)


def test_an_old_gpus_tensors_are_eagers(gpu):
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not dispatch.wants_triton(ON_GPU)


def test_without_triton_a_gpus_tensors_are_eagers(gpu):
    for name in [name for name in sys.modules if name.startswith("cosloss.kernels.triton")]:
        gpu.delitem(sys.modules, name)
    gpu.setitem(sys.modules, "triton", None)
    assert not dispatch.wants_triton(ON_GPU)


@needs_triton
def test_triton_computes_plain_tensors_only():
    x = torch.ones(2, 3)
    with dispatch.use("triton"):
        assert dispatch.backend(x) is eager  # a gradient may be taken of what happens now
        with torch.no_grad():
            assert dispatch.backend(x) is not eager
            assert torch.func.vmap(lambda row: row * (dispatch.backend(row) is eager))(x).all()


def test_a_backend_can_be_forced(gpu):
    with dispatch.use("eager"):
        assert not dispatch.wants_triton(ON_GPU)
        with dispatch.use("triton"):
            assert dispatch.wants_triton(torch.ones(2))
    assert not dispatch.wants_triton(torch.ones(2))


def test_an_unknown_backend_is_an_error():
    with (
        pytest.raises(ValueError, match="one of eager, native, triton; got 'cuda'"),
        dispatch.use("cuda"),
    ):
        pass
    wrong = "import torch, cosloss; cosloss.cosine_similarity(torch.ones(1, 2), torch.ones(1, 2))"
    assert "one of eager, native, triton; got 'gpu'" in run(wrong, COSLOSS_BACKEND="gpu").stderr


def test_everything_works_without_triton():
    done = run(WITHOUT_TRITON)
    assert done.returncode == 0, done.stderr


def test_importing_cosloss_does_not_import_triton():
    done = run("import sys, cosloss; assert 'triton' not in sys.modules")
    assert done.returncode == 0, done.stderr
