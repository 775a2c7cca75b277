"""The kernels that add up the forward kernel's partial sums, and what a loss makes of them.

A criterion whose loss has a formula here needs no other launch: the kernel that has a row's
statistic goes on to its loss and to what the backward pass needs of it, and a last one adds up the
losses.
"""

import triton
import triton.language as tl

from cosloss.kernels.stats import LARGEST_SHIFT
from cosloss.kernels.triton.tile import EMPTY

LARGEST = tl.constexpr(LARGEST_SHIFT)


@triton.jit
def in_batch_stats_kernel(
    sums,
    largest,
    out,
    positive,
    weights,
    weight,
    d_stat,
    shift,
    d_positive,
    losses,
    partials,
    count,
    empty: tl.constexpr,
    empty_shift: tl.constexpr,
    FORMULA: tl.constexpr,
    KIND: tl.constexpr,
    NUM_PARTIALS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up the partial sums in float64, and take the logarithm where there is one.

    weight: a number and what float32 has lost of it.

    With a FORMULA, a criterion's: not the statistic is written, but what the backward pass needs of
    it, d_stat and shift as in `cosloss.kernels.stats.LossGrads`, the gradient on the positive, and
    to losses the program's sum of weighted losses.
    """
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((NUM_PARTIALS, BLOCK), tl.float64)
    highest = tl.full((NUM_PARTIALS, BLOCK), EMPTY, tl.float32)
    if KIND == "logsumexp":
        for start in range(0, partials, NUM_PARTIALS):
            pointers, mask = _partials(start, column, partials, count, NUM_PARTIALS)
            highest = tl.maximum(highest, tl.load(largest + pointers, mask=mask, other=EMPTY))
    peak = tl.max(highest, 0)
    for start in range(0, partials, NUM_PARTIALS):
        pointers, mask = _partials(start, column, partials, count, NUM_PARTIALS)
        part = tl.load(sums + pointers, mask=mask, other=0).to(tl.float64)
        if KIND == "logsumexp":
            part_peak = tl.load(largest + pointers, mask=mask, other=EMPTY)
            part *= tl.exp(part_peak.to(tl.float64) - peak.to(tl.float64)[None, :])
        total += part
    result = tl.sum(total, 0)
    if KIND == "exp" or KIND == "logsumexp":
        result = tl.where(result == 0, empty, tl.log(result) + _shift(peak, KIND))
    inside = column < count
    if FORMULA is None:
        tl.store(out + column, result, mask=inside)
    else:
        if weights is not None:
            factor = tl.load(weights + column, mask=inside, other=0).to(tl.float64)
        else:
            factor = tl.full((BLOCK,), weight[0], tl.float64) + weight[1]
        own = tl.load(positive + column, mask=inside, other=0).to(tl.float64)
        loss, slope = _loss_of(result, own, empty, FORMULA)
        slope *= factor
        tl.store(d_positive + column, (-slope).to(tl.float32), mask=inside)
        if KIND == "logsumexp":
            rounded = tl.maximum(result, empty_shift).to(tl.float32)
            tl.store(shift + column, rounded, mask=inside)
            slope *= tl.exp(tl.minimum(rounded.to(tl.float64) - result, 1.0))
        else:
            # a row without pairs has the slope 0, which must not meet an infinity
            slope *= tl.exp(tl.minimum(-result, LARGEST))
        tl.store(d_stat + column, slope.to(tl.float32), mask=inside)
        tl.store(losses + tl.program_id(0), tl.sum(tl.where(inside, factor * loss, 0.0), 0))


@triton.jit
def in_batch_total_kernel(losses, out, count, BLOCK: tl.constexpr):
    """Write the sum of so many losses, by one program."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        total += tl.load(losses + place, mask=place < count, other=0)
    tl.store(out, tl.sum(total, 0).to(tl.float32))


@triton.jit
def _loss_of(lse, positive, empty: tl.constexpr, FORMULA: tl.constexpr):
    """Each row's loss, and its slope in the lse, which is minus that in the positive."""
    difference = lse - positive
    if FORMULA == "cross_entropy":
        e = tl.exp(-tl.abs(difference))
        more = 1 + e
        # log(1 + e) to e's last digit: what 1 + e has lost of e is made good
        log1p = tl.where(more == 1, e, tl.log(more) * (e / (more - 1)))
        loss = tl.where(difference > 0, difference, 0.0) + log1p
        slope = tl.where(difference > 0, 1.0, e) / more
    else:
        tl.static_assert(FORMULA == "decoupled")
        without = lse < empty / 2
        loss = tl.where(without, 0.0, difference)
        slope = tl.where(without, 0.0, 1.0)
    return loss, slope


@triton.jit
def _partials(start, column, partials, count, NUM_PARTIALS: tl.constexpr):
    """The places of NUM_PARTIALS partial sums of each column, and which of them there are."""
    partial = start + tl.arange(0, NUM_PARTIALS)
    pointers = partial.to(tl.int64)[:, None] * count + column[None, :]
    return pointers, (partial < partials)[:, None] & (column < count)[None, :]


@triton.jit
def _shift(peak, KIND: tl.constexpr):
    return peak.to(tl.float64) if KIND == "logsumexp" else 0.0
