"""Embeddings without columns: a similarity of 0, or an error that names them, on every backend."""

import pytest
import torch

from cosloss import functional
from cosloss.kernels import dispatch
from tests.surroundings.calls import CALLS, IN_BATCH, arguments


@pytest.mark.parametrize("backend", ["eager", "native", None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_no_columns(name, dtype, backend):
    given = arguments(dtype, columns=0)
    with dispatch.use(backend):
        if name in IN_BATCH:
            with pytest.raises(ValueError, match=r"at least one column; got shape \(6, (2, )?0\)"):
                CALLS[name].function(functional, given)
            return
        value = CALLS[name].function(functional, given)
        (gradient,) = torch.autograd.grad(value.sum(), given["a"])
    # half of the pairs are positives, each of which costs 1, times its weight
    costs = (given["w"] * (given["y"] == 1)).mean() if name == "cosine_embedding" else 0
    torch.testing.assert_close(value, torch.zeros_like(value) + costs, rtol=1e-2, atol=0)
    assert gradient.shape == (6, 0)


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_vectors_without_entries_along_any_dimension(backend):
    x = torch.randn(4, 0, 3)
    with dispatch.use(backend):
        assert torch.equal(functional.cosine_similarity(x, x, dim=1), torch.zeros(4, 3))
        assert functional.cosine_similarity(x, x, dim=2).shape == (4, 0)
        assert functional.pairwise_cosine_similarity(x[..., :0], x[..., :0]).shape == (4, 0, 0)


def test_a_queue_without_columns_or_rows():
    z = torch.randn(4, 3)
    for negatives in (torch.randn(5, 0), torch.randn(0, 3)):
        with pytest.raises(ValueError, match=r"negatives must have shape \(K, 3\)"):
            functional.info_nce_loss(z, z, negatives=negatives)
