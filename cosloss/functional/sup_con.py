"""Supervised contrastive loss: all rows of a row's class are its positives."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cosloss.arguments import check_device, check_tensor, described
from cosloss.criteria import DecoupledCrossEntropy
from cosloss.distributed import Gather
from cosloss.functional._checks import (
    as_number,
    check_floating,
    check_rows,
    check_temperature,
    to_ids,
)
from cosloss.functional._in_batch import Options, item_mask, largest_logit, reduced_loss
from cosloss.modes import differentiates_itself, readable
from cosloss.notices import warn_once
from cosloss.problem import ALL, Mask, PositiveMask, Problem


def sup_con_loss(
    z: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    *,
    ignore: Int[Tensor, " n"] | None = None,
    weight: Float[Tensor, " n"] | None = None,
    gather_distributed: Gather = False,
    dims: Sequence[int] | None = None,
    dim_weights: Sequence[float] | None = None,
) -> Float[Tensor, "..."]:
    """SupCon, the contrastive loss with several positives per row (the paper's L_out).

    l_i = mean_{p in P(i)} [ -S_ip / temperature + log sum_{a != i} exp(S_ia / temperature) ]

    with S the cosine similarities and P(i) the other rows of row i's class. Memory is O(N D).

    Args:
        z: (N, D), floating point; rows need not be normalised. Views are rows of their own.
        labels: (N,), the class of each row.
        temperature: positive; a number or a tensor of one, which may require a gradient.
        reduction: "none" gives (N,); "sum" and "mean" are over the rows that have a positive.
        ignore: (N,), one group id per row; rows of the same group are not negatives. Of one class,
            they are positives all the same.
        weight: (N,), multiplies each loss before the reduction; "mean" still divides by the number
            of rows that have a positive.
        gather_distributed: take negatives from all processes of the default group, whose batches
            may differ in size. The loss is the joined batch's in every process, and after DDP's
            averaging so is every gradient. "ring" passes the rows on from process to process, in
            the backward pass again, and no process holds all. Needs reduction "mean" or "sum", and
            no `ignore`.
        dims: sum the losses of the embeddings' first columns, so many at a time, each normalised by
            itself (Matryoshka); at most D.
        dim_weights: what each of those losses is multiplied by; 1 by default.

    Returns:
        The loss, a scalar unless reduction is "none"; float32 under autocast. A row without a
        positive has loss 0 and counts only as the others' negative; without any positive the mean
        is 0. A zero row has similarity 0 with every row, and gradient 0. A NaN or an infinity makes
        every loss NaN.

    Raises:
        TypeError: z is not a real floating-point tensor, labels no tensor, or an option of another
            kind.
        ValueError: rows have no columns, shapes do not match, tensors are on two devices,
            the batch is empty, temperature is not positive and finite, reduction
            is invalid, or ignore comes with gather_distributed.

    Example:
        >>> sup_con_loss(torch.eye(3), torch.tensor([0, 0, 1]), temperature=1.0)
        tensor(0.6931)

    Source: Khosla et al., "Supervised Contrastive Learning", 2020, eq. 2; dims: Kusupati et al.,
    "Matryoshka Representation Learning", 2022, eq. 1.
    """
    options = Options(reduction, ignore, weight, gather_distributed, dims, dim_weights)
    check_floating(z=z)
    _check_labels(z, labels)
    check_rows(z=z)
    check_temperature(temperature, z)
    options.check(z)
    if gather_distributed and ignore is not None:
        raise ValueError("gather_distributed takes no ignore in this loss: leave one of them out")
    temperature = as_number(temperature, z.dtype)
    peers, own = options.peers(z, temperature=temperature), ALL
    if peers is not None:
        labels, own = peers.gather(labels), peers.own
    classes, count = _classes(z, labels)
    if readable(count) and not count.any():
        warn_once("no two labels of the batch are equal: without positives SupCon's loss is 0")
    has_positive = (count > 0).to(torch.promote_types(z.dtype, torch.float32))
    share = has_positive[own] if weight is None else has_positive[own] * weight
    if reduction == "mean":
        share = share / has_positive.sum().clamp_min(1)
        options = options._replace(reduction="sum")
    mask = item_mask(z, 1, None, peers)
    if ignore is not None:  # a group's rows of one class are positives
        mask = Mask((0,), groups=(ignore, ignore), classes=(classes, classes))
    positives = PositiveMask(classes[own], classes, count[own].clamp_min(1))
    problem = Problem(
        DecoupledCrossEntropy(largest_logit(temperature)),
        mask,
        column_losses=True,
        self_similarity=True,
        positives=positives if peers is None else positives.of_rows(),
    )
    rows = z, None, None
    return reduced_loss(rows, problem, options._replace(weight=share), temperature, peers=peers)


def rows_without_positive(labels: Int[Tensor, " n"]) -> Int[Tensor, ""]:
    """How many rows share their label with no other row.

    Args:
        labels: (N,), the class of each row.

    Returns:
        The number, a 0-d int64 tensor on the device of labels.

    Raises:
        TypeError: labels is not a tensor.
        ValueError: labels is not of shape (N,), or complex.

    Example:
        >>> rows_without_positive(torch.tensor([0, 0, 1]))
        tensor(1)
    """
    check_tensor(labels=labels)
    if labels.ndim != 1 or labels.is_complex():
        advice = to_ids("labels", labels)
        raise ValueError(
            f"labels must hold a class id per row, shape (N,); got {described(labels)}{advice}"
        )
    with torch.inference_mode(False), torch.no_grad():
        return (labels.unique(return_counts=True)[1] == 1).sum()


def _check_labels(z: Tensor, labels: Tensor) -> None:
    """Raise unless z is (N, D) with N >= 1, and labels holds an integer for each row."""
    check_tensor(labels=labels)
    if z.ndim != 2 or z.shape[0] == 0:
        several = (
            ": of views (N, V, D) give z.flatten(0, 1) and labels.repeat_interleave(V)"
            if z.ndim == 3
            else ""
        )
        raise ValueError(f"z must have shape (N, D) with N >= 1; got {tuple(z.shape)}{several}")
    if labels.shape != z.shape[:1] or labels.is_complex():
        raise ValueError(
            f"labels must hold a class id per row of z, shape ({z.shape[0]},); "
            f"got {described(labels)}{to_ids('labels', labels)}"
        )
    if z.device != labels.device:
        check_device("z", z, "labels", labels)


def _classes(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """An id for each row's class, and the number of the class's other rows."""
    if differentiates_itself(z, labels):
        # not numbered from 0: that would take indices that depend on the labels' values
        return labels, (labels == labels[:, None]).sum(1) - 1
    _, ids, sizes = labels.unique(return_inverse=True, return_counts=True)
    return ids, sizes[ids] - 1
