"""The ring over gloo processes: the joined batch's loss, in memory that does not grow with them."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cosloss import distributed, functional
from cosloss.ops import gathered
from experiments.simclr.program.processes import leave_process_group
from tests.test_distributed import LOSSES, check_every_loss, errors, join, spawn

ITEMS, COLUMNS = 16, 256
PASS_ON, PART = distributed.Peers.pass_on, distributed.Peers.part


def without_the_last(peers, *tensors):
    for step, block in enumerate(PASS_ON(peers, *tensors), 1):
        if step < peers.world:
            yield block


def the_later_ones(totals, parts):
    return tuple(t if p is None else p for t, p in zip(totals, parts, strict=True))


def of_the_next_item(peers, everyones, items):
    if everyones.ndim == 2 and items != peers.own:
        everyones = everyones.roll(everyones.shape[0] // sum(peers.batch_sizes), 0)
    return PART(peers, everyones, items)


FAULTS = {
    "the last block is skipped": (distributed.Peers, "pass_on", without_the_last),
    "a block's statistics alone": (gathered, "merged", lambda problem, parts: parts[-1]),
    "a block's gradients alone": (gathered, "_added", the_later_ones),
    "another item's numbers": (distributed.Peers, "part", of_the_next_item),
}


# each row's numbers are the same: its sum of softplus has the weight 1, and its size no matter
HARMLESS = {("another item's numbers", "sigmoid")}


def catch_planted_faults(rank, world):
    """Each fault in every loss, in whichever process sees it."""
    for fault, (owner, name, faulty) in FAULTS.items():
        with mock.patch.object(owner, name, faulty):
            for loss, function in LOSSES.items():
                if (fault, loss) in HARMLESS:
                    continue
                found = errors(function, torch.float64, 0.3, rank, world, "ring")
                worst = torch.tensor(max(found), dtype=torch.float64)
                dist.all_reduce(worst, dist.ReduceOp.MAX)
                assert worst > 1e-4, (fault, loss, float(worst))


class Memory(TorchDispatchMode):
    """The largest tensor that is made, and the most that is alive at once, in elements."""

    def __init__(self):
        super().__init__()
        self.largest = self.most = 0
        self._alive = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                storage = x.untyped_storage()
                size = storage.nbytes() // 4
                self._alive.setdefault(storage._cdata, (StorageWeakRef(storage), size))
                self.largest = max(self.largest, size)
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._alive.values()))
        return result


@contextmanager
def counted():
    """The shapes that are gathered, and the elements that are passed on."""
    gathered_shapes, passed = [], []
    all_gather, batch = distributed._all_gather, dist.batch_isend_irecv

    def counted_gather(parts, x):
        gathered_shapes.append(tuple(x.shape))
        all_gather(parts, x)

    def counted_batch(ops):
        passed.append(sum(op.tensor.numel() for op in ops if op.op is dist.isend))
        return batch(ops)

    with (
        mock.patch.object(distributed, "_all_gather", counted_gather),
        mock.patch.object(dist, "batch_isend_irecv", counted_batch),
    ):
        yield gathered_shapes, passed


# in units of N D: what travels in the forward and the backward pass, and what may be alive at once
BLOCKS = {
    "nt_xent": (2, 2, 14),
    "symmetric": (2, 2, 14),
    "info_nce": (1, 2, 14),
    "sup_con": (1, 1, 8),
}


def hold_few_blocks(rank, world):
    """As many of any number of processes."""
    unit = ITEMS * COLUMNS
    for name, (forth, back, alive) in BLOCKS.items():
        a, b = torch.randn(2, ITEMS, COLUMNS, requires_grad=True)
        t, ids = torch.tensor(0.3, requires_grad=True), torch.arange(ITEMS) // 2
        seen = {}
        for gather in (True, "ring"):
            with Memory() as seen[gather], counted() as (shapes, passed):
                value = LOSSES[name](a, b, t, ids, gather_distributed=gather)
                forward = list(passed)
                value.backward()
        assert forward == [forth * unit] * (world - 1), (name, forward)
        assert passed == forward + [back * unit] * (world - 1), (name, passed)
        assert all(len(shape) == 1 or shape[1] <= 4 for shape in shapes), (name, shapes)
        assert seen["ring"].largest <= 2 * unit, (name, seen["ring"].largest / unit)
        assert seen["ring"].most < alive * unit, (name, seen["ring"].most / unit)
        # what all of them hold would have been seen
        assert seen[True].most > seen["ring"].most + (world - 1) * unit, name


def agree_to_the_bit(rank, world):
    """The loss is the same number in every process, whose blocks come in another order."""
    z1, z2 = torch.randn(2, 3 + rank, 8)
    loss = functional.nt_xent_loss(z1, z2, 0.1, gather_distributed="ring")
    all_of_them = [torch.empty_like(loss) for _ in range(world)]
    dist.all_gather(all_of_them, loss)
    assert len({float(x) for x in all_of_them}) == 1, all_of_them


def refuse(rank):
    z = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(ValueError, match="reduction must be mean or sum; got 'none'"):
        functional.nt_xent_loss(z, z, reduction="none", gather_distributed="ring")
    loss = functional.nt_xent_loss(z, z, gather_distributed="ring")
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, z, create_graph=True)
    with pytest.warns(UserWarning, match="temperature differs between the processes"):
        functional.nt_xent_loss(z, z, torch.tensor(0.1 + rank), gather_distributed="ring")


def end_one_process(rank):
    """After the forward pass, so that the others wait for it in the ring of the backward pass."""
    z = torch.randn(4, 3, requires_grad=True)
    loss = functional.nt_xent_loss(z, z, gather_distributed="ring")
    if rank != 1:
        with pytest.raises(RuntimeError, match="a process of the group ended"):
            loss.backward()
    leave_process_group()


def everything(rank, world, port):
    join(rank, world, port)
    torch.manual_seed(rank)
    check_every_loss(rank, world, "ring")
    catch_planted_faults(rank, world)
    hold_few_blocks(rank, world)
    agree_to_the_bit(rank, world)
    refuse(rank)
    end_one_process(rank)


@pytest.mark.slow
def test_four_processes():
    spawn(everything, 4)


def test_two_processes():
    spawn(everything, 2)


def test_alone_it_is_the_plain_loss():
    z1, z2 = torch.randn(2, 5, 3)
    ring = functional.nt_xent_loss(z1, z2, gather_distributed="ring")
    assert torch.equal(ring, functional.nt_xent_loss(z1, z2))


@pytest.mark.parametrize("given", ["rings", "yes", 1, None])
def test_another_word_is_refused(given):
    z1, z2 = torch.randn(2, 5, 3)
    with pytest.raises(TypeError, match="gather_distributed must be True, False or 'ring'; got"):
        functional.nt_xent_loss(z1, z2, gather_distributed=given)
