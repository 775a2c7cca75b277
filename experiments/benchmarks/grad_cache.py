"""A step with gradient caching beside the plain one: its time, and its memory over the batch."""

import torch
from torch import nn

from cosloss import GradCache, NTXentLoss
from experiments.benchmarks.measure import measure
from experiments.simclr.encoders import ProjectionHead, SmallConvNet

CHUNK = 64
BATCHES = (64, 256, 1024)
LARGEST_RATIO = 1.35


def run(rounds: int) -> bool:
    """Print the table; whether every cached step takes at most LARGEST_RATIO of the plain one."""
    torch.manual_seed(0)
    encoder = SmallConvNet(norm="group")
    network = nn.Sequential(encoder, ProjectionHead(encoder.num_features, 256, 64, norm="group"))
    loss = NTXentLoss(0.1)
    cached = GradCache(network, loss, chunk_size=CHUNK)
    print(f"NT-Xent, a small convolutional encoder, 32 x 32, chunks of {CHUNK}; MiB at the peak")
    print(f"{'batch':>8}{'plain, ms':>12}{'cached, ms':>12}{'ratio':>8}{'plain':>10}{'cached':>10}")
    ratios = []
    for batch in BATCHES:
        x1, x2 = torch.randn(2, batch, 3, 32, 32)
        contenders = {
            "plain": lambda x1=x1, x2=x2: loss(network(x1), network(x2)).backward(),
            "cached": lambda x1=x1, x2=x2: cached(x1, x2).backward(),
        }
        plain, chunked = measure(contenders, rounds).values()
        ratios.append(chunked.median / plain.median)
        print(
            f"{batch:>8}{plain.median:>12.0f}{chunked.median:>12.0f}{ratios[-1]:>8.2f}"
            f"{plain.memory:>10.0f}{chunked.memory:>10.0f}"
        )
    return max(ratios) <= LARGEST_RATIO
