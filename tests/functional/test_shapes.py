"""The shapes and dtypes that the functions' annotations state are those of the table's samples."""

import importlib
import sys

import jaxtyping
import pytest
import torch

import cosloss
from cosloss.testing import OPS


@pytest.fixture(scope="module")
def checked():
    """`cosloss.functional`, imported once more with its annotations checked at each call."""
    package = "cosloss.functional"
    own = {name: sys.modules[name] for name in sys.modules if name.startswith(package)}
    for name in own:
        del sys.modules[name]
    with jaxtyping.install_import_hook(package, "beartype.beartype"):
        module = importlib.import_module(package)
    for name in [name for name in sys.modules if name.startswith(package)]:
        del sys.modules[name]
    sys.modules.update(own)
    cosloss.functional = own[package]
    return module


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_samples_have_the_annotated_shapes(checked, op):
    function = getattr(checked, op.function.__name__)
    for sample in op.generic():
        value = function(**sample.inputs, **sample.keywords)
        assert isinstance(value, torch.Tensor)


def test_a_wrong_shape_is_seen(checked):
    assert checked is not cosloss.functional
    with pytest.raises(jaxtyping.TypeCheckError, match="z2"):
        checked.nt_xent_loss(torch.ones(3, 2), torch.ones(4, 2))
