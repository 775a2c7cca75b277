"""The fixture gradients_agree, in a project of its own."""

import subprocess
import sys

import pytest

pytest_plugins = "pytester"

TESTS = """
import torch

class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad

def test_right(gradients_agree):
    gradients_agree(torch.sigmoid, lambda x: 1 / (1 + torch.exp(-x)), torch.randn(4, 3))
    gradients_agree(torch.sigmoid, None, torch.randn(4, 3))

def test_wrong(gradients_agree):
    gradients_agree(Wrong.apply, torch.square, torch.randn(4, 3))

def test_wrong_without_a_twin(gradients_agree):
    gradients_agree(Wrong.apply, None, torch.randn(4, 3))
"""


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def test_a_wrong_gradient_fails_its_test(pytester):
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_subprocess("-p", "cosloss_pytest")
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(
        ["*it is 0.5 times the right one*", "*Worst entries of *: [[]*expected*", "*finite differ*"]
    )


def test_torch_is_imported_when_the_fixture_is_called(pytester):
    pytester.makepyfile("def test_nothing():\n    pass\n")
    code = (
        "import pytest, sys; status = pytest.main(['-p', 'cosloss_pytest']); "
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_entry_point_names_it():
    from importlib.metadata import entry_points

    found = {e.value for e in entry_points(group="pytest11") if e.name == "cosloss"}
    if not found:
        pytest.skip("cosloss is not installed")
    assert found == {"cosloss_pytest"}
