"""Two processes: FSDP2 shards of learnable scalars, and temperatures that drift apart."""

import socket
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cosloss import InfoNCELoss, NTXentLoss, SigmoidContrastiveLoss, SupConLoss
from experiments.simclr.program.processes import leave_process_group
from tests.surroundings.test_wrapper_tensors import Wrapper

pytestmark = pytest.mark.slow

MODULES = [NTXentLoss, InfoNCELoss, SupConLoss, SigmoidContrastiveLoss]
ROWS = 6


def views():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 2 * ROWS, 4, dtype=torch.float64, generator=generator)


def own(x, rank):
    return x[rank * ROWS : (rank + 1) * ROWS]


def second(module, z2):
    return torch.arange(len(z2)) % 3 if module is SupConLoss else z2


def fully_sharded(rank):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = dist.init_device_mesh("cpu", (2,))
    for module in MODULES:
        options = {"learnable_temperature": True, "scalar_parameters": False}
        alone = module(0.3, dtype=torch.float64, **options)
        shared = module(0.3, dtype=torch.float64, gather_distributed=True, **options)
        fully_shard(shared, mesh=mesh)
        assert "temperature=0.3" in repr(shared)
        z1, z2 = views()
        alone(z1, second(module, z2)).backward()
        whole = second(module, z2)
        loss = shared(own(z1, rank), own(whole, rank))
        loss.backward()
        for name, parameter in shared.named_parameters():
            expected = alone.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad.full_tensor(), expected, msg=name)
        shared.temperature = 0.2
        stored = shared.log_temperature.full_tensor().detach()
        assert float(stored.exp()) == pytest.approx(0.2)

        narrow = module(0.02, **options)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
        fully_shard(narrow, mesh=mesh, mp_policy=policy)
        z = own(z1, rank).float()
        other = second(module, own(z2, rank).float())
        loss = narrow(z, other)
        stored = torch.tensor(0.02).log().bfloat16()
        wide = module(float(stored.double().exp()), learnable_temperature=False).double()
        exact = wide(z.double(), other.double() if other.is_floating_point() else other)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)


def drifting(rank):
    z1, z2 = (own(z, rank) for z in views())
    for turn, module in enumerate((NTXentLoss, SigmoidContrastiveLoss, SupConLoss), 1):
        loss = module(0.3, learnable_temperature=True, gather_distributed=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                loss(z1, second(module, z2))
        assert not caught, [str(w.message) for w in caught]
        loss.temperature = 0.3 + 0.01 * rank * turn
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                loss(z1, second(module, z2))
        (warning,) = caught
        said = f"temperature differs between the processes (0.3, {0.3 + 0.01 * turn:.2f})"
        assert said in str(warning.message)


def cured(rank):
    loss = NTXentLoss(0.3, learnable_temperature=True, gather_distributed=True, dtype=torch.float64)
    alone = NTXentLoss(0.3, learnable_temperature=True, dtype=torch.float64)
    z1, z2 = views()
    loss(own(z1, rank), own(z2, rank)).backward()
    for parameter in loss.parameters():  # as docs/many-gpus.md has it
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
    alone(z1, z2).backward()
    torch.testing.assert_close(loss.log_temperature.grad, alone.log_temperature.grad)


def wrapped(rank):
    z1, z2 = (own(z, rank).requires_grad_() for z in views())
    weight = torch.ones(ROWS, dtype=torch.float64)
    loss = NTXentLoss(gather_distributed=True)
    with pytest.raises(RuntimeError, match="gather_distributed works on plain tensors"):
        loss(z1, z2, weight=Wrapper(weight))
    value = loss(z1, z2, weight=weight)
    with pytest.raises(RuntimeError, match="gather_distributed works on plain tensors"):
        value.backward(Wrapper(torch.ones_like(value)))
    with pytest.raises(RuntimeError, match="gather_distributed works on plain tensors"):
        torch.func.grad(lambda w: w * loss(z1, z2))(value.detach())


def after_inference(rank):
    from torch.nn.parallel import DistributedDataParallel

    loss = SupConLoss(learnable_temperature=True, gather_distributed=True)
    wrapped = DistributedDataParallel(loss)
    z1, _ = views()
    z, labels = own(z1, rank).float(), torch.arange(ROWS) % 3
    for _ in range(2):
        with torch.inference_mode():
            wrapped(z.clone(), labels.clone())
        wrapped(z, labels).backward()
    assert loss.rows_without_positive == 0


def everything(rank, port):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    fully_sharded(rank)
    drifting(rank)
    cured(rank)
    wrapped(rank)
    after_inference(rank)
    dist.barrier()
    leave_process_group()


def test_two_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(everything, (port,), 2)


def test_learnable_scalars_have_either_shape():
    for scalar, shape in ((True, ()), (False, (1,))):
        parameters = [*SigmoidContrastiveLoss(scalar_parameters=scalar).parameters()]
        assert [p.shape for p in parameters] == [shape, shape]
