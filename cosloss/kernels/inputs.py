"""What the operands of an in-batch loss are made of, for a backend whose gradients go back to it.

Rows of r are scale x / |x| of embeddings x, one part after the other, and so are the columns where
they are not the rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Source(NamedTuple):
    """Embeddings x (N, D), the norms of their rows, and whether their gradient is wanted.

    pair, pair_norm: those whose product with x, row by row, the loss takes besides; or None.
    """

    x: Tensor
    norm: Tensor
    wanted: bool
    pair: Tensor | None = None
    pair_norm: Tensor | None = None


class Inputs(NamedTuple):
    """The sources of the rows, of the columns where these are not the rows, and of pairs alone.

    pulls: the gradients on the scaled products of paired rows, which add up; (N,) each.
    factor: of all gradients on embeddings, 0-d; None is 1.
    along: whether <r, grad_r> + <c, grad_c> is wanted, and bias: that on a bias on every logit.
    """

    rows: Sequence[Source]
    columns: Sequence[Source]
    apart: Sequence[Source]
    scale: float | Tensor
    pulls: Sequence[Tensor]
    factor: Tensor | None
    along: bool
    bias: bool


class InputGrads(NamedTuple):
    """The gradients on the sources in their order, each only where it is wanted.

    along: 0-d, float64, without the pulls' part.
    """

    sources: Sequence[Tensor | None]
    along: Tensor | None
    bias: Tensor | None
