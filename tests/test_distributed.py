"""Losses gathered over gloo processes against one process with the joined batch."""

import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import pad

from cosloss import functional
from experiments.simclr.program.processes import leave_process_group

BOUNDS = {2: [0, 9, 10], 4: [0, 2, 3, 7, 10]}  # of the processes' items
DIRECTIONS = ("query_to_key", "key_to_query", "query_to_query", "key_to_key")
GROUPS = torch.tensor([0, 1, 2, 1, 3, 0, 4, 2, 5, 1])
LOSSES = {
    "nt_xent": lambda a, b, t, ids, **k: functional.nt_xent_loss(a, b, t, **k),
    "decoupled, ignore": lambda a, b, t, ids, **k: functional.nt_xent_loss(
        a, b, t, "sum", decoupled=True, ignore=ids, **k
    ),
    "weight": lambda a, b, t, ids, **k: functional.nt_xent_loss(a, b, t, weight=ids + 0.5, **k),
    "in_batch_cosine": lambda a, b, t, ids, **k: (
        t
        * functional.in_batch_cosine_embedding_loss(
            a, b, -0.1, negative_weight=3.0, ignore=ids, **k
        )
    ),
    "info_nce": lambda a, b, t, ids, **k: functional.info_nce_loss(a, b, t, **k),
    "symmetric": lambda a, b, t, ids, **k: functional.info_nce_loss(
        a, b, t, symmetric=True, ignore=ids, weight=ids + 0.5, **k
    ),
    "hard negatives": lambda a, b, t, ids, **k: functional.info_nce_loss(
        a, b, t, hard_negatives=torch.stack([a * b, a + b], 1), **k
    ),
    "hard negatives, symmetric": lambda a, b, t, ids, **k: functional.info_nce_loss(
        a, b, t, None, True, hard_negatives=(a * b)[:, None], ignore=ids, weight=ids + 0.5, **k
    ),
    "key bias": lambda a, b, t, ids, **k: functional.info_nce_loss(
        a, b, t, None, True, key_bias=b[:, 0] + ids, **k
    ),
    "query bias": lambda a, b, t, ids, **k: functional.info_nce_loss(
        a, b, t, None, True, query_bias=b[:, 0] + ids, ignore=ids, **k
    ),
    "hard negatives, key bias": lambda a, b, t, ids, **k: functional.info_nce_loss(
        a,
        b,
        t,
        hard_negatives=torch.stack([a * b, a + b], 1),
        key_bias=torch.cat([b[:, 0], torch.stack([a[:, 1], b[:, 2] - ids], 1).flatten()]),
        **k,
    ),
    "sigmoid": lambda a, b, t, ids, **k: functional.sigmoid_contrastive_loss(
        a, b, t, 3 * t - 2, **k
    ),
    "sup_con": lambda a, b, t, ids, **k: functional.sup_con_loss(
        a + b, ids, t, weight=ids + 0.5, **k
    ),
    "prefixes": lambda a, b, t, ids, **k: functional.info_nce_loss(
        a, b, t, symmetric=True, ignore=ids, dims=(2, 3), dim_weights=(0.4, 1.5), **k
    ),
}

# several matrices, whose rows travel with a gradient: no ring
SOFTMAX = {
    "directions": lambda a, b, t, ids, **k: functional.info_nce_loss(
        a, b, t, directions=DIRECTIONS, ignore=ids, weight=ids + 0.5, **k
    ),
    "hardness": lambda a, b, t, ids, **k: functional.info_nce_loss(
        a,
        b,
        t,
        hard_negatives=torch.stack([a * b, a + b], 1),
        hardness=1.5,
        directions=DIRECTIONS[::3],
        false_negative_margin=-0.1,
        reduction="sum",
        **k,
    ),
    "false negatives": lambda a, b, t, ids, **k: functional.info_nce_loss(
        a, b, t, None, True, hard_negatives=(a * b)[:, None], false_negative_margin=0.1, **k
    ),
    "guide": lambda a, b, t, ids, **k: functional.info_nce_loss(
        a,
        b,
        t,
        hard_negatives=torch.stack([a * b, a + b], 1),
        directions=DIRECTIONS,
        false_negative_margin=-0.1,
        guide=(a.sin(), b.cos(), torch.stack([b, a.cos()], 1)),
        **k,
    ),
    "max_sim": lambda a, b, t, ids, **k: functional.max_sim_loss(
        *texts(a, b, len(a) % 3), t, symmetric=True, ignore=ids, weight=ids + 0.5, **k
    ),
    "max_sim, every token": lambda a, b, t, ids, **k: functional.max_sim_loss(
        *texts(a, b, 0)[:2], None, None, t, "sum", **k
    ),
}


