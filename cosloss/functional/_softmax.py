"""InfoNCE with more in a query's softmax: other directions, a weight of hard pairs, a limit.

With S the cosine similarities, x = S / T, and A_i the pairs that item i is compared with, of which
c are its own (q_i, k_i), once for each direction that has it:

    l_i = -x_ii + log(c exp(x_ii) + sum_{(a, b) in A_i} exp(x_ab + hardness stop(S_ab))).

Left out of A_i are the pairs with S_ab > S_ii - margin, a comparison without a gradient, of the
embeddings' own similarities or of a guide's. The sum over each direction is an lse of its own of
the in-batch op. The similarity's weight is that of another temperature, 1 / T' = 1 / T + hardness,
and stop(.) leaves a share T' / T of each logit.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from cosloss.arguments import check_choice, check_number, described
from cosloss.criteria import THRESHOLD, NegativesLogSumExp, empty_lse
from cosloss.distributed import NOT_PLAIN, Peers
from cosloss.functional._checks import as_number, refuse_tracing
from cosloss.functional._in_batch import (
    Options,
    item_mask,
    largest_logit,
    warn_without_negatives,
)
from cosloss.modes import differentiates_itself, shares_memory
from cosloss.ops.cosine_similarity import cosine_similarity
from cosloss.ops.in_batch import in_batch
from cosloss.ops.unit_rows import unit_rows
from cosloss.problem import Mask, Problem

DIRECTIONS = ("query_to_key", "key_to_query", "query_to_query", "key_to_key")
ONE_WAY = DIRECTIONS[:1]
HARDNESS_ON = ("all", "in_batch", "hard")


class Guide(NamedTuple):
    """Embeddings of another model of the queries, the keys and the negatives that are given."""

    query: Tensor
    key: Tensor
    hard: Tensor | None = None

    def swapped(self) -> "Guide":
        """That of the keys among the queries."""
        return Guide(self.key, self.query)

    def unit(self) -> "Guide":
        """Their rows, scaled in float32 or wider, without a gradient."""
        hard = None if self.hard is None else _unit(self.hard)
        return Guide(_unit(self.query), _unit(self.key), hard)


class Softmax(NamedTuple):
    """What is in a query's softmax besides its key, the other keys and hard negatives."""

    directions: Sequence[str] = ONE_WAY
    hardness: float = 0.0
    hardness_on: str = "all"
    false_negative_margin: float | None = None

    def check(self, symmetric: bool) -> None:
        """Raise unless every option is valid, for a loss that is symmetric or not."""
        if isinstance(self.directions, str) or not isinstance(self.directions, Sequence):
            raise TypeError(
                f"directions must be a sequence of names; got {described(self.directions)}"
            )
        for name in self.directions:
            check_choice("directions", name, DIRECTIONS)
        if "query_to_key" not in self.directions:
            raise ValueError("directions must have 'query_to_key', where the positive pair is")
        if symmetric and not self.one_way:
            raise ValueError(
                "symmetric averages two losses, and directions are in one softmax: leave out one"
            )
        check_number("hardness", self.hardness, 0)
        check_choice("hardness_on", self.hardness_on, HARDNESS_ON)
        if self.false_negative_margin is not None:
            check_number("false_negative_margin", self.false_negative_margin, -2, 2)

    @property
    def one_way(self) -> bool:
        """Whether queries are compared with keys alone."""
        return set(self.directions) == set(ONE_WAY)

    @property
    def plain(self) -> bool:
        """Whether this is InfoNCE itself."""
        return self.one_way and self.hardness == 0 and self.false_negative_margin is None

    def hardness_of(self, negatives: str) -> float:
        """The weight of a pair's similarity, of "in_batch" negatives or "hard" ones."""
        return self.hardness if self.hardness_on in ("all", negatives) else 0.0


