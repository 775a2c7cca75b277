"""Gradient caching: the gradient of the whole batch, with activations of a chunk."""

import json

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cosloss import GradCache, InfoNCELoss, NTXentLoss, SupConLoss, encode_in_chunks, functional
from experiments.benchmarks.measure import peak_memory
from experiments.simclr.program.processes import leave_process_group
from tests.test_distributed import join, spawn

LOSSES = {
    "nt_xent": NTXentLoss(0.2),
    "learnable": NTXentLoss(0.2, learnable_temperature=True),
    "symmetric": InfoNCELoss(0.2, symmetric=True),
    "each": lambda a, b: functional.nt_xent_loss(a, b, 0.2, "none").square().sum(),
}


def encoder(dtype=torch.float64, p=0.3):
    torch.manual_seed(0)
    layers = nn.Linear(6, 32), nn.GELU(), nn.Dropout(p), nn.LayerNorm(32), nn.Linear(32, 8)
    return nn.Sequential(*layers).to(dtype)


def views(n, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, n, 6, dtype=torch.float64, generator=generator).to(dtype)


def gradients(loss, *modules):
    parameters = [p for m in modules if isinstance(m, nn.Module) for p in m.parameters()]
    torch.manual_seed(3)
    return torch.autograd.grad(loss(), parameters)


