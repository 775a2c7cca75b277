"""Images per second of a whole SimCLR step beside lightly's example, and where the time goes.

Both train the same encoder and head on the same images under Lightning, with the same batch and the
same number of torch threads. Ours has the images in memory and augments a batch at once in the
training process; lightly's has its own transforms on Pillow images, in that process or in workers,
half as many as there are cores and as many, and its own loss, as in
examples/pytorch_lightning/simclr.py.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import lightning as L
import torch
from lightly.loss import NTXentLoss as LightlyNTXentLoss
from lightly.transforms import SimCLRTransform
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cosloss import NTXentLoss
from cosloss.callbacks import GradcheckCallback, GradientDiscrepancyCallback
from experiments.simclr.augmentation import TwoViews
from experiments.simclr.callbacks.seeding import SeedEachStep
from experiments.simclr.data import RandomImages
from experiments.simclr.encoders import ProjectionHead, SmallConvNet, resnet18
from experiments.simclr.module import SimCLR
from experiments.simclr.program.quiet import silence_routine_messages

BATCH, SIZE = 256, 32
STEPS, WARM_UP = 12, 3
PROFILED_STEPS = 200  # as many as from one gradcheck to the next
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "small_conv": partial(SmallConvNet, channels_last=True),
    "resnet18": partial(resnet18, "imagenet", channels_last=True),
}


def run(rounds: int, encoder: str | None = None) -> bool:
    """Print the tables; False if the two do not compute the same loss of the same embeddings."""
    silence_routine_messages()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"{os.cpu_count()} cores, CPU, float32; batch {BATCH} of {SIZE} x {SIZE}"
    )
    z1, z2 = torch.randn(2, BATCH, 64)
    same = torch.allclose(NTXentLoss(0.5)(z1, z2), LightlyNTXentLoss(0.5)(z1, z2), rtol=1e-5)
    for name in [encoder] if encoder else ENCODERS:
        _compare(name, ENCODERS[name], rounds, same)
        _profile(name, ENCODERS[name], rounds)
    return same


def _compare(name: str, encoder: Callable[[], nn.Module], rounds: int, same: bool) -> None:
    contenders: dict[str, Callable[[], float]] = {
        "cosloss": lambda: _seconds_per_step(ours(encoder), _our_data(STEPS), STEPS)
    }
    cores = os.cpu_count() or 1
    # where torch's threads fill the cores already, fewer workers can be faster
    for workers in sorted({0, cores // 2, cores}):
        contenders[f"lightly, workers: {workers}"] = partial(_lightly_seconds, encoder, workers)
    rates: dict[str, list[float]] = {label: [] for label in contenders}
    for _ in range(rounds):
        for label, seconds in contenders.items():
            rates[label].append(BATCH / seconds())
    median = {label: statistics.median(found) for label, found in rates.items()}
    print(f"\n{name}: images per second over {STEPS - WARM_UP} steps, {rounds} rounds in turns")
    print(f"{'':<24}{'median':>10}{'slowest':>10}{'fastest':>10}{'ours is':>10}")
    for label, found in rates.items():
        faster = f"{median['cosloss'] / median[label]:.2f}x" if same else "wrong"
        print(
            f"{label:<24}{median[label]:>10.0f}{min(found):>10.0f}{max(found):>10.0f}{faster:>10}"
        )


def _lightly_seconds(encoder: Callable[[], nn.Module], workers: int) -> float:
    return _seconds_per_step(LightlySimCLR(encoder), lightly_loader(STEPS, workers), STEPS)


def _profile(name: str, encoder: Callable[[], nn.Module], rounds: int) -> None:
    """One step taken apart, medians; what Lightning and the callbacks add is the difference."""
    parts = _parts(ours(encoder), _our_data(rounds + 1), rounds)
    checks = [
        SeedEachStep(seed=0),
        GradcheckCallback(every_n_batches=PROFILED_STEPS),
        GradientDiscrepancyCallback(every_n_batches=PROFILED_STEPS // 4),
    ]
    steps = PROFILED_STEPS + WARM_UP
    whole = 1e3 * _seconds_per_step(ours(encoder), _our_data(steps), steps, checks)
    parts["Lightning and callbacks"] = whole - sum(parts.values())
    print(f"\n{name}: a step of {whole:.0f} ms, the gradient checks among the callbacks")
    for part, milliseconds in parts.items():
        print(f"{part:<24}{milliseconds:>10.2f} ms{milliseconds / whole:>8.1%}")


def _parts(model: SimCLR, data: L.LightningDataModule, rounds: int) -> dict[str, float]:
    """Milliseconds of the parts of a training step, by name."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    found: dict[str, list[float]] = {}

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        found.setdefault(part, []).append(1e3 * (time.perf_counter() - start))

    batches = iter(data.train_dataloader())
    for _ in range(rounds + 1):
        with timed("loader"):
            images = next(batches)["image"]
        with timed("augmentation"):
            views = torch.cat(model.views(images))
        with timed("encoder and head"):
            z = model.projection_head(model.encoder(views))
        with timed("loss"):
            leaf = z.detach().requires_grad_()
            model.loss(*leaf.chunk(2)).backward()
        with timed("their backward"):
            z.backward(leaf.grad)
        with timed("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
    # the first step fills caches
    return {part: statistics.median(times[1:]) for part, times in found.items()}


def ours(encoder: Callable[[], nn.Module]) -> SimCLR:
    """This project's SimCLR, with the transforms that lightly's has for CIFAR-10."""
    views = TwoViews(
        SIZE,
        min_crop=0.08,
        flip=0.5,
        jitter=0.8,
        brightness=0.4,
        contrast=0.4,
        saturation=0.4,
        hue=0.1,
        grayscale=0.2,
    )
    head = partial(ProjectionHead, hidden=256, out=64)
    optimizer = partial(torch.optim.SGD, lr=0.06)
    return SimCLR(encoder(), head, views, NTXentLoss(temperature=0.5), optimizer)


class LightlySimCLR(L.LightningModule):
    """The LightningModule of lightly's example, around the same encoder and head."""

    def __init__(self, encoder: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.backbone = encoder()
        self.projection_head = ProjectionHead(self.backbone.num_features, hidden=256, out=64)
        self.criterion = LightlyNTXentLoss(temperature=0.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.projection_head(self.backbone(images))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        view1, view2 = batch
        return self.criterion(self(view1), self(view2))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.06)


class Pictures(Dataset):
    """Images from memory through a transform of Pillow images, as torchvision's CIFAR10."""

    def __init__(self, images: Tensor, transform: Callable[[Image.Image], list[Tensor]]) -> None:
        self.images = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(Image.fromarray(self.images[index]))


def lightly_loader(steps: int, workers: int) -> DataLoader:
    """Its transforms with the settings of its CIFAR-10 benchmark."""
    # the workers are two batches each ahead, and would rest while the last steps are timed
    data = _our_data(steps + 2 * workers)
    data.setup()
    transform = SimCLRTransform(input_size=SIZE, cj_strength=0.5, gaussian_blur=0.0)
    pictures = Pictures(data.train_images, transform)
    return DataLoader(pictures, BATCH, shuffle=True, drop_last=True, num_workers=workers)


def _our_data(steps: int) -> RandomImages:
    # 60% of the images train
    return RandomImages(BATCH, num_images=-(-steps * BATCH * 10 // 6) + 10, image_size=SIZE)


class Stopwatch(L.Callback):
    """The seconds per step from the end of the warm-up to the last step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.ends.append(time.perf_counter())

    @property
    def seconds_per_step(self) -> float:
        ends = self.ends[WARM_UP - 1 :]
        return (ends[-1] - ends[0]) / (len(ends) - 1)


def _seconds_per_step(
    model: L.LightningModule,
    data: L.LightningDataModule | DataLoader,
    steps: int,
    callbacks: list[L.Callback] | None = None,
) -> float:
    watch = Stopwatch()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*(callbacks or []), watch],
    )
    trainer.fit(model, data)
    assert len(watch.ends) == steps
    return watch.seconds_per_step