def softmax_loss(
    query: Tensor,
    key: Tensor,
    hard: Tensor | None,
    in_batch_keys: bool,
    temperature: float | Tensor,
    softmax: Softmax,
    options: Options,
    guide: Guide | None = None,
) -> Tensor:
    """The reduced loss; hard: (N, K, D), each query's own, or (M, D), every query's.

    in_batch_keys: whether the other items' keys are negatives.
    """
    refuse_tracing()
    dtype = torch.promote_types(query.dtype, key.dtype)
    query, key = unit_rows(query.to(dtype)), unit_rows(key.to(dtype))
    if hard is not None:
        hard = unit_rows(hard.to(dtype).flatten(0, -2)).view_as(hard)
    temperature = as_number(temperature, dtype)
    per_item = hard.shape[1] if hard is not None and options.gather_distributed else None
    peers = options.peers(query, per_item, temperature=temperature)
    if peers is not None and differentiates_itself(query, key, hard):
        raise RuntimeError(NOT_PLAIN)
    if hard is None:
        warn_without_negatives(query.shape[0], options.ignore, peers)
    own = cosine_similarity(query, key, 0.0)
    comparison = _Comparison(
        query,
        key,
        hard,
        in_batch_keys,
        temperature,
        softmax,
        peers,
        mask=item_mask(query, 1, options.ignore, peers),
    )
    if softmax.false_negative_margin is not None:
        limit = own.detach()
        if guide is not None:
            of_guide = guide.unit()
            limit = cosine_similarity(of_guide.query, of_guide.key, 0.0)
            own = own + 0 * limit  # a NaN compares with nothing, and is to be seen
            comparison.guide = replace(comparison, **of_guide._asdict())
        comparison.limit = limit - softmax.false_negative_margin
    others = torch.stack(list(comparison.sums())).logsumexp(0)
    positive = own / temperature
    counted = math.log(2 if "key_to_query" in softmax.directions else 1)
    loss = softplus(others - positive - counted, threshold=THRESHOLD) + counted
    return options.reduced(loss, dtype, peers)


