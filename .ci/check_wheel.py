"""With nothing but the wheel and its requirements installed: import, one backward pass, types."""

import importlib.metadata
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

start = time.perf_counter()
import cosloss  # noqa: E402

milliseconds = 1e3 * (time.perf_counter() - start)
absent = ("lightning", "hydra", "torchvision", "tensorboard")
assert not any(find_spec(name) for name in absent), "this environment holds more than the wheel"
assert not {*absent, "triton"} & sys.modules.keys()
required = [r for r in importlib.metadata.requires("cosloss") if "extra" not in r]
assert len(required) == 2, required
assert (Path(cosloss.__file__).parent / "py.typed").exists()

z1, z2 = (torch.randn(8, 16, requires_grad=True) for _ in range(2))
for loss in (cosloss.CosineEmbeddingLoss(), cosloss.NTXentLoss()):
    loss(z1, z2).backward()
assert z1.grad.norm() > 0
print(f"import cosloss: {milliseconds:.0f} ms after import torch")
assert milliseconds < 150