def texts(a, b, more):
    """Queries of two tokens, documents and hard negatives of three; so many that do not count."""
    query = torch.stack([a, a.roll(1, 1)], 1)
    documents = torch.stack([torch.cat([x, y, x * y]) for x, y in ((a, b), (b, a), (a + b, b))], 1)
    count = [torch.ones(len(x), x.shape[1]) for x in (query, documents)]
    given = [pad(x, (0, 0, 0, more), value=7.0) for x in (query, documents)]
    return *given, *(pad(x, (0, more)).bool() for x in count)


def parameters(dtype, temperature):
    generator = torch.Generator().manual_seed(0)
    encoder = torch.randn(6, 5, dtype=torch.float64, generator=generator).to(dtype)
    return encoder.requires_grad_(), torch.tensor(temperature, dtype=dtype, requires_grad=True)


def batches(dtype, steps=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(steps, 2, 10, 6, dtype=torch.float64, generator=generator).to(dtype)


def gradient(loss, dtype, temperature, rows, **keywords):
    """The loss of each accumulated step, and the accumulated gradients of the parameters."""
    encoder, t = parameters(dtype, temperature)
    values = []
    for x1, x2 in batches(dtype):
        value = loss(x1[rows] @ encoder, x2[rows] @ encoder, t, GROUPS[rows], **keywords)
        (0.37 * value).backward()
        values.append(value.detach())
    return torch.stack(values), encoder.grad, t.grad


def join(rank, world, port):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=30),
    )


def errors(loss, dtype, temperature, rank, world, gather):
    """How far the losses and the averaged gradients are from one process's, of its largest."""
    bounds = BOUNDS[world]
    joined = gradient(loss, dtype, temperature, slice(None))
    rows = slice(bounds[rank], bounds[rank + 1])
    value, *grads = gradient(loss, dtype, temperature, rows, gather_distributed=gather)
    for grad in grads:  # as DDP does
        dist.all_reduce(grad)
        grad /= world
    return [
        float((ours - one).abs().max() / one.abs().max().clamp_min(1e-3))
        for ours, one in zip((value, *grads), joined, strict=True)
    ]


def check_every_loss(rank, world, gather=True):
    for name, loss in {**LOSSES, **(SOFTMAX if gather is True else {})}.items():
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
            for temperature in (0.3, 0.02):
                error = max(errors(loss, dtype, temperature, rank, world, gather))
                # float32's own logits are 1 / temperature large
                allowed = tolerance / min(1.0, 4 * temperature)
                assert error < allowed, (name, dtype, temperature, error)


def count_collectives():
    sent = []
    all_gather = dist.all_gather

    def counted(parts, x):
        sent.append(x.numel() * x.element_size())
        all_gather(parts, x)

    dist.all_gather = counted
    z1, z2 = torch.randn(2, 8, 16, requires_grad=True)
    loss = functional.nt_xent_loss(z1, z2, gather_distributed=True)
    assert sent == [8, 16 * 16 * 4, 16 * 3 * 8], sent  # a count, the embeddings, the row statistics
    loss.backward()
    assert len(sent) == 3, "the backward pass must send nothing"
    dist.all_gather = all_gather


def refuse_unlike_numbers_of_hard_negatives(rank, world):
    z = torch.randn(4, 3)
    listed = ", ".join(str(r + 1) for r in range(world))
    with pytest.raises(ValueError, match=f"hard_negatives must have as many .*; got {listed}"):
        functional.info_nce_loss(
            z, z, hard_negatives=torch.randn(4, rank + 1, 3), gather_distributed=True
        )


def end_one_process(rank):
    if rank != 1:
        z = torch.randn(4, 3)
        with pytest.raises(RuntimeError, match="a process of the group ended"):
            functional.nt_xent_loss(z, z, gather_distributed=True)
    leave_process_group()


def spawn(function, world):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(function, (world, port), world)


def everything(rank, world, port):
    join(rank, world, port)
    count_collectives()
    check_every_loss(rank, world)
    refuse_unlike_numbers_of_hard_negatives(rank, world)
    end_one_process(rank)


@pytest.mark.slow
def test_four_processes():
    spawn(everything, 4)


def test_two_processes():
    spawn(everything, 2)


def test_alone_it_is_the_plain_loss():
    z1, z2 = torch.randn(2, 5, 3)
    gathered = functional.nt_xent_loss(z1, z2, gather_distributed=True)
    assert torch.equal(gathered, functional.nt_xent_loss(z1, z2))
