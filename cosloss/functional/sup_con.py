"""Supervised contrastive loss: all rows of a row's class are its positives."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cosloss.criteria import DecoupledCrossEntropy
from cosloss.functional._checks import (
    as_number,
    check_floating,
    check_groups,
    check_reduction,
    check_rows,
    check_temperature,
    check_tensor,
    check_weight,
)
from cosloss.functional._in_batch import gathered_batch, largest_logit, logit_rows, loss_of_rows
from cosloss.modes import differentiates_itself, readable
from cosloss.notices import warn_once
from cosloss.ops.gathered import Everyone
from cosloss.problem import Mask, PositiveMask


def sup_con_loss(
    z: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    *,
    ignore: Int[Tensor, " n"] | None = None,
    weight: Float[Tensor, " n"] | None = None,
    gather_distributed: bool = False,
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
            averaging so is every gradient. Needs reduction "mean" or "sum", and no `ignore`.

    Returns:
        The loss, a scalar unless reduction is "none"; float32 under autocast. A row without a
        positive has loss 0 and counts only as the others' negative; without any positive the mean
        is 0. A zero row has similarity 0 with every row, and gradient 0. A NaN or an infinity makes
        every loss NaN.

    Raises:
        TypeError: z is not a real floating-point tensor.
        ValueError: rows have no columns, or shapes do not match,
            the batch is empty, temperature is not positive, reduction
            is invalid, or ignore comes with gather_distributed.

    Example:
        >>> sup_con_loss(torch.eye(3), torch.tensor([0, 0, 1]), temperature=1.0)
        tensor(0.6931)

    Source: Khosla et al., "Supervised Contrastive Learning", 2020, eq. 2.
    """
    check_reduction(reduction)
    check_floating(z=z)
    check_tensor(labels=labels)
    if z.ndim != 2 or z.shape[0] == 0 or labels.shape != z.shape[:1]:
        raise ValueError(
            "z must have shape (N, D) with N >= 1, and labels shape (N,); "
            f"got {tuple(z.shape)} and {tuple(labels.shape)}"
        )
    check_rows(z=z)
    check_temperature(temperature)
    check_weight(weight, z.shape[0])
    check_groups(ignore, z.shape[0])
    if gather_distributed and ignore is not None:
        raise ValueError("gather_distributed takes no ignore in this loss: leave one of them out")
    temperature = as_number(temperature, z.dtype)
    r = logit_rows(z, temperature)
    everyone = None
    if gather_distributed:
        everyone = gathered_batch(
            r, None, None, views=1, reduction=reduction, temperature=temperature
        )
    if everyone is not None:
        return _across_processes(r, labels, temperature, reduction, weight, everyone).to(z.dtype)
    siblings, count, classes = _class_sums(r, labels)
    _warn_without_positives(count)
    at_least_one = count.clamp_min(1)
    has_positive = (count > 0).to(r.dtype)
    share = has_positive if weight is None else has_positive * weight
    if reduction == "mean":
        share = share / has_positive.sum().clamp_min(1)
    return loss_of_rows(
        r,
        None,
        (r * siblings).sum(1) / at_least_one,
        DecoupledCrossEntropy(largest_logit(temperature)),
        _excluded(classes, ignore),
        two_way=True,
        dtype=z.dtype,
        reduction="none" if reduction == "none" else "sum",
        weight=share,
        positives=PositiveMask(classes, classes, at_least_one),
    )


def rows_without_positive(labels: Int[Tensor, " n"]) -> Int[Tensor, ""]:
    """How many rows share their label with no other row.

    Example:
        >>> rows_without_positive(torch.tensor([0, 0, 1]))
        tensor(1)
    """
    with torch.inference_mode(False), torch.no_grad():
        return (labels.unique(return_counts=True)[1] == 1).sum()


def _excluded(classes: Tensor, ignore: Tensor | None) -> Mask:
    """Every row itself, and the pairs of one group whose classes differ."""
    if ignore is None:
        return Mask((0,))
    return Mask((0,), groups=(ignore, ignore), classes=(classes, classes))


def _across_processes(
    r: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    reduction: str,
    weight: Tensor | None,
    everyone: Everyone,
) -> Tensor:
    """The joined batch's loss."""
    peers = everyone.peers
    all_labels = peers.gather(labels)
    first = sum(peers.items[: peers.rank])
    own = slice(first, first + r.shape[0])
    rows = everyone.rows.to(r.dtype)
    siblings, count, classes = _class_sums(rows, all_labels)
    _warn_without_positives(count)
    at_least_one = count[own].clamp_min(1)
    has_positive = (count > 0).to(r.dtype)
    share = has_positive[own] if weight is None else has_positive[own] * weight
    if reduction == "mean":
        share = share / has_positive.sum().clamp_min(1)
    return loss_of_rows(
        r,
        None,
        (rows[own] * siblings[own]).sum(1) / at_least_one,
        DecoupledCrossEntropy(largest_logit(temperature)),
        Mask((0,)),
        two_way=True,
        dtype=r.dtype,
        reduction="sum",
        weight=share,
        positives=PositiveMask(classes[own], classes, at_least_one),
        everyone=everyone,
    )


def _warn_without_positives(count: Tensor) -> None:
    if readable(count) and not count.any():
        warn_once("no two labels of the batch are equal: without positives SupCon's loss is 0")


def _class_sums(r: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each row the sum of its class's other rows, (N, D), their number, and the class's id."""
    if differentiates_itself(r, labels):
        # without indices that depend on the labels' values, at the cost of an (N, N) mask
        same = (labels == labels[:, None]).to(r.dtype)
        return same @ r - r, same.sum(1) - 1, labels
    _, group, sizes = labels.unique(return_inverse=True, return_counts=True)
    sums = r.new_zeros(sizes.shape[0], r.shape[1]).index_add(0, group, r)
    return sums.index_select(0, group) - r, sizes[group].to(r.dtype) - 1, group
