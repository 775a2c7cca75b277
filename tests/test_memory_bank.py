"""MemoryBank: first in, first out; the same in every process; nothing else of training changes."""

from collections import deque

import pytest
import torch
import torch.distributed as dist
from torch import nn

from cosloss import InfoNCELoss, MemoryBank, info_nce_loss
from experiments.simclr.program.processes import leave_process_group
from tests.slow import slow
from tests.test_distributed import join, spawn


def keys(rows, columns=3, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 4, 7])
@pytest.mark.parametrize("batches", [(2, 2, 2, 2, 2), (3, 1, 5, 2, 9, 1), (7, 7), (8,), (1,) * 9])
def test_the_oldest_go_first(size, batches):
    bank = MemoryBank(size, 3)
    queue = deque(bank.keys.clone(), maxlen=size)
    for i, n in enumerate(batches):
        before, batch = torch.stack(list(queue)), keys(n, seed=i)
        negatives = bank(batch)
        assert {tuple(x) for x in negatives.tolist()} == {tuple(x) for x in before.tolist()}
        queue.extend(batch)
    assert {tuple(x) for x in bank.keys.tolist()} == {tuple(x.tolist()) for x in queue}


def test_what_it_gives_is_apart_and_has_no_gradient():
    bank = MemoryBank(8, 3)
    query, key = keys(4).requires_grad_(), keys(4, seed=1).requires_grad_()
    negatives = bank(key)
    assert not negatives.requires_grad
    loss = info_nce_loss(query, key, 0.2, negatives)
    bank(keys(8, seed=2))  # before the backward pass: another batch of an accumulated step
    expected = torch.autograd.grad(info_nce_loss(query, key, 0.2, negatives), (query, key))
    assert all(map(torch.equal, torch.autograd.grad(loss, (query, key)), expected))
    assert not bank.keys.requires_grad


def test_evaluation_keeps_it_as_it_is():
    bank = MemoryBank(8, 3).eval()
    before = bank.keys.clone()
    assert torch.equal(bank(keys(4)), before)
    assert torch.equal(bank.keys, before)


def test_its_state_goes_with_the_checkpoint():
    bank = MemoryBank(5, 3)
    for i in range(3):
        bank(keys(2, seed=i))
    other = MemoryBank(5, 3)
    other.load_state_dict(bank.state_dict())
    for _ in range(3):
        assert torch.equal(bank(keys(2, seed=9)), other(keys(2, seed=9)))
    assert torch.equal(bank.keys, other.keys)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_keys_take_its_dtype(dtype):
    bank = MemoryBank(4, 3)
    bank(keys(4).to(dtype))
    assert torch.equal(bank.keys, keys(4).to(dtype).float())
    assert MemoryBank(4, 3, dtype=dtype).keys.dtype == dtype
    assert MemoryBank(4, 3, device="meta").keys.is_meta


def test_compiled_it_is_itself():
    bank, plain = MemoryBank(5, 3), MemoryBank(5, 3)
    plain.load_state_dict(bank.state_dict())
    torch._dynamo.reset()
    compiled = torch.compile(bank, fullgraph=True, backend="aot_eager", dynamic=True)
    for i, n in enumerate((2, 3, 7)):
        assert torch.equal(compiled(keys(n, seed=i)), plain(keys(n, seed=i)))
    assert torch.equal(bank.keys, plain.keys)


class MoCo(nn.Module):
    """A step of momentum contrast: the keys are of an encoder that follows slowly."""

    def __init__(self, bank):
        super().__init__()
        self.encoder, self.slow = nn.Linear(6, 3), nn.Linear(6, 3)
        self.slow.load_state_dict(self.encoder.state_dict())
        self.bank, self.loss = bank, InfoNCELoss(0.2)

    def forward(self, x):
        with torch.no_grad():
            for own, of_encoder in zip(
                self.slow.parameters(), self.encoder.parameters(), strict=True
            ):
                own.lerp_(of_encoder, 0.1)
            key = self.slow(x + 0.1)
        return self.loss(self.encoder(x), key, self.bank(key))


def trained(bank, batches, share=1.0):
    torch.manual_seed(0)
    model = MoCo(bank)
    optimizer = torch.optim.SGD(model.encoder.parameters(), lr=0.5)
    for x in batches:
        optimizer.zero_grad()
        (share * model(x)).backward()
        if dist.is_initialized():
            for p in model.encoder.parameters():
                dist.all_reduce(p.grad)
        optimizer.step()
    return model


class ByHand(nn.Module):
    """The same queue as a list that is written again in each step."""

    def __init__(self, keys):
        super().__init__()
        self.keys = keys.clone()

    def forward(self, key):
        before, self.keys = self.keys, torch.cat([self.keys, key])[len(key) :]
        return before


def test_training_is_that_of_a_queue_by_hand():
    torch.manual_seed(0)
    bank, data = MemoryBank(40, 3), torch.randn(12, 16, 6)
    by_hand = trained(ByHand(bank.keys), data)
    ours = trained(bank, data)
    torch.testing.assert_close(ours.encoder.state_dict(), by_hand.encoder.state_dict())
    assert not torch.equal(ours.encoder.weight, MoCo(bank).encoder.weight)


def train_in_processes(rank, world, port):
    join(rank, world, port)
    torch.manual_seed(3)
    data = torch.randn(5, 8, 6)
    rows = [slice(0, 5), slice(5, 8)] if world == 2 else [slice(2 * i, 2 * i + 2) for i in range(4)]
    torch.manual_seed(1)
    model = trained(
        MemoryBank(11, 3, gather_distributed=True),
        data[:, rows[rank]],
        share=len(data[0, rows[rank]]) / 8,
    )
    leave_process_group()
    torch.manual_seed(1)
    joined = trained(MemoryBank(11, 3), data)
    torch.testing.assert_close(model.state_dict(), joined.state_dict())


@pytest.mark.parametrize("world", [2, *slow(4)])
def test_in_several_processes_it_is_the_joined_batchs(world):
    spawn(train_in_processes, world)


BAD = {
    "size must be at least 1; got 0": lambda: MemoryBank(0, 3),
    "size must be a whole number; got '8'": lambda: MemoryBank("8", 3),
    "dim must be a whole number; got 2.0": lambda: MemoryBank(8, 2.0),
    "dim must be at least 1; got 0": lambda: MemoryBank(8, 0),
    "gather_distributed must be True or False; got 1": lambda: MemoryBank(
        8, 3, gather_distributed=1
    ),
    r"key must have shape \(N, 3\).*; got \(4, 5\)": lambda: MemoryBank(8, 3)(keys(4, 5)),
    r"key must have shape \(N, 3\).*; got \(0, 3\)": lambda: MemoryBank(8, 3)(keys(0)),
    "key must be a Tensor; got a list": lambda: MemoryBank(8, 3)([[1.0, 2.0, 3.0]]),
    "key must have a real floating-point dtype": lambda: MemoryBank(8, 3)(torch.ones(2, 3).int()),
    r"the memory bank and key must be on one device; got cpu and meta": lambda: MemoryBank(8, 3)(
        torch.ones(2, 3, device="meta")
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_a_mistake_gets_one_line(message):
    with pytest.raises((TypeError, ValueError), match=message) as error:
        BAD[message]()
    assert "\n" not in str(error.value)
