"""With nothing but the wheel and its requirements installed: import, backward passes, types.

With the argument `uncompiled`: the wheel was built without a compiler, and eager does it all.
"""

import importlib.metadata
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

start = time.perf_counter()
import cosloss  # noqa: E402

milliseconds = 1e3 * (time.perf_counter() - start)
from cosloss.kernels import dispatch  # noqa: E402
from cosloss.kernels.native import library, stamp  # noqa: E402

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

compiled = sys.argv[1:] != ["uncompiled"]
folder = Path(cosloss.__file__).parent / "kernels" / "native"
assert len(list(folder.glob("*.so"))) == 4 * compiled, "a build of the kernels is missing"
assert not [*folder.glob("*.cpp"), *folder.glob("*.h")], "sources in the wheel"
assert (folder / stamp.WRITTEN).exists(), "nothing to compare the kernels' stamp with"
assert (library.loaded() is not None) == compiled
with dispatch.use("native" if compiled else "eager"):
    (gradient,) = torch.autograd.grad(cosloss.cosine_similarity(z1, z2).sum(), z1)
assert gradient.norm() > 0
print(f"import cosloss: {milliseconds:.0f} ms after import torch")
assert milliseconds < 150