@dataclass
class _Comparison:
    """The pairs that each item is compared with, and the lse over each direction's.

    As in `softmax_loss`, of unit rows. mask: of the pairs of items that are no negatives.
    limit: (N,), the largest similarity of a negative, if there is one.
    guide: the same pairs of the guide's unit rows, whose similarity it is if there is one.
    """

    query: Tensor
    key: Tensor
    hard: Tensor | None
    in_batch_keys: bool
    temperature: float | Tensor
    softmax: Softmax
    peers: Peers | None
    mask: Mask
    limit: Tensor | None = None
    guide: "_Comparison | None" = None

    def sums(self) -> Iterator[Tensor]:
        """The lse over each direction's negatives, (N,)."""
        of_guide = itertools.repeat(None) if self.guide is None else self.guide.matrices()
        for matrix, guides in zip(self.matrices(), of_guide, strict=False):
            yield self._lse(*matrix, guides=None if guides is None else guides[:2])
        if self._apart() and self._owned():
            yield self._of_own_hard()

    def matrices(self) -> Iterator[tuple[Tensor, Tensor, Mask, float]]:
        """Each direction's rows and columns, the mask of their pairs, and their hardness."""
        query, key, directions = self.query, self.key, self.softmax.directions
        if self.in_batch_keys:
            keys = self._keys_of_others() if self._apart() else self._keys_and_hard()
            yield query, *keys, self.softmax.hardness_of("in_batch")
        if self._apart() and not self._owned():
            assert self.hard is not None
            yield query, self.hard, Mask(), self.softmax.hardness_of("hard")
        if "key_to_query" in directions:
            yield key, self._everyones(query), self.mask, 0.0
        if "query_to_query" in directions:
            yield query, self._everyones(query), self.mask, 0.0
        if "key_to_key" in directions:
            keys = self._keys_of_others() if self._owned() else self._keys_and_hard()
            yield key, *keys, 0.0

    def _apart(self) -> bool:
        """Whether a query's hard negatives are compared apart from the keys."""
        return self.hard is not None and (self.softmax.hardness > 0 or not self.in_batch_keys)

    def _owned(self) -> bool:
        """Whether each hard negative is one query's."""
        return self.hard is not None and self.hard.ndim == 3

    def _everyones(self, x: Tensor) -> Tensor:
        return x if self.peers is None else self.peers.join(x)

    def _keys_and_hard(self) -> tuple[Tensor, Mask]:
        """Everyone's keys, then all hard negatives, which are no item's; and their mask."""
        if self.hard is None:
            return self._everyones(self.key), self.mask
        columns = self._by_item() if self._owned() else torch.cat([self.key, self.hard])
        if self.mask.groups is None:
            return columns, self.mask
        own, every = (ids.long() for ids in self.mask.groups)
        of_hard = (every.max() + 1).expand(columns.shape[0] - every.shape[0])
        return columns, Mask(groups=(own, torch.cat([every, of_hard])))

    def _keys_of_others(self) -> tuple[Tensor, Mask]:
        """Everyone's keys, then each item's hard negatives; the mask has an item's own."""
        if not self._owned():
            return self._everyones(self.key), self.mask
        columns = self._by_item()
        ids = torch.arange(self.query.shape[0], device=columns.device)
        own, every = self.mask.groups or (ids, ids)
        return columns, Mask(groups=(own, every.repeat(columns.shape[0] // every.shape[0])))

    def _by_item(self) -> Tensor:
        """Everyone's keys and hard negatives: all items' first, their second, and so on."""
        assert self.hard is not None
        by_item = torch.cat([self.key[:, None], self.hard], 1)
        return self._everyones(by_item).transpose(0, 1).flatten(0, 1)

    def _lse(
        self,
        rows: Tensor,
        columns: Tensor,
        mask: Mask,
        hardness: float,
        guides: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """log sum_j exp(x_ij + hardness stop(S_ij)) over the pairs that are not masked.

        guides: the guide's rows and columns.
        """
        temperature, share = self.temperature, None
        constant = temperature.detach() if isinstance(temperature, Tensor) else temperature
        if hardness > 0:
            stopped = rows.detach(), columns.detach()
            if shares_memory(rows, stopped[0]) and shares_memory(columns, stopped[1]):
                share = 1 / (1 + hardness * constant)
            else:  # a check of gradients holds what is stopped where it was
                weight = hardness * temperature
                rows, columns = (
                    torch.cat([x, weight**0.5 * y], 1)
                    for x, y in zip((rows, columns), stopped, strict=True)
                )
                temperature = temperature / (1 + weight)
                guides = stopped if guides is None else guides
            constant = constant / (1 + hardness * constant)
        if self.limit is not None:
            limit = self.limit / constant if guides is None else self.limit
            mask = Mask(mask.diagonals, mask.groups, row_limits=limit, guides=guides)
        itself = columns is rows and self.limit is None
        criterion = NegativesLogSumExp(largest_logit(constant), share)
        problem = Problem(criterion, mask, column_losses=itself, self_similarity=itself)
        given = rows, None, None if itself else columns
        return in_batch(given, temperature, None, None, problem)

    def _of_own_hard(self) -> Tensor:
        """The same over each query's hard negatives."""
        s = self._with_own_hard()
        x = s / self.temperature + self.softmax.hardness_of("hard") * s.detach()
        if self.limit is not None:
            limited = s if self.guide is None else self.guide._with_own_hard()
            x = x.masked_fill(limited > self.limit[:, None], empty_lse(torch.float32))
        return x.logsumexp(1)

    def _with_own_hard(self) -> Tensor:
        """Each query's similarities with its hard negatives, (N, K)."""
        assert self.hard is not None
        return cosine_similarity(self.query[:, None].expand_as(self.hard), self.hard, 0.0)


def _unit(x: Tensor) -> Tensor:
    rows = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    return unit_rows(rows.flatten(0, -2)).view_as(rows)
