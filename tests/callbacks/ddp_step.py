"""Two processes whose steps are checked, for test_ddp_step.py: ddp_step.py FOLDER CASE ..."""

import copy
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_gather, all_reduce
from torch.nn import functional as F

from cosloss import info_nce_loss, nt_xent_loss, reference
from cosloss.callbacks import StepCheckCallback
from tests.callbacks.runs import TwoViews, train

HAPPENED = set()


def without_gradient(z):
    """vissl's gather: the rows of other processes are constants."""
    parts = [torch.empty_like(z) for _ in range(2)]
    dist.all_gather(parts, z.detach().contiguous())
    parts[dist.get_rank()] = z
    return torch.cat(parts)


@torch.no_grad()
def under_no_grad(z):
    """MoCo's concat_all_gather, where it does not belong."""
    parts = [torch.empty_like(z) for _ in range(2)]
    dist.all_gather(parts, z)
    return torch.cat(parts)


def with_gradient(z):
    return torch.cat(all_gather(z))


class Scaled(torch.autograd.Function):
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def keys(z1, z2, gather):
    """The local queries against the keys of all processes."""
    logits = F.normalize(z1) @ F.normalize(gather(z2)).t() / 0.2
    return F.cross_entropy(logits, torch.arange(len(z1)) + len(z1) * dist.get_rank())


class SyncBatchNorm(nn.Module):
    """torch's needs a GPU."""

    def forward(self, z1, z2):
        mean = all_reduce(z1.mean(0)) / 2
        var = all_reduce((z1 - mean).square().mean(0)) / 2
        return F.mse_loss((z1 - mean) / (var + 1e-3).sqrt(), z2)


class LocalBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, z1, z2):
        return reference.nt_xent_loss(with_gradient(self.norm(z1)), with_gradient(self.norm(z2)))


class RaisesOnce(nn.Module):
    """The second process cannot compute its loss again, for a reason that lies outside of it."""

    def forward(self, z1, z2):
        key = float(z1.sum())
        if dist.get_rank() == 1 and key in HAPPENED:
            raise KeyError("not twice")
        HAPPENED.add(key)
        return (z1 - z2).square().mean()


class Loss(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, z1, z2):
        return self.loss(z1, z2)


def weighted(z1, z2):
    """A loss of everyone's pairs that stops a gradient on purpose."""
    return info_nce_loss(z1, z2, 0.2, hardness=2.0, gather_distributed=True)


CASES = {
    "cosloss": Loss(lambda a, b: nt_xent_loss(a, b, gather_distributed=True)),
    "stopped": Loss(weighted),
    "stopped_and_gather": Loss(lambda a, b: weighted(a, b) + keys(a, b, without_gradient)),
    "all_gather": Loss(lambda a, b: keys(a, b, with_gradient)),
    "global": Loss(lambda a, b: reference.nt_xent_loss(with_gradient(a), with_gradient(b))),
    "sync_batch_norm": SyncBatchNorm(),
    "batch_norm": LocalBatchNorm(),
    "local": Loss(reference.nt_xent_loss),
    "accumulated": Loss(lambda a, b: keys(a, b, with_gradient)),
    "gather": Loss(lambda a, b: keys(a, b, without_gradient)),
    "gather_no_grad": Loss(lambda a, b: keys(a, b, under_no_grad)),
    "gather_both": Loss(
        lambda a, b: reference.nt_xent_loss(without_gradient(a), without_gradient(b))
    ),
    "as_if_gathered": Loss(lambda a, b: Scaled.apply(reference.nt_xent_loss(a, b), 2.0)),
    "times_the_processes": Loss(
        lambda a, b: Scaled.apply(
            reference.nt_xent_loss(with_gradient(a), with_gradient(b)), float(dist.get_world_size())
        )
    ),
    "one_rank": Loss(lambda a, b: Scaled.apply((a - b).square().mean(), 1 + dist.get_rank())),
    "raises": RaisesOnce(),
}


class Model(TwoViews):
    def __init__(self, case, check, folder):
        super().__init__(copy.deepcopy(CASES.get(case, CASES["local"])))
        self.case, self.check, self.folder = case, check, folder
        self.other = nn.Linear(6, 6)

    def views(self, batch):
        z1, z2 = super().views([self.other(batch[0])])
        return z1, z2

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        if self.case == "unequal" and self.global_rank == 1:
            self.encoder.bias.data.add_(1e-3)

    def on_fit_end(self):
        check = self.check
        lines = [f"{check.checks_run} {check.checks_failed} {check.checks_skipped}"]
        state = [t.double().sum().item() for t in self.state_dict().values()]
        text = "\n".join([*lines, repr(state), *self.texts])
        (self.folder / f"rank{self.global_rank}").write_text(text)


def main(folder: Path, case: str) -> None:
    check = StepCheckCallback(1)
    checks = [] if case.endswith("-unchecked") else [check]
    case = case.removesuffix("-unchecked")
    folder.mkdir()
    torch.manual_seed(0)
    model = Model(case, check, folder)
    options = {"accumulate_grad_batches": 2} if case == "accumulated" else {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.texts = Texts(caught)
        train(model, checks, folder, batches=6, strategy="ddp_fork", devices=2, **options)


class Texts:
    """What was warned about, when it is asked for."""

    def __init__(self, caught):
        self.caught = caught

    def __iter__(self):
        return (str(w.message) for w in self.caught if "step_check" in str(w.message))


if __name__ == "__main__":
    for name in sys.argv[2:]:
        main(Path(sys.argv[1]) / name, name)
