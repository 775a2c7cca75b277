"""The in-batch losses' common steps between their argument checks and the op."""

from typing import NamedTuple

import torch
from torch import Tensor

from cosloss.criteria import Criterion
from cosloss.distributed import Gather, Peers
from cosloss.distributed import peers as find_peers
from cosloss.functional._checks import (
    as_number,
    check_gather,
    check_groups,
    check_reduction,
    check_weight,
    reduce,
    refuse_tracing,
)
from cosloss.functional._dims import Dims, DimWeights, check_dims, weighted_dims
from cosloss.modes import autocast_dtype, readable
from cosloss.notices import warn_once
from cosloss.ops.in_batch import in_batch
from cosloss.ops.operands import Rows
from cosloss.ops.prefixes import in_prefixes
from cosloss.problem import Mask, Problem


class Options(NamedTuple):
    """The options that every in-batch loss takes."""

    reduction: str
    ignore: Tensor | None = None
    weight: Tensor | None = None
    gather_distributed: Gather = False
    dims: Dims = None
    dim_weights: DimWeights = None

    def check(self, z: Tensor) -> None:
        """Raise unless they are valid for these items' embeddings."""
        check_reduction(self.reduction)
        check_gather(self.gather_distributed)
        check_dims(self.dims, self.dim_weights, z)
        if self.ignore is not None:
            check_groups(self.ignore, z)
        if self.weight is not None:
            check_weight(self.weight, z)

    def peers(
        self, z: Tensor, hard_negatives: int | None = None, **scalars: float | Tensor
    ) -> Peers | None:
        """The processes that share their rows, or None where there is only this one.

        hard_negatives: how many an item has.
        scalars: the loss's temperature and bias, which must be equal in all processes.
        """
        if not self.gather_distributed:
            return None
        ring = self.gather_distributed == "ring"
        peers = find_peers(z.shape[0], z.device, hard_negatives, ring, **scalars)
        if peers is not None and self.reduction == "none":
            raise ValueError(
                "gather_distributed gives one number, the joined batch's: reduction must "
                "be mean or sum; got 'none'"
            )
        return peers

    def loss_weights(
        self, losses: int, dtype: torch.dtype, peers: Peers | None
    ) -> Tensor | float | None:
        """The factor of each loss in the reduced one; None if that is no sum with constant factors.

        The items' weights repeat along the losses.
        """
        if peers is not None:
            items, every = peers.batch_sizes[peers.rank], sum(peers.batch_sizes)
            share = 1 / (losses // items * every) if self.reduction == "mean" else 1.0
        elif self.reduction == "none" or (self.weight is not None and self.weight.requires_grad):
            return None
        else:
            share = 1 / losses if self.reduction == "mean" else 1.0
        if self.weight is None:
            return share
        return self.weight.detach().to(dtype).repeat(losses // self.weight.shape[0]) * share

    def reduced(self, loss: Tensor, dtype: torch.dtype, peers: Peers | None = None) -> Tensor:
        """The reduction of each loss, of embeddings of that dtype, which is the result's too.

        It stays float32 under autocast. Across processes it is everyone's, joined.
        """
        wide = torch.promote_types(dtype, torch.float32)
        losses = loss.shape[0]
        if peers is not None:
            weights = self.loss_weights(losses, wide, peers)
            assert weights is not None
            loss = peers.joined_sum((loss * weights).sum())
        else:
            if self.weight is not None:
                weight = self.weight.to(wide)
                loss = loss * weight.repeat(losses // weight.shape[0])
            loss = reduce(loss, self.reduction)
        return loss.to(dtype if autocast_dtype(loss) is None else wide)


def largest_logit(temperature: float | Tensor) -> float:
    """A bound on |similarity / temperature|, as far as it is known without waiting for a device."""
    if isinstance(temperature, Tensor):
        if not readable(temperature):
            return torch.inf
        temperature = float(temperature.detach())
    return 1.001 / temperature


def item_mask(z: Tensor, views: int, ignore: Tensor | None, peers: Peers | None) -> Mask:
    """The pairs that are no negatives: those of one item, or of one group of items.

    Row i of the matrix shows item i modulo their number, z's rows; across processes its columns are
    everyone's.
    """
    n = z.shape[0]
    if peers is not None and ignore is None:
        return Mask(groups=peers.item_ids(views, z.device))
    if ignore is None:
        return Mask((0, n, -n) if views == 2 else (0,))
    groups = ignore.repeat(views)
    return Mask(groups=(groups, groups if peers is None else peers.gather(groups)))


def loss_of_pairs(
    z1: Tensor,
    z2: Tensor,
    criterion: Criterion,
    options: Options,
    temperature: float | Tensor,
    bias: float | Tensor | None = None,
    *,
    column_losses: bool,
    self_similarity: bool,
    column_bias: Tensor | None = None,
    others: bool = False,
) -> Tensor:
    """The reduced loss of two views, each row's positive the other view's row of the same item.

    bias: on every logit; column_bias: on those of each of z2's rows.
    self_similarity: whether all rows of both are compared with all, or z1's rows with z2's.
    others: whether the items have negatives besides, in another loss.
    """
    dtype = torch.promote_types(z1.dtype, z2.dtype)
    z1, z2, temperature = z1.to(dtype), z2.to(dtype), as_number(temperature, dtype)
    scalars: dict[str, float | Tensor] = {"temperature": temperature}
    if bias is not None:
        wide = torch.promote_types(dtype, torch.float32)
        bias = as_number(bias, dtype)
        scalars["bias"] = bias
        bias = bias.to(wide) if isinstance(bias, Tensor) else z1.new_tensor(bias, dtype=wide)
    peers = options.peers(z1, None, **scalars)
    if bias is None and not others:  # a pair's sigmoid loss needs no negative
        warn_without_negatives(z1.shape[0], options.ignore, peers)
    mask = item_mask(z1, 2 if self_similarity else 1, options.ignore, peers)
    problem = Problem(criterion, mask, column_losses, self_similarity)
    if column_bias is not None:
        bias = column_bias.to(torch.promote_types(dtype, torch.float32))
    return reduced_loss((z1, z2, None), problem, options, temperature, bias, peers)


def reduced_loss(
    rows: Rows,
    problem: Problem,
    options: Options,
    temperature: float | Tensor,
    bias: Tensor | None = None,
    peers: Peers | None = None,
) -> Tensor:
    """The loss of embeddings of one dtype, which is the loss's too; float32 under autocast."""
    refuse_tracing()
    first, second, negatives = rows
    both = second is not None and negatives is None and problem.column_losses
    losses = first.shape[0] * (2 if both else 1)
    wide = torch.promote_types(first.dtype, torch.float32)
    weights = options.loss_weights(losses, wide, peers)
    if options.dims is None:
        loss = in_batch(rows, temperature, bias, weights, problem, peers)
    else:
        ends, of_ends = zip(*weighted_dims(options.dims, options.dim_weights), strict=True)
        loss = in_prefixes(rows, ends, of_ends, temperature, bias, weights, problem, peers)
    if weights is None:
        return options.reduced(loss, first.dtype)
    return loss.to(first.dtype if autocast_dtype(first) is None else wide)


def warn_without_negatives(items: int, ignore: Tensor | None, peers: Peers | None) -> None:
    """Warn once of a batch in which no row has a negative: its loss is 0, and so is its gradient.

    That is seen from a batch of one, and from the groups where no device has to be waited for.
    """
    if peers is not None:
        items, ignore = sum(peers.batch_sizes), None
    if torch.compiler.is_compiling():  # it would become a guard on the batch's size
        return
    if items == 1:
        warn_once("a batch of one item has no negatives: its contrastive loss is 0, not a success")
    elif ignore is not None and readable(ignore) and bool((ignore == ignore[0]).all()):
        warn_once("all items are of one group in ignore: without negatives the loss is 0")
