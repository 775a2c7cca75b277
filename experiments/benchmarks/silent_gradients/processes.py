"""Faults across processes: a step's gradient after the processes' average, against the whole batch.

Each case is a layer and a loss of one process's rows; `whole` is the same of all rows in one
process. Training averages the gradients of all processes, so that average must be the whole's.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.nn import functional as collectives
from torch.nn import functional as F

from experiments.benchmarks.silent_gradients.collectives import (
    ALL,
    LATE,
    LOCAL,
    ROWS,
    WORLD,
    barlow,
    centred,
    gathered,
    keys_gathered,
    local_rows,
    own_slice,
    raw_total,
    scaled,
    sketched,
    sync_norm,
    whole_barlow,
    whole_norm,
    without_gradient,
)
from experiments.benchmarks.silent_gradients.faults.contrastive import info_nce
from experiments.benchmarks.silent_gradients.right.embeddings import nt_xent

GITHUB = "https://github.com"


@dataclass(frozen=True)
class ProcessFault:
    """A fault of a collective: loss(z1, z2) of the local rows, faulty and mended.

    Attributes:
        uneven: whether the second process has half as many rows.
    """

    name: str
    source: str
    kind: str
    faulty: Callable[[Tensor, Tensor], Tensor]
    mended: Callable[[Tensor, Tensor], Tensor]
    whole: Callable[[Tensor, Tensor], Tensor]
    area: str = "contrastive"
    uneven: bool = False


FAULTS = [
    ProcessFault(
        "simclr_keys_gathered_without_gradient",
        f"{GITHUB}/facebookresearch/vissl/pull/123",
        "collective without gradient",
        lambda z1, z2: local_rows(z1, z2, without_gradient),
        keys_gathered,
        info_nce,
    ),
    ProcessFault(
        "barlow_twins_sum_in_place",
        f"{GITHUB}/lightly-ai/lightly/issues/1977",
        "off by 1/world_size",
        lambda z1, z2: barlow(z1, z2, raw_total),
        lambda z1, z2: barlow(z1, z2, collectives.all_reduce),
        whole_barlow,
    ),
    ProcessFault(
        "sketched_regulariser_sum_in_place",
        f"{GITHUB}/lightly-ai/lightly/issues/1920",
        "off by 1/world_size",
        lambda z1, z2: sketched(z1, z2, raw_total, WORLD * ROWS),
        lambda z1, z2: sketched(z1, z2, collectives.all_reduce, WORLD * ROWS),
        lambda z1, z2: sketched(z1, z2, lambda x: x, len(z1)),
    ),
    ProcessFault(
        "gather_returns_its_own_slice",
        f"{GITHUB}/lightly-ai/lightly/issues/1528",
        "own rank's slice",
        lambda z1, z2: local_rows(z1, z2, own_slice),
        keys_gathered,
        info_nce,
    ),
    ProcessFault(
        "late_interaction_loss_not_scaled",
        f"{GITHUB}/lightonai/pylate/pull/111",
        "off by 1/world_size",
        LATE,
        scaled(LATE, WORLD),
        info_nce,
    ),
    ProcessFault(
        "local_loss_scaled_as_if_gathered",
        f"{GITHUB}/lightonai/pylate/pull/156",
        "off by world_size",
        scaled(info_nce, WORLD),
        info_nce,
        lambda z1, z2: (
            sum(info_nce(a, b) for a, b in zip(z1.split(ROWS), z2.split(ROWS), strict=True)) / WORLD
        ),
    ),
    ProcessFault(
        "global_loss_with_gradient_times_the_processes",
        f"{GITHUB}/mlfoundations/open_clip/issues/616",
        "off by world_size",
        scaled(ALL, WORLD),
        ALL,
        nt_xent,
    ),
    ProcessFault(
        "declutr_gather_not_rescaled",
        f"{GITHUB}/JohnGiorgi/DeCLUTR/pull/212",
        "off by 1/world_size",
        LOCAL,
        scaled(LOCAL, WORLD),
        nt_xent,
    ),
    ProcessFault(
        "passages_of_other_ranks_as_constants",
        f"{GITHUB}/NVIDIA-NeMo/Automodel/pull/2283",
        "collective without gradient",
        lambda z1, z2: local_rows(z2, z1, without_gradient),
        lambda z1, z2: local_rows(z2, z1, gathered),
        lambda z1, z2: info_nce(z2, z1),
    ),
    ProcessFault(
        "clip_image_side_gathered_without_gradient",
        f"{GITHUB}/facebookresearch/SLIP/issues/31",
        "collective without gradient",
        lambda z1, z2: local_rows(z1, z2, without_gradient) + local_rows(z2, z1, gathered),
        lambda z1, z2: local_rows(z1, z2, gathered) + local_rows(z2, z1, gathered),
        lambda z1, z2: info_nce(z1, z2) + info_nce(z2, z1),
    ),
    ProcessFault(
        "sync_batch_norm_of_uneven_batches",
        f"{GITHUB}/pytorch/pytorch/pull/36382",
        "wrong mean",
        lambda z1, z2: sync_norm(z1, z2, "mean of means"),
        lambda z1, z2: sync_norm(z1, z2, "sum"),
        whole_norm,
        area="normalisation",
        uneven=True,
    ),
    ProcessFault(
        "mean_of_all_rows_without_gradient",
        f"{GITHUB}/pytorch/pytorch/pull/190419",
        "collective without gradient",
        lambda z1, z2: centred(z1, z2, raw_total),
        lambda z1, z2: centred(z1, z2, collectives.all_reduce),
        lambda z1, z2: F.mse_loss(torch.tanh(z1 - z1.mean(0)), z2),
        area="normalisation",
    ),
]