def pieces(net, x, size):
    return torch.cat([net(part) for part in x.split(size)])


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_the_same_chunks_with_their_activations_bit_for_bit(name):
    net, loss, (x1, x2) = encoder(), LOSSES[name], views(22)
    plain = gradients(lambda: loss(pieces(net, x1, 5), pieces(net, x2, 5)), net, loss)
    step = GradCache(net, loss, chunk_size=5)
    found = gradients(lambda: step(x1, x2), net, loss)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_the_gradient_is_that_of_the_whole_batch(dtype, tolerance):
    net, loss, (x1, x2) = encoder(dtype, p=0.0), NTXentLoss(0.2), views(22, dtype)
    plain = gradients(lambda: loss(net(x1), net(x2)), net)
    for size in (1, 5, 22, 100):
        step = GradCache(net, loss, chunk_size=size)
        found = gradients(lambda step=step: step(x1, x2), net)
        for a, b in zip(found, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    if dtype == torch.float64:  # one chunk is the plain step
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_dropout_is_drawn_once_for_both_passes_and_anew_in_the_next_step():
    net, x = encoder(p=0.5), views(8)[0]
    torch.manual_seed(5)
    z = encode_in_chunks(net, x, 3)
    state = torch.get_rng_state()
    z.sum().backward()
    assert torch.equal(torch.get_rng_state(), state), "what follows draws as without caching"
    assert not torch.equal(z, encode_in_chunks(net, x, 3))


def test_a_wrong_draw_in_the_backward_pass_is_caught():
    own = torch.Generator().manual_seed(0)

    class Noisy(nn.Linear):
        def forward(self, x):
            kept = torch.rand(x.shape, generator=own, dtype=x.dtype) > 0.5
            return super().forward(x * kept)

    z = encode_in_chunks(Noisy(6, 4).double(), views(8)[0], 4)
    with pytest.raises(RuntimeError, match=r"other embeddings.*default generators"):
        z.sum().backward()


def test_weights_that_change_before_the_backward_pass_are_an_error():
    net = encoder()
    loss = GradCache(net, NTXentLoss(), chunk_size=4)(*views(8))
    with torch.no_grad():
        net[0].weight.mul_(1.0001)
    with pytest.raises(RuntimeError, match="weights changed"):
        loss.backward()


def test_two_encoders_with_chunks_of_their_own_and_arguments_of_the_loss():
    image, text, (x1, x2) = encoder(p=0.0), encoder(p=0.0), views(9)
    with torch.no_grad():
        text[0].weight.mul_(-1)
    loss, group = InfoNCELoss(0.3, symmetric=True), torch.arange(9) // 2

    def tokens(ids, mask, scale):
        return text(ids * mask) * scale

    plain = gradients(lambda: loss(image(x1), 2 * text(x2), ignore=group), image, text)
    step = GradCache(image, tokens, loss, chunk_size=(4, 2))
    mask = torch.ones(9, 1, dtype=torch.float64)
    inputs = x1, {"ids": x2, "mask": mask, "scale": 2}
    found = gradients(lambda: step(*inputs, ignore=group), image, text)
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    again = gradients(lambda: step(x1, (x2, mask, 2), ignore=group), image, text)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_labels_reach_the_loss():
    net, x, labels = encoder(p=0.0), views(12)[0], torch.arange(12) % 3
    step = GradCache(net, SupConLoss(0.2), chunk_size=5)
    torch.testing.assert_close(step(x, labels=labels), SupConLoss(0.2)(net(x), labels))


def test_autocast_and_loss_scales_are_those_of_the_plain_step():
    net, loss, (x1, x2) = encoder(torch.float32), NTXentLoss(0.2), views(10, torch.float32)
    step = GradCache(net, loss, chunk_size=4)

    def autocast(run):
        with torch.autocast("cpu", torch.bfloat16):
            value = run()
        return 1024 * value

    plain = gradients(lambda: autocast(lambda: loss(pieces(net, x1, 4), pieces(net, x2, 4))), net)
    found = gradients(lambda: autocast(lambda: step(x1, x2)), net)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_the_second_derivative_is_the_plain_one():
    net, (x1, x2) = encoder(p=0.0), views(6)

    def penalty(loss):
        grads = torch.autograd.grad(loss(), net.parameters(), create_graph=True)
        return sum(g.square().sum() for g in grads)

    loss = NTXentLoss(0.5)
    step = GradCache(net, loss, chunk_size=4)
    plain = gradients(lambda: penalty(lambda: loss(net(x1), net(x2))), net)
    found = gradients(lambda: penalty(lambda: step(x1, x2)), net)
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_without_gradients_every_chunk_is_encoded_once():
    calls = []

    def counted(x):
        calls.append(len(x))
        return x.square()

    x = views(7)[0].requires_grad_()
    with torch.no_grad():
        assert torch.equal(encode_in_chunks(counted, x, 3), x.square())
    assert calls == [3, 3, 1]
    encode_in_chunks(counted, x, 3).sum().backward()
    assert calls[3:] == [3, 3, 1, 1, 3, 3]
    assert torch.equal(x.grad, 2 * x)


def test_activations_of_one_chunk_are_held_at_a_time():
    net = nn.Sequential(nn.Linear(16, 1024), nn.GELU(), nn.Linear(1024, 16))
    step = GradCache(net, lambda a, b: (a * b).sum(), chunk_size=64)

    def peak(n):
        x1, x2 = torch.randn(2, n, 16)
        return 2**20 * peak_memory(lambda: step(x1, x2).backward())

    row = 16 * 4  # bytes of an embedding
    assert peak(4096) - peak(512) < 8 * 2 * (4096 - 512) * row
    step.chunk_sizes = [4096]
    assert peak(4096) > 4096 * 2 * 1024 * 4, "the activations of a view, twice 1024 a row"


def train_in_processes(rank, world, port):
    join(rank, world, port)
    (x1, x2), rows = views(10), [slice(0, 7), slice(7, 10)][rank]
    joined_net, joined_loss = encoder(p=0.0), NTXentLoss(0.2, learnable_temperature=True)
    loss = NTXentLoss(0.2, learnable_temperature=True, gather_distributed=True)
    plain = gradients(lambda: joined_loss(joined_net(x1), joined_net(x2)), joined_net, joined_loss)
    step = GradCache(encoder(p=0.0), loss, chunk_size=2)
    ddp = DistributedDataParallel(step)
    exchanged = []

    def exchange(state, bucket):
        exchanged.append(bucket.buffer().numel())
        future = dist.all_reduce(bucket.buffer().div_(world), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    ddp.register_comm_hook(None, exchange)
    for _ in range(2):
        exchanged.clear()
        ddp.zero_grad()
        ddp(x1[rows], x2[rows]).backward()
        assert sum(exchanged) == sum(p.numel() for p in ddp.parameters()), "once, after all chunks"
        for p, grad in zip(step.parameters(), plain, strict=True):
            torch.testing.assert_close(p.grad, grad, rtol=1e-10, atol=1e-13)
    with pytest.raises(TypeError, match=r"DistributedDataParallel\(GradCache"):
        GradCache(DistributedDataParallel(encoder()), loss, chunk_size=2)
    leave_process_group()


@pytest.mark.slow
def test_in_two_processes_the_gradient_is_the_joined_batchs_and_exchanged_once():
    spawn(train_in_processes, 2)


class Counter(nn.Linear):
    def __init__(self):
        super().__init__(6, 4, dtype=torch.float64)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


BAD = {
    "chunk_size must be a whole number; got '8'": lambda x: GradCache(
        encoder(), NTXentLoss(), chunk_size="8"
    ),
    "chunk_size must be at least 1; got 0": lambda x: encode_in_chunks(encoder(), x, 0),
    "one for each of 1 encoders; got 2": lambda x: GradCache(
        encoder(), NTXentLoss(), chunk_size=(1, 2)
    ),
    "needs an encoder and a loss": lambda x: GradCache(NTXentLoss(), chunk_size=2),
    "encoder must be a function .* got a torch.float64": lambda x: GradCache(
        x, NTXentLoss(), chunk_size=2
    ),
    "loss must be a function .*; got 'nt_xent'": lambda x: GradCache(
        encoder(), "nt_xent", chunk_size=2
    ),
    "needs an input for each of 2 encoders; got 1": lambda x: GradCache(
        encoder(), encoder(), NTXentLoss(), chunk_size=2
    )(x),
    "needs an input": lambda x: GradCache(encoder(), NTXentLoss(), chunk_size=2)(),
    r"of one first dimension; got \(8, 6\), \(7, 6\)": lambda x: encode_in_chunks(
        encoder(), (x, x[1:]), 2
    ),
    "must be a tensor .* got a list": lambda x: encode_in_chunks(encoder(), x.tolist(), 2),
    "inputs must have at least one item": lambda x: encode_in_chunks(encoder(), x[:0], 2),
    r"embeddings \(N, D\); got tuple": lambda x: encode_in_chunks(lambda y: (y, y), x, 2),
    r"2 items; got shape \(6,\)": lambda x: encode_in_chunks(lambda y: y.sum(0), x, 2),
    "BatchNorm1d in training mode.*group or layer norm": lambda x: encode_in_chunks(
        nn.Sequential(encoder(), nn.BatchNorm1d(8, track_running_stats=False).double()), x, 2
    ),
    "its buffer Counter.calls": lambda x: encode_in_chunks(Counter(), x, 2),
}


@pytest.mark.parametrize("message", BAD)
def test_mistakes_are_one_line(message):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message) as error:
        BAD[message](views(8)[0])
    assert "\n" not in str(error.value)


def test_batch_norm_that_uses_stored_statistics_is_fine():
    net, x = nn.Sequential(encoder(p=0.0), nn.BatchNorm1d(8).double()).eval(), views(8)[0]
    assert torch.equal(encode_in_chunks(net, x, 8), net(x))


def test_it_prints_its_parts_and_saves_its_weights():
    step = GradCache(encoder(), NTXentLoss(learnable_temperature=True), chunk_size=4)
    assert "chunk_sizes=[4]" in repr(step)
    assert {"encoders.0.0.weight", "loss.log_temperature"} <= set(step.state_dict())


def test_train_py_encodes_in_chunks_and_its_checks_pass(train, tmp_path):
    smoke = "experiment=simclr_smoke", "model.encoder.norm=group", "trainer.max_epochs=1"
    scores = {}
    for chunk in ("null", "10"):
        run = tmp_path / chunk
        found = train(
            *smoke,
            "callbacks=step_check",
            "callbacks.step_check.every_n_batches=2",
            f"model.grad_cache_chunk={chunk}",
            f"hydra.run.dir={run}",
        )
        assert found.status == 0, found.err
        results = json.loads((run / "results.json").read_text())
        checks = results["gradient_checks/run"], results["gradient_checks/failed"]
        assert checks == (6, 0), "two of the step, four of the loss"
        assert "not checked" not in found.err
        scores[chunk] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    plain, chunked = (scores[chunk]["state_dict"] for chunk in ("null", "10"))
    for name, weight in plain.items():
        torch.testing.assert_close(chunked[name], weight, rtol=1e-3, atol=1e-4)


def test_train_py_refuses_batch_norm_in_chunks(train):
    found = train("experiment=simclr_smoke", "model.grad_cache_chunk=8")
    assert found.status == 2
    assert "choose model.encoder.norm=group" in found.err
    found = train("experiment=simclr_smoke", "model.grad_cache_chunk=0")
    assert "model.grad_cache_chunk must be at least 1; got 0" in found.err
