"""Allocations name their device: another default device changes nothing but new parameters'."""

import ast
from pathlib import Path

import pytest
import torch

import cosloss
from cosloss import NTXentLoss, SigmoidContrastiveLoss
from cosloss.kernels import dispatch
from tests.surroundings.calls import CALLS, arguments, error, expected, found

CONSTRUCTORS = {
    "arange",
    "as_tensor",
    "asarray",
    "empty",
    "empty_strided",
    "eye",
    "full",
    "linspace",
    "logspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "scalar_tensor",
    "tensor",
    "zeros",
}
LIBRARY = Path(cosloss.__file__).parent


def unnamed(source: str) -> list[str]:
    """The calls of torch's constructors in a source that name no device, `line: call`."""
    return [
        f"{node.lineno}: torch.{node.func.attr}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and node.func.attr in CONSTRUCTORS
        and not any(keyword.arg in ("device", None) for keyword in node.keywords)
    ]


def test_every_allocation_names_its_device():
    files = sorted(LIBRARY.rglob("*.py"))
    assert len(files) > 50
    found = {str(f.relative_to(LIBRARY)): unnamed(f.read_text()) for f in files}
    assert {name: calls for name, calls in found.items() if calls} == {}


def test_an_allocation_without_a_device_is_seen():
    assert unnamed("import torch\nx = torch.empty(3)\ny = torch.zeros(3, device=x.device)") == [
        "2: torch.empty"
    ]


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize(
    ("dtype", "budget"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("name", CALLS)
def test_losses_of_cpu_tensors(name, dtype, budget, backend):
    given = arguments(dtype)
    with dispatch.use(backend), torch.device("meta"):
        inside = found(name, given)
    with dispatch.use(backend):
        assert error(inside, found(name, given)) == 0
    assert error(inside, expected(name, given)) < budget


def test_memory_kept_from_another_default_device_is_not_of_it():
    given = arguments()
    cosloss.release_memory()
    with dispatch.use("eager"):
        with torch.device("meta"):
            found("nt_xent", given)
        assert error(found("nt_xent", given), expected("nt_xent", given)) < 1e-5


def test_memory_kept_from_inference_mode_serves_training():
    z1, z2 = torch.randn(2, 300, 16)
    for backend in ("eager", "native"):
        cosloss.release_memory()
        with dispatch.use(backend):
            with torch.inference_mode():
                evaluated = cosloss.info_nce_loss(z1, z2)
            trained = cosloss.info_nce_loss(z1.requires_grad_(), z2)
            trained.backward()
            torch.testing.assert_close(trained.detach(), evaluated.clone())


def test_new_parameters_go_where_torchs_do():
    with torch.device("meta"):
        loss = SigmoidContrastiveLoss()
    assert loss.log_temperature.is_meta
    assert loss.bias.is_meta
    loss = NTXentLoss(learnable_temperature=True, device="meta", dtype=torch.float64)
    assert (loss.log_temperature.device.type, loss.log_temperature.dtype) == ("meta", torch.float64)


def test_checks_and_table_under_another_default_device():
    from cosloss.gradient_check import compare_gradients
    from cosloss.testing import OPS, errors

    x, y = arguments(torch.float64)["a"], arguments(torch.float64)["b"]
    with torch.device("meta"):
        assert compare_gradients(
            cosloss.cosine_similarity, cosloss.reference.cosine_similarity, x, y
        )
        for op in OPS:
            sample = next(iter(op.generic()))
            assert errors(op.function, op.twin, sample, torch.float64).within(
                op.budget(torch.float64)
            )
