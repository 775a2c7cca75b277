"""The adapters beside what each library computes, written out; values and gradients."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from cosloss import NTXentLoss, SupConLoss, adapters
from experiments.simclr.program.processes import leave_process_group
from tests.test_distributed import join, spawn


def leaves(*shape, count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, *shape, dtype=torch.float64, generator=generator)
    return [x.requires_grad_() for x in drawn]


def scalar(number):
    return torch.tensor(number, dtype=torch.float64, requires_grad=True)


def assert_same(ours, theirs, tensors):
    values = ours(*tensors), theirs(*tensors)
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(0.7 * v, tensors) for v in values))


def clip(image, text, scale):
    logits = scale * normalize(image) @ normalize(text).T
    own = torch.arange(len(image))
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


def sig_lip(image, text, scale, bias):
    logits = scale * normalize(image) @ normalize(text).T + bias
    sign = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return -logsigmoid(sign * logits).sum() / len(image)


def test_open_clips_losses():
    image, text = leaves(12, 8)
    scale, bias = scalar(14.3), scalar(-6.0)
    assert_same(adapters.ClipLoss(), clip, [image, text, scale])
    assert_same(adapters.SigLipLoss(), sig_lip, [image, text, scale, bias])
    biased = adapters.ClipLoss()(image, text, scale, bias)
    torch.testing.assert_close(biased, clip(image, text, scale))
    unbiased = adapters.SigLipLoss()(image, text, 14.3)
    torch.testing.assert_close(unbiased, sig_lip(image, text, 14.3, 0.0))
    for loss in (adapters.ClipLoss(), adapters.SigLipLoss()):
        told = loss(image, text, scale, bias, output_dict=True)
        assert told == {"contrastive_loss": loss(image, text, scale, bias)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_scale_in_half_precision_is_inverted_in_float32(dtype):
    image, text = (x.detach().to(dtype) for x in leaves(12, 8))
    scale = torch.tensor(99.0, dtype=dtype)
    wide = clip(image.double(), text.double(), 99.0)
    found = adapters.ClipLoss()(image, text, scale)
    assert abs(found.double() - wide) < 0.02 * wide


def sup_contrast(features, labels=None, temperature=0.07, base_temperature=0.07):
    """Khosla's own code in words: anchors of all views, the mean over their positives."""
    n, views = features.shape[:2]
    labels = torch.arange(n) if labels is None else labels
    z = normalize(torch.cat(features.flatten(2).unbind(1)), dim=1)
    classes = labels.repeat(views)
    logits = z @ z.T / temperature
    itself = torch.eye(n * views, dtype=torch.bool)
    log_probability = logits - logits.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    positive = (classes[:, None] == classes) & ~itself
    losses = -(log_probability * positive).sum(1) / positive.sum(1)
    return (temperature / base_temperature * losses).mean()


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("labels", [None, torch.arange(10) % 3])
@pytest.mark.parametrize("temperatures", [(0.07, 0.07), (0.5, 0.07)], ids=str)
def test_sup_contrast(views, labels, temperatures):
    (features,) = leaves(10, views, 4, 2, count=1)
    loss = adapters.SupContrastLoss(*temperatures)
    assert_same(
        lambda x: loss(x, labels),
        lambda x: sup_contrast(x, labels, *temperatures),
        [features],
    )


def test_simclrs_tensorflow_objective_is_the_sum_of_both_views():
    """It adds the two views' means, where NT-Xent's paper has the mean of all."""
    z1, z2 = leaves(12, 8)

    def theirs(z1, z2):
        a, b, n = normalize(z1), normalize(z2), len(z1)
        large = torch.eye(n, dtype=z1.dtype) * 1e9
        own = torch.arange(n)
        of_a = cross_entropy(torch.cat([a @ b.T / 0.5, a @ a.T / 0.5 - large], 1), own)
        of_b = cross_entropy(torch.cat([b @ a.T / 0.5, b @ b.T / 0.5 - large], 1), own)
        return of_a + of_b

    assert_same(lambda *z: 2 * NTXentLoss(0.5)(*z), theirs, [z1, z2])


def test_metric_learnings_call():
    (z,) = leaves(12, 8, count=1)
    labels = torch.arange(12) % 4
    wrapped = adapters.MetricLearningLoss(SupConLoss(0.1, learnable_temperature=True))
    torch.testing.assert_close(wrapped(z, labels, None), SupConLoss(0.1)(z, labels))
    assert len([*wrapped.parameters()]) == 1


def in_processes(rank, world, port):
    join(rank, world, port)
    image, text = leaves(10, 8)
    scale, rows = scalar(9.0), slice(0, 7) if rank == 0 else slice(7, 10)
    losses = [
        (adapters.ClipLoss, clip, [scale]),
        (adapters.SigLipLoss, sig_lip, [scale, scalar(-2.0)]),
    ]
    for (adapter, theirs, more), gather in itertools.product(losses, (True, "ring")):
        ours = adapter(gather_distributed=gather)
        value = ours(image[rows], text[rows], *more)
        torch.testing.assert_close(value, theirs(image, text, *more))
        own = torch.autograd.grad(value, image)[0][rows] / world
        torch.testing.assert_close(
            own, torch.autograd.grad(theirs(image, text, *more), image)[0][rows]
        )
    leave_process_group()


def test_in_two_processes_they_are_the_joined_batchs():
    spawn(in_processes, 2)


Z = torch.ones(4, 3)
BAD = {
    "logit_scale must be positive; got -1.0": lambda: adapters.ClipLoss()(Z, Z, -1.0),
    "logit_scale must be a number or a 0-d tensor; got 'x'": lambda: adapters.ClipLoss()(Z, Z, "x"),
    "gather_distributed must be True, False or 'ring'; got 1": lambda: adapters.SigLipLoss(1),
    "scale must be positive; got 0": lambda: adapters.MultipleNegativesRankingLoss(
        nn.Identity(), 0
    ),
    "of two columns or more.*; got 1": lambda: adapters.MultipleNegativesRankingLoss(nn.Identity())(
        [{"sentence_embedding": Z}]
    ),
    r"features must have shape \(N, V, D\).*got \(4, 3\)": lambda: adapters.SupContrastLoss()(Z),
    "features must be a Tensor; got a list": lambda: adapters.SupContrastLoss()([1.0]),
    r"labels must have shape \(4,\); got": lambda: adapters.SupContrastLoss()(
        torch.ones(4, 2, 3), torch.ones(8)
    ),
    "mask is not taken.*use labels": lambda: adapters.SupContrastLoss()(
        torch.ones(4, 2, 3), mask=torch.eye(4)
    ),
    "base_temperature must be positive": lambda: adapters.SupContrastLoss(0.1, -1.0),
    "indices_tuple must be None": lambda: adapters.MetricLearningLoss(SupConLoss())(
        Z, torch.arange(4), (Z, Z, Z)
    ),
    "loss must be a function or a module; got 3": lambda: adapters.MetricLearningLoss(3),
}


@pytest.mark.parametrize("message", BAD)
def test_a_mistake_gets_one_line(message):
    with pytest.raises((TypeError, ValueError), match=message) as error:
        BAD[message]()
    assert "\n" not in str(error.value)
