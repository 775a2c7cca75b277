"""Losses and operations of other packages, where they are installed."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.benchmarks.silent_gradients.cases import draw, right
from experiments.benchmarks.silent_gradients.faults.contrastive import views
from experiments.benchmarks.silent_gradients.right.losses import BOXES, boxes, target_boxes


def built(path: str, *args: Any, **options: Any) -> Any:
    """The `make` of a class of another package."""
    module, name = path.rsplit(".", 1)
    return lambda: getattr(import_module(module), name)(*args, **options)


def called(path: str, **options: Any) -> Any:
    """The `make` of a function of another package."""
    module, name = path.rsplit(".", 1)
    return lambda: lambda *args: getattr(import_module(module), name)(*args, **options)


def labelled(h: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return h, torch.arange(16) % 4


IMAGES: dict[str, Any] = {"shape": (2, 3, 12, 12)}

for name, options in {
    "NTXentLoss": {"temperature": 0.3},
    "BarlowTwinsLoss": {},
    "VICRegLoss": {},
    "DCLLoss": {},
    "NegativeCosineSimilarity": {},
}.items():
    right(f"lightly {name}", built(f"lightly.loss.{name}", **options), views, needs=("lightly",))


def _weighted_twin(a: Tensor, b: Tensor) -> Tensor:
    def weights(a: Tensor, b: Tensor) -> Tensor:
        return 2 - len(a) * ((a * b).sum(1) / 0.5).softmax(0).detach()

    return import_module("lightly.loss").DCLLoss(weight_fn=weights)(a, b)


def _tico_twin(a: Tensor, b: Tensor) -> Tensor:
    a, b = F.normalize(a), F.normalize(b)
    c = 0.1 * (a.t() @ a).detach() / len(a)
    return 1 - (a * b).sum(1).mean() + 8 * (a @ c * a).sum(1).mean()


def _swav_twin(high: list[Tensor], low: list[Tensor]) -> Tensor:
    sinkhorn = import_module("lightly.loss.swav_loss").sinkhorn
    codes = [sinkhorn(x.detach(), 3, 0.05) for x in high]
    pairs = [(codes[0], high[1]), (codes[0], low[0]), (codes[1], high[0]), (codes[1], low[0])]
    return -sum((q * (z / 0.1).log_softmax(1)).sum(1).mean() for q, z in pairs) / 4


right(
    "lightly DCLWLoss",
    built("lightly.loss.DCLWLoss"),
    views,
    twin=_weighted_twin,
    stops="the weights",
    needs=("lightly",),
)
right(
    "lightly TiCoLoss",
    built("lightly.loss.TiCoLoss"),
    views,
    twin=_tico_twin,
    stops="the covariance",
    needs=("lightly",),
)
right(
    "lightly NTXentLoss with a memory bank",
    built("lightly.loss.NTXentLoss", memory_bank_size=(64, 8)),
    views,
    needs=("lightly",),
)
right(
    "lightly DINOLoss",
    built("lightly.loss.DINOLoss", output_dim=8),
    lambda h, g: ([draw(g, h), draw(g, h)], [h, h.roll(1, 1)]),
    needs=("lightly",),
    alone=False,
)
right(
    "lightly SwaVLoss",
    built("lightly.loss.SwaVLoss"),
    lambda h, g: ([torch.tanh(h), torch.tanh(2 * h)], [torch.tanh(h.roll(1, 1))]),
    needs=("lightly",),
    alone=False,
    twin=_swav_twin,
    stops="the codes",
    finish=torch.sum,
)

PML = "pytorch_metric_learning.losses"
for name, options in {
    "NTXentLoss": {},
    "TripletMarginLoss": {},
    "ContrastiveLoss": {},
    "SupConLoss": {},
    "MultiSimilarityLoss": {},
    "ArcFaceLoss": {"num_classes": 4, "embedding_size": 8},
    "ProxyAnchorLoss": {"num_classes": 4, "embedding_size": 8},
    "CosFaceLoss": {"num_classes": 4, "embedding_size": 8},
    "NormalizedSoftmaxLoss": {"num_classes": 4, "embedding_size": 8},
    "LiftedStructureLoss": {},
    "FastAPLoss": {},
}.items():
    right(
        f"pytorch-metric-learning {name}",
        built(f"{PML}.{name}", **options),
        labelled,
        needs=("pytorch_metric_learning",),
    )


def _circle_twin(z: Tensor, labels: Tensor) -> Tensor:
    s = F.normalize(z) @ F.normalize(z).t()
    same = labels[:, None] == labels
    itself = torch.eye(len(z), dtype=torch.bool)
    near = -80 * F.relu(1.4 - s.detach()) * (s - 0.6)
    far = 80 * F.relu(s.detach() + 0.4) * (s - 0.4)
    total = near.masked_fill(~same | itself, -torch.inf).logsumexp(1)
    return F.softplus(total + far.masked_fill(same, -torch.inf).logsumexp(1)).mean()


right(
    "pytorch-metric-learning CircleLoss",
    built(f"{PML}.CircleLoss"),
    labelled,
    twin=_circle_twin,
    stops="the weights of the pairs",
    needs=("pytorch_metric_learning",),
)


def _cross_batch() -> Any:
    losses = import_module(PML)
    return losses.CrossBatchMemory(losses.ContrastiveLoss(), embedding_size=8, memory_size=48)


right(
    "pytorch-metric-learning CrossBatchMemory",
    _cross_batch,
    labelled,
    needs=("pytorch_metric_learning",),
    stops="the memory",
    twin=lambda z, labels: import_module(PML).ContrastiveLoss()(
        z, labels, ref_emb=z.detach(), ref_labels=labels, indices_tuple=_pairs(labels)
    ),
)


def _pairs(labels: Tensor) -> Any:
    itself = torch.eye(len(labels), dtype=torch.bool)
    same = labels[:, None] == labels
    return (*torch.where(same & ~itself), *torch.where(~same))


for name, options in {
    "DiceLoss": {},
    "FocalLoss": {"alpha": 0.5, "gamma": 2.0, "reduction": "mean"},
    "TverskyLoss": {"alpha": 0.5, "beta": 0.5},
    "LovaszSoftmaxLoss": {},
}.items():
    right(
        f"kornia {name}",
        built(f"kornia.losses.{name}", **options),
        lambda h, g: (h, torch.randint(3, (2, 12, 12), generator=g)),
        needs=("kornia",),
        **IMAGES,
    )
right(
    "kornia SSIM of near images",
    built("kornia.losses.SSIMLoss", 5),
    lambda h, g: (h.sigmoid(), (h + 0.3 * draw(g, h)).sigmoid()),
    needs=("kornia",),
    **IMAGES,
)
right(
    "kornia total variation",
    built("kornia.losses.TotalVariation"),
    lambda h, g: (h,),
    needs=("kornia",),
    **IMAGES,
)
right(
    "kornia rotation by an angle",
    called("kornia.geometry.transform.rotate"),
    lambda h, g: (h, 20 * torch.tanh(h[:, 0, 0, 0])),
    needs=("kornia",),
    **IMAGES,
)

for name, options in {
    "filters.bilateral_blur": {"kernel_size": 3, "sigma_color": 0.2, "sigma_space": (1.5, 1.5)},
    "color.rgb_to_lab": {},
    "filters.median_blur": {"kernel_size": 3},
}.items():
    right(
        f"kornia {name}",
        called(f"kornia.{name}", **options),
        lambda h, g: (h.sigmoid(),),
        needs=("kornia",),
        **IMAGES,
    )
right(
    "kornia dilation",
    lambda: lambda h: import_module("kornia.morphology").dilation(h, torch.ones(3, 3).to(h)),
    lambda h, g: (h,),
    needs=("kornia",),
    **IMAGES,
)
right(
    "kornia rotation by a vector",
    called("kornia.geometry.conversions.axis_angle_to_rotation_matrix"),
    lambda h, g: (h[:, :3],),
    needs=("kornia",),
)

OPS = "torchvision.ops"
right(
    "torchvision roi_align",
    called(f"{OPS}.roi_align", output_size=3, aligned=True),
    lambda h, g: (h, [2 * BOXES.to(h)] * 2),
    needs=("torchvision",),
    alone=False,
    **IMAGES,
)
right(
    "torchvision sigmoid_focal_loss",
    called(f"{OPS}.sigmoid_focal_loss", reduction="mean"),
    lambda h, g: (h, (draw(g, h) > 0).to(h)),
    needs=("torchvision",),
)
for name in ("generalized_box_iou_loss", "distance_box_iou_loss"):
    right(
        f"torchvision {name}",
        called(f"{OPS}.{name}", reduction="mean"),
        lambda h, g: (boxes(h), target_boxes(h)),
        needs=("torchvision",),
    )
right(
    "torchvision deform_conv2d",
    called(f"{OPS}.deform_conv2d"),
    lambda h, g: (h[:, :2], 0.3 * h[:, 2:, :10, :10].repeat(1, 18, 1, 1), draw(g, h, 2, 2, 3, 3)),
    needs=("torchvision",),
    alone=False,
    **IMAGES,
)
right(
    "torchvision stochastic depth",
    called(f"{OPS}.stochastic_depth", p=0.4, mode="row"),
    lambda h, g: (h,),
    needs=("torchvision",),
)
right(
    "torchmetrics SSIM",
    called("torchmetrics.functional.image.structural_similarity_index_measure", data_range=1.0),
    lambda h, g: (h.sigmoid(), draw(g, h).sigmoid()),
    needs=("torchmetrics",),
    **IMAGES,
)
right(
    "torchmetrics Pearson",
    called("torchmetrics.functional.regression.pearson_corrcoef"),
    lambda h, g: (h[:, 0], draw(g, h, 16)),
    needs=("torchmetrics",),
)


def _soft_f1_twin(p: Tensor, y: Tensor) -> Tensor:
    hits = (y * p).sum()
    precision, recall = hits / (p.sum() + 1e-6), hits / (y.sum() + 1e-6)
    return 1 - 2 * precision * recall / (precision + recall + 1e-6)


for name in ("BCEFocalLoss", "TverskyLoss", "LovaszHingeLoss"):
    right(
        f"pytorch-optimizer {name}",
        built(f"pytorch_optimizer.loss.{name}"),
        lambda h, g: (h, (draw(g, h) > 0).to(h)),
        needs=("pytorch_optimizer",),
    )
right(
    "pytorch-optimizer SoftF1Loss",
    built("pytorch_optimizer.loss.SoftF1Loss"),
    lambda h, g: (h.sigmoid(), (draw(g, h) > 0).to(h)),
    twin=_soft_f1_twin,
    stops="nothing, but it rounds to float32 whatever it is given",
    needs=("pytorch_optimizer",),
)
right("frozen features of two images", lambda: _perceptual, lambda h, g: (h, draw(g, h)), **IMAGES)


def _perceptual(a: Tensor, b: Tensor) -> Tensor:
    kernel = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)).to(a)
    return F.mse_loss(F.conv2d(a, kernel).relu(), F.conv2d(b, kernel).relu())
