"""What the in-batch losses share between their argument checks and the op."""

import torch
from torch import Tensor

from cosloss.criteria import Criterion
from cosloss.distributed import peers as find_peers
from cosloss.functional._checks import as_number, refuse_tracing
from cosloss.kernels.dispatch import wants_triton
from cosloss.modes import autocast_dtype, readable
from cosloss.notices import warn_once
from cosloss.ops import in_batch, in_batch_pairs, unit_pairs, unit_rows
from cosloss.ops.gathered import Everyone, gathered
from cosloss.problem import Mask, PositiveMask, Problem


def logit_rows(z: Tensor, temperature: float | Tensor) -> Tensor:
    """Rows whose products are logits: unit rows over the square root of the temperature."""
    if isinstance(temperature, Tensor):
        return unit_rows(z) * temperature**-0.5
    return unit_rows(z, temperature**-0.5)


def logit_pairs(z1: Tensor, z2: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """The same of z1's rows and then z2's, (2N, D), and each row's logit with its pair, (2N,)."""
    if isinstance(temperature, Tensor):
        u, products = unit_pairs(z1, z2)
        return u * temperature**-0.5, products / temperature
    return unit_pairs(z1, z2, temperature**-0.5)


def largest_logit(temperature: float | Tensor) -> float:
    """A bound on |similarity / temperature|, as far as it is known without waiting for a device."""
    if isinstance(temperature, Tensor):
        if not readable(temperature):
            return torch.inf
        temperature = float(temperature.detach())
    return 1.001 / temperature


def excluded(diagonals: tuple[int, ...], ignore: Tensor | None, copies: int) -> Mask:
    """The pairs that are no negatives: those on the diagonals, or those of one group of items.

    ignore: one id per item, or None; row i of the matrix shows item i modulo their number.
    """
    if ignore is None:
        return Mask(diagonals)
    groups = ignore.repeat(copies)
    return Mask(groups=(groups, groups))


def gathered_batch(
    r: Tensor,
    c: Tensor | None,
    ignore: Tensor | None,
    *,
    views: int,
    reduction: str,
    **scalars: float | Tensor,
) -> Everyone | None:
    """The rows and columns of all processes, or None where there is only this one.

    views: rows of r per item. The embeddings of both sides travel in one collective.
    scalars: the loss's temperature and bias, which must be equal in all processes.
    """
    peers = find_peers(r.shape[0] // views, r.device, **scalars)
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


def warn_without_negatives(items: int, ignore: Tensor | None, everyone: Everyone | None) -> None:
    """Warn once of a batch in which no row has a negative: its loss is 0, and so is its gradient.

    That is seen from a batch of one, and from the groups where no device has to be waited for.
    """
    if everyone is not None:
        items, ignore = sum(everyone.peers.items), None
    if torch.compiler.is_compiling():  # it would become a guard on the batch's size
        return
    if items == 1:
        warn_once("a batch of one item has no negatives: its contrastive loss is 0, not a success")
    elif ignore is not None and readable(ignore) and bool((ignore == ignore[0]).all()):
        warn_once("all items are of one group in ignore: without negatives the loss is 0")


def loss_of_pairs(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor,
    loss: Criterion,
    *,
    joined: bool,
    two_way: bool,
    reduction: str,
    ignore: Tensor | None,
    weight: Tensor | None,
    gather_distributed: bool,
    bias: float | Tensor | None = None,
) -> Tensor:
    """The reduced loss of two views, each row's positive the other view's row of the same item.

    joined: whether all rows of both are compared with all, or z1's rows with z2's.
    """
    refuse_tracing()
    dtype = torch.promote_types(z1.dtype, z2.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    z1, z2, n = z1.to(dtype), z2.to(dtype), z1.shape[0]
    temperature = as_number(temperature, dtype)
    if bias is not None:
        bias = as_number(bias, dtype)
        bias = bias.to(wide) if isinstance(bias, Tensor) else z1.new_tensor(bias, dtype=wide)
    pairs = excluded((0, n, -n), ignore, copies=2) if joined else excluded((0,), ignore, copies=1)
    losses = 2 * n if two_way else n
    shares = _shares(weight, losses, wide, reduction)
    if bias is None and not gather_distributed:  # a pair's sigmoid loss needs no negative
        warn_without_negatives(n, ignore, None)
    if shares is not None and not gather_distributed and not isinstance(temperature, Tensor):
        matrix = Problem(loss, pairs, two_way, _product_dtype(z1, dtype))
        found = in_batch_pairs(z1, z2, temperature**-0.5, shares, bias, matrix, joined)
        if found is not None:
            return found.to(_out_dtype(z1, dtype))
    both, positive = logit_pairs(z1, z2, temperature)
    r, c = (both, None) if joined else (both[:n], both[n:])
    positive = positive[:losses]
    everyone = None
    if gather_distributed:
        scalars = {"temperature": temperature} | ({} if bias is None else {"bias": bias})
        views = 2 if joined else 1
        everyone = gathered_batch(r, c, ignore, views=views, reduction=reduction, **scalars)
        if bias is None:
            warn_without_negatives(n, ignore, everyone)
    return loss_of_rows(
        r,
        c,
        positive if bias is None else positive + bias,
        loss,
        pairs,
        two_way=two_way,
        dtype=dtype,
        reduction=reduction,
        weight=weight,
        bias=bias,
        everyone=everyone,
    )


def loss_of_rows(
    r: Tensor,
    c: Tensor | None,
    positive: Tensor,
    loss: Criterion,
    pairs: Mask,
    *,
    two_way: bool,
    dtype: torch.dtype,
    reduction: str,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    positives: PositiveMask | None = None,
    everyone: Everyone | None = None,
) -> Tensor:
    """The reduced loss of the rows, for embeddings of that dtype.

    weight: one per item; the items repeat along the losses.
    positives: where the positive is the mean of several.
    """
    refuse_tracing()
    matrix = Problem(loss, pairs, two_way, _product_dtype(r, dtype), positives)
    rows = positive.shape[0]
    dtype = _out_dtype(r, dtype)
    if everyone is not None:
        weights = positive.new_ones(rows)
        if weight is not None:
            weights = _each(weight, rows, r.dtype).detach()
        if reduction == "mean":
            own, total = everyone.peers.items[everyone.peers.rank], sum(everyone.peers.items)
            weights = weights / (rows // own * total)
        return gathered(r, c, positive, weights, bias, matrix, everyone).to(dtype)
    shares = _shares(weight, rows, r.dtype, reduction)
    if shares is not None:
        return in_batch(r, c, positive, shares, bias, matrix).to(dtype)
    each = in_batch(r, c, positive, None, bias, matrix)
    each = each if weight is None else each * _each(weight, rows, r.dtype)
    return (each if reduction == "none" else getattr(each, reduction)()).to(dtype)


def _shares(
    weight: Tensor | None, losses: int, dtype: torch.dtype, reduction: str
) -> Tensor | float | None:
    """What each loss is multiplied by in the reduced one; None if that is not a constant sum."""
    if reduction == "none" or (weight is not None and weight.requires_grad):
        return None
    share = 1 / losses if reduction == "mean" else 1.0
    return share if weight is None else _each(weight, losses, dtype) * share


def _each(weight: Tensor, losses: int, dtype: torch.dtype) -> Tensor:
    """The items' weights as the losses'."""
    return weight.to(dtype).repeat(losses // weight.shape[0])


def _out_dtype(z: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The loss's, of embeddings in `dtype`: float32 under autocast."""
    wide = torch.promote_types(dtype, torch.float32)
    return dtype if autocast_dtype(z) is None else wide


def _product_dtype(z: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the matrix products for unit rows of inputs in `dtype`, on z's device."""
    autocast = autocast_dtype(z)
    if autocast is not None and dtype != torch.float64:  # which torch.autocast leaves alone
        dtype = autocast
        if dtype == torch.bfloat16:
            return dtype
    if dtype in (torch.bfloat16, torch.float16) and wants_triton(z):
        return dtype  # its logits and weights are in float32 all the same
    # float16 holds neither exp(40) nor a weight of 1e-8: it is not used
    return torch.promote_types(z.dtype, torch.float32)
