"""What the in-batch losses share between their argument checks and the op."""

import torch
from torch import Tensor

from cosloss.distributed import peers as find_peers
from cosloss.kernels.dispatch import wants_triton
from cosloss.kernels.eager.tile_loss import TileLoss
from cosloss.kernels.eager.tiles import Excluded, Positives
from cosloss.kernels.eager.walk import Matrix
from cosloss.ops import in_batch, unit_pairs, unit_rows
from cosloss.ops.gathered import Everyone, gathered
from cosloss.ops.transformed import transformed


def unit(z: Tensor) -> Tensor:
    """Unit rows of z in at least float32."""
    return unit_rows(_wide(z))


def logit_rows(z: Tensor, temperature: float | Tensor) -> Tensor:
    """Rows whose products are logits: unit rows over the square root of the temperature."""
    if isinstance(temperature, Tensor):
        return unit(z) * temperature**-0.5
    return unit_rows(_wide(z), temperature**-0.5)


def logit_pairs(z1: Tensor, z2: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """The same of z1's rows and then z2's, (2N, D), and each row's logit with its pair, (2N,)."""
    dtype = torch.promote_types(z1.dtype, z2.dtype)
    z1, z2 = _wide(z1.to(dtype)), _wide(z2.to(dtype))
    if isinstance(temperature, Tensor):
        u, products = unit_pairs(z1, z2)
        return u * temperature**-0.5, products / temperature
    return unit_pairs(z1, z2, temperature**-0.5)


def _wide(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))


def largest_logit(temperature: float | Tensor) -> float:
    """A bound on |similarity / temperature|, as far as it is known without waiting for a device."""
    if isinstance(temperature, Tensor):
        if temperature.device.type != "cpu" or transformed(temperature):
            return torch.inf
        temperature = float(temperature.detach())
    return 1.001 / temperature


def excluded(diagonals: tuple[int, ...], ignore: Tensor | None, copies: int) -> Excluded:
    """The pairs that are no negatives: those on the diagonals, or those of one group of items.

    ignore: one id per item, or None; row i of the matrix shows item i modulo their number.
    """
    if ignore is None:
        return Excluded(diagonals)
    groups = ignore.repeat(copies)
    return Excluded(groups=(groups, groups))


def gathered_batch(
    r: Tensor, c: Tensor | None, ignore: Tensor | None, *, views: int, reduction: str
) -> Everyone | None:
    """The rows and columns of all processes, or None where there is only this one.

    views: rows of r per item. The embeddings of both sides travel in one collective.
    """
    peers = find_peers(r.shape[0] // views, r.device)
    if peers is None:
        return None
    if reduction == "none":
        raise ValueError(
            "gather_distributed gives one number, the joined batch's: reduction must "
            "be mean or sum; got 'none'"
        )
    sent = r if c is None else torch.cat([r, c], 1)
    rows = peers.gather(sent.to(_product_dtype(r, r.dtype)))
    columns = None if c is None else rows[:, r.shape[1] :]
    if ignore is None:
        own, all_groups = peers.item_ids(views, r.device)
    else:
        own = ignore.repeat(views)
        all_groups = peers.gather(own)
    return Everyone(peers, rows[:, : r.shape[1]], columns, own, all_groups)


def loss_of_rows(
    r: Tensor,
    c: Tensor | None,
    positive: Tensor,
    loss: TileLoss,
    pairs: Excluded,
    *,
    two_way: bool,
    dtype: torch.dtype,
    reduction: str,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    positives: Positives | None = None,
    everyone: Everyone | None = None,
) -> Tensor:
    """The reduced loss of the rows, for embeddings of that dtype.

    weight: one per item; the items repeat along the losses.
    positives: where the positive is the mean of several.
    """
    matrix = Matrix(loss, pairs, two_way, _product_dtype(r, dtype), positives)
    rows = positive.shape[0]
    if weight is not None:
        weight = weight.to(r.dtype)
        weight = weight.repeat(rows // weight.shape[0])
    dtype = r.dtype if torch.is_autocast_enabled(r.device.type) else dtype
    if everyone is not None:
        weights = positive.new_ones(rows) if weight is None else weight.detach()
        if reduction == "mean":
            own, total = everyone.peers.items[everyone.peers.rank], sum(everyone.peers.items)
            weights = weights / (rows // own * total)
        return gathered(r, c, positive, weights, bias, matrix, everyone).to(dtype)
    if reduction == "none" or (weight is not None and weight.requires_grad):
        each = in_batch(r, c, positive, None, bias, matrix)
        each = each if weight is None else each * weight
        return (each if reduction == "none" else getattr(each, reduction)()).to(dtype)
    share = 1 / rows if reduction == "mean" else 1.0
    shares = share if weight is None else weight * share
    return in_batch(r, c, positive, shares, bias, matrix).to(dtype)


def _product_dtype(r: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the matrix products for unit rows r of inputs in `dtype`."""
    kind = r.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        if dtype is torch.bfloat16:
            return dtype
    if dtype in (torch.bfloat16, torch.float16) and wants_triton(r):
        return dtype  # its logits and weights are in float32 all the same
    return r.dtype  # float16 holds neither exp(40) nor a weight of 1e-8: it is not used
