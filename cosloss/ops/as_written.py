"""Matrix products in the dtype of their operands."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def products_as_written(like: Tensor) -> AbstractContextManager[Any]:
    """Where torch.autocast does not take the products to a dtype of its own."""
    kind = like.device.type
    if torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
