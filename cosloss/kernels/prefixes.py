"""Nested prefixes of the rows and columns of a logit matrix, whose products are shared.

With segments R_k and C_k of the columns of R (N, D) and C (M, D), the logits of prefix k are

    X^k = links_k X^(k-1) + R_k C_k^T,    (links_k)_ij = row_links_ki column_links_kj,

so that all prefixes' products are one whole product. With d^k the gradient on X^k, that on a
segment is that of all prefixes that have it:

    G^k = d^k + links_(k+1) G^(k+1),    grad_R_k = G^k C_k,    grad_C_k = G^k^T R_k.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Prefixes:
    """K nested prefixes, the shortest first.

    ends: where they end in the columns of R and C, the last at D.
    row_links, column_links: (K, N) and (K, M), the same tensor where the columns are the rows; the
        first prefix's mean nothing.
    """

    ends: tuple[int, ...]
    row_links: Tensor
    column_links: Tensor

    @property
    def segments(self) -> Iterator[slice]:
        """The columns that each prefix has and the one before has not."""
        for begin, end in zip((0, *self.ends), self.ends, strict=False):
            yield slice(begin, end)
