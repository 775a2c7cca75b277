"""The backends, each with what a test of it needs; Triton's without a GPU, as a GPU computes."""

from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType

import numpy as np
import pytest
import torch
from packaging.version import Version

from cosloss.kernels import dispatch
from cosloss.kernels.native import library

try:
    import triton
    import triton.language as tl
    from triton.runtime import interpreter
except ImportError:
    triton = None


@dataclass
class Backend:
    """A backend's in-batch kernels, the dtype to judge them in, and the error allowed there."""

    module: ModuleType
    dtype: torch.dtype
    rows: int  # of a view: several tiles, and few to be computed
    rounding: float  # relative to the largest element, of logits of about 1
    computed: list[str] = field(default_factory=list)  # the kernels' functions called so far


@pytest.fixture(params=["eager", "native", "triton"])
def backend(request, monkeypatch):
    """Each backend in turn, forced for all that it has."""
    name = request.param
    if name == "native" and library.loaded() is None:
        pytest.skip("the kernels are not compiled")
    if name == "triton":
        request.getfixturevalue("triton_backend")
    module = import_module(f"cosloss.kernels.{name}.in_batch")
    dtype = torch.float64 if name == "eager" else torch.float32
    rows = 20 if name == "triton" else 70
    found = Backend(module, dtype, rows, 4 * torch.finfo(dtype).eps)
    for function in ("forward", "backward", "forward_backward", "input_grads"):
        if hasattr(module, function):
            monkeypatch.setattr(module, function, _noted(module, function, found.computed))
    with dispatch.use(name):
        yield found


def _noted(module, name, computed):
    function = getattr(module, name)

    def call(*arguments, **keywords):
        computed.append(name)
        return function(*arguments, **keywords)

    return call


@pytest.fixture
def poisoned():
    """Memory from torch.empty is NaN: an element that a kernel does not write is seen."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def rounding(monkeypatch):
    """bfloat16 and products as a GPU has them.

    Triton's interpreter truncates to bfloat16, gets its subnormal numbers wrong, multiplies its bit
    patterns as integers, and takes no notice of input_precision.
    """
    convert = interpreter._convert_float

    def converted(data, source, target, mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            narrow = torch.from_numpy(np.ascontiguousarray(data)).bfloat16()
            return narrow.view(torch.uint16).numpy()
        if (source, target) == (tl.bfloat16, tl.float32):
            return _from_bfloat16(data).view(np.uint32)
        return convert(data, source, target, mode)

    def dot(builder, a, b, d, input_precision, max_num_imprecise_acc):
        product = _dot(*(_float32(x) for x in (a, b)), str(input_precision))
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter, "_convert_float", converted)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def _float32(handle):
    if handle.dtype.scalar == tl.bfloat16:
        return _from_bfloat16(handle.data)
    return handle.data.astype(np.float32)


def _from_bfloat16(bits):
    return torch.from_numpy(np.ascontiguousarray(bits)).view(torch.bfloat16).float().numpy()


def _dot(a, b, precision):
    if precision.endswith("TF32x3"):
        high_a, high_b = _tf32(a), _tf32(b)
        low_a, low_b = _tf32(a - high_a), _tf32(b - high_b)
        return (low_a @ high_b + high_a @ low_b) + high_a @ high_b
    if precision.endswith("TF32"):
        return _tf32(a) @ _tf32(b)
    return a @ b


def _tf32(x):
    """Float32 rounded to the nearest number with TF32's 10 bits after the point."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    nearest = (bits + 0xFFF + (bits >> 13 & 1)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), nearest.view(np.float32), x)


@pytest.fixture
def triton_backend(request):
    """Every op that Triton has is Triton's; on the CPU in its interpreter."""
    if triton is None:
        pytest.skip("Triton is not installed: every op is eager's")
    if not triton.knobs.runtime.interpret:
        pytest.skip("Triton's interpreter is off: set TRITON_INTERPRET=1")
    if Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"):
        pytest.skip(
            f"the interpreter of Triton {triton.__version__} fails with NumPy {np.__version__}: "
            "pip install 'numpy<2.4'"  # triton-lang/triton#9171
        )
    for name in ("poisoned", "rounding"):
        request.getfixturevalue(name)
    with dispatch.use("triton"):
        yield
