"""Tensors that only wrap their numbers: right, or refused by name, whichever argument they are."""

import pytest
import torch
from torch.utils._pytree import tree_map_only

from cosloss import functional
from cosloss.kernels import dispatch
from tests.surroundings.calls import CALLS, arguments, error, expected, incoming, learnt


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, as quantised, masked and sharded tensors are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, strides=inner.stride()
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda x: x.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, cls, function(*args, **kwargs))


class Named(torch.Tensor):
    """A tensor with memory of its own and another class, as fastai's and torchvision's are."""


def inner(x):
    return x.inner if isinstance(x, Wrapper) else x


SIMILARITIES = ("cosine_similarity", "pairwise")
CASES = [(name, k) for name, call in CALLS.items() for k in (*call.names, "the upstream gradient")]


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize(("name", "which"), CASES, ids=lambda x: x)
def test_wrapped(name, which, backend):
    given = arguments()
    exact = expected(name, given)
    if which in given:
        needs = given[which].requires_grad
        given[which] = Wrapper(given[which].detach()).requires_grad_(needs)
    with dispatch.use(backend):
        value = CALLS[name].function(functional, given)
        upstream = incoming(inner(value))
        if which not in given or isinstance(value, Wrapper):
            upstream = Wrapper(upstream)
        grads = torch.autograd.grad(value, learnt(name, given), upstream)
    assert error([inner(x).detach() for x in (value, *grads)], exact) < 2e-6


@pytest.mark.parametrize("name", CALLS)
def test_of_another_class(name):
    given = arguments()
    exact = expected(name, given)
    for k in "ab":
        given[k] = given[k].detach().as_subclass(Named).requires_grad_()
    value = CALLS[name].function(functional, given)
    grads = torch.autograd.grad(value, learnt(name, given), incoming(value))
    assert error([x.detach().as_subclass(torch.Tensor) for x in (value, *grads)], exact) < 2e-6


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    import torch.distributed as dist

    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


REFUSED = [(name, k) for name, k in CASES if len(k) == 1 and name not in SIMILARITIES]


@pytest.mark.parametrize(("name", "which"), REFUSED, ids=lambda x: x)
def test_sharded_tensors_are_right_or_refused(name, which, mesh):
    from torch.distributed.tensor import DTensor, Replicate

    given = arguments()
    exact = expected(name, given)
    needs = given[which].requires_grad
    given[which] = DTensor.from_local(given[which].detach(), mesh, [Replicate()])
    given[which].requires_grad_(needs)
    with pytest.raises(TypeError, match=r"is a DTensor.*full_tensor\(\)"):
        CALLS[name].function(functional, given)
    given[which] = given[which].full_tensor()
    assert error([CALLS[name].function(functional, given).detach()], exact[:1]) < 2e-6


@pytest.mark.parametrize("name", SIMILARITIES)
def test_similarities_of_sharded_tensors(name, mesh):
    from torch.distributed.tensor import DTensor, Shard

    given = arguments()
    exact = expected(name, given)
    for k in "ab":
        given[k] = DTensor.from_local(given[k].detach(), mesh, [Shard(0)]).requires_grad_()
    value = CALLS[name].function(functional, given)
    upstream = DTensor.from_local(incoming(value.full_tensor()), mesh, value.placements)
    grads = torch.autograd.grad(value, learnt(name, given), upstream)
    assert error([x.full_tensor().detach() for x in (value, *grads)], exact) < 2e-6
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        CALLS[name].function(functional, given | {"b": torch.randn(6, 8)})
