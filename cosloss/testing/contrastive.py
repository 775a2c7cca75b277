"""Rows of the table: the in-batch losses."""

from collections.abc import Iterator

import torch

from cosloss import functional, reference
from cosloss.testing.inputs import generic_pair, hard_pairs
from cosloss.testing.op import Op, Sample


def _nt_xent_generic() -> Iterator[Sample]:
    z1, z2 = generic_pair()
    for temperature in (0.1, 1.0):
        keywords = {"temperature": temperature, "reduction": "none"}
        yield Sample(f"temperature {temperature}", {"z1": z1, "z2": z2}, keywords)
    yield Sample("mean", {"z1": z1, "z2": z2})


def _nt_xent_hard(dtype: torch.dtype) -> Iterator[Sample]:
    for name, (z1, z2) in hard_pairs(dtype):
        yield Sample(name, {"z1": z1, "z2": z2}, {"reduction": "none"})


OPS = (
    Op(
        "nt_xent_loss",
        functional.nt_xent_loss,
        reference.nt_xent_loss,
        _nt_xent_generic,
        _nt_xent_hard,
    ),
)
