"""SimCLR (Chen et al., 2020) as a LightningModule, for any loss(z1, z2) or loss(z1, z2, labels).

Shapes: images (B, 3, H, W) uint8, features (B, F), embeddings z1 and z2 (B, D).
"""

import inspect
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cosloss import encode_in_chunks
from experiments.simclr.augmentation import TwoViews
from experiments.simclr.backbones import load_weights
from experiments.simclr.evaluation import probes
from experiments.simclr.evaluation.frozen import Evaluation, evaluate
from experiments.simclr.program.errors import UserError
from experiments.simclr.program.resuming import keep_own_settings
from experiments.simclr.schedules import WarmupCosine


class SimCLR(L.LightningModule):
    """Two augmented views of each image, an encoder, a projection head and a contrastive loss.

    Args:
        encoder: maps normalised images to features; has `num_features`.
        projection_head: called with the number of features; returns what maps them to embeddings.
        views: augments uint8 images into two normalised views, on the training device.
        loss: called with the embeddings of the two views, and with the labels if its forward has a
            parameter of that name; returns a scalar.
        optimizer: called with parameter groups; returns the optimizer.
        warmup_epochs: linear warm-up of the learning rate; a cosine to zero follows, or a constant
            rate where training has no end.
        knn_k: neighbours of the k-NN evaluation.
        knn_temperature: temperature of its weights exp(similarity / temperature).
        weights: a file with the encoder's first weights: `backbones.load_weights`.
        frozen: leave the encoder as it is, and train the projection head alone.
        grad_cache_chunk: images whose activations are in memory at a time, for batches beyond the
            memory; the backward pass encodes again. It wants a norm that sees one image alone.
    """

    def __init__(
        self,
        encoder: nn.Module,
        projection_head: Callable[[int], nn.Module],
        views: TwoViews,
        loss: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer],
        warmup_epochs: float = 1.0,
        knn_k: int = 20,
        knn_temperature: float = 0.1,
        weights: str | None = None,
        frozen: bool = False,
        grad_cache_chunk: int | None = None,
    ) -> None:
        super().__init__()
        if weights is not None:
            load_weights(encoder, weights)
        self.encoder = encoder.requires_grad_(not frozen)
        self.frozen = frozen
        self.projection_head = projection_head(encoder.num_features)
        self.views = views
        if (wanted := getattr(encoder, "normalization", None)) is not None:
            views.standardize_by(*wanted)
        self.loss = loss
        self.make_optimizer = optimizer
        self.warmup_epochs = warmup_epochs
        self.knn = {"k": knn_k, "temperature": knn_temperature}
        self.evaluation: Evaluation | None = None  # what the test found
        self._features: list[Tensor] = []
        self.grad_cache_chunk = grad_cache_chunk
        self._check_grad_cache()
        # so that a hyperparameter that either refuses is refused before anything is written
        self._loss(torch.eye(2), torch.eye(2), torch.arange(2))
        optimizer([nn.Parameter(torch.zeros(2))])

    def forward(self, images: Tensor) -> Tensor:
        """Features of uint8 images, without augmentation."""
        return self.encoder(self.views.normalize(images).to(self.dtype))

    def train(self, mode: bool = True) -> "SimCLR":
        super().train(mode)
        if self.frozen:
            self.encoder.eval()  # the statistics of batch norm, too, stay as they are
        return self

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self._contrast(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        images = batch["image"]
        self.log("val/loss", self._contrast(batch), batch_size=len(images), sync_dist=True)
        self._features.append(self(images))

    def on_validation_epoch_end(self) -> None:
        data, features = self.trainer.datamodule, self._pop_features()
        if not features.isfinite().all():
            score = math.nan
        elif data.num_classes is None:
            score = -self.trainer.callback_metrics["val/loss"]
        else:
            train_features = self.features(data.train_images)
            seen = data.val_labels[: len(features)]  # all, unless trainer.limit_val_batches
            labels, val_labels = (x.to(self.device) for x in (data.train_labels, seen))
            score = probes.knn_accuracy(train_features, labels, features, val_labels, **self.knn)
            self.log("val/knn", score, prog_bar=True, sync_dist=True)
        # what best.ckpt is best at
        self.log("val/score", score, logger=False, sync_dist=True)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._features.append(self(batch["image"]))

    def on_test_epoch_end(self) -> None:
        data, features = self.trainer.datamodule, self._pop_features()
        train_features = self.features(data.train_images)
        self.evaluation = evaluate(data, train_features, features, **self.knn)
        self.log_dict(self.evaluation.scores, sync_dist=True)

    @torch.no_grad()
    def features(self, images: Tensor, chunk: int = 512) -> Tensor:
        """Encoder features of many uint8 images, in evaluation mode."""
        training = self.training
        self.eval()
        features = [self(part.to(self.device)).float() for part in images.split(chunk)]
        self.train(training)
        return torch.cat(features)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained, as an optimizer takes it."""
        # biases and normalisation parameters have one dimension, and are not decayed
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.make_optimizer(self.parameter_groups())
        keep_own_settings(optimizer)
        trainer = self.trainer
        trainer.fit_loop.setup_data()  # counts num_training_batches
        # infinite, where trainer.limit_train_batches=0 has nothing train
        batches = min(trainer.num_training_batches, sys.maxsize)
        schedule = WarmupCosine(
            optimizer,
            self.warmup_epochs,
            epochs=math.inf if trainer.max_epochs == -1 else trainer.max_epochs,
            steps_per_epoch=max(1, math.ceil(batches / trainer.accumulate_grad_batches)),
            max_steps=trainer.max_steps,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _contrast(self, batch: Mapping[str, Tensor]) -> Tensor:
        views = self.views(batch["image"])
        z1, z2 = self._embed(torch.cat(views)).chunk(2)
        self.embeddings = z1.detach(), z2.detach()
        return self._loss(z1, z2, batch.get("label"))

    def _embed(self, images: Tensor) -> Tensor:
        network = nn.Sequential(self.encoder, self.projection_head)
        if self.grad_cache_chunk is None:
            return network(images)
        return encode_in_chunks(network, images, self.grad_cache_chunk)

    def _check_grad_cache(self) -> None:
        if self.grad_cache_chunk is None:
            return
        if self.grad_cache_chunk < 1:
            raise UserError(
                f"model.grad_cache_chunk must be at least 1; got {self.grad_cache_chunk}"
            )
        for part in (self.projection_head, *([] if self.frozen else [self.encoder])):
            if any(isinstance(module, _BatchNorm) for module in part.modules()):
                raise UserError(
                    "model.grad_cache_chunk does not go with batch norm, whose statistics would be "
                    "a chunk's: choose model.encoder.norm=group"
                )

    def _loss(self, z1: Tensor, z2: Tensor, labels: Tensor | None) -> Tensor:
        if "labels" not in inspect.signature(self.loss.forward).parameters:
            return self.loss(z1, z2)
        if labels is None:
            raise UserError(
                f"{type(self.loss).__name__} needs labels, and the images have none: "
                "sort them into class folders, or choose a loss without labels"
            )
        return self.loss(z1, z2, labels)

    def _pop_features(self) -> Tensor:
        features = torch.cat([part.float() for part in self._features])
        self._features.clear()
        return features


class SimCLRByName(SimCLR):
    """SimCLR whose encoder's settings that people choose first stand beside its own.

    Args:
        name: of the encoder's model; the encoder was built with it, as with `pretrained`.
        pretrained: whether its library's weights were asked for.
        arguments: SimCLR's.
    """

    def __init__(self, name: str, pretrained: bool, **arguments: Any) -> None:
        super().__init__(**arguments)
