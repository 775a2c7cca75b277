"""These losses under other libraries' calls: a training loop that is there keeps its own.

Nothing of those libraries is imported. What they do otherwise stands in docs/swapping.md.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cosloss.arguments import (
    check_callable,
    check_choice,
    check_flags,
    check_number,
    described,
)
from cosloss.distributed import Gather
from cosloss.functional import info_nce_loss, sigmoid_contrastive_loss, sup_con_loss
from cosloss.functional._checks import check_floating, check_gather, check_scalar
from cosloss.functional._dims import check_dims

DIRECTIONS = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")
HARDNESS = {"in_batch_negatives": "in_batch", "hard_negatives": "hard", "all_negatives": "all"}


class _Gathering(nn.Module):
    """Abstract: a loss with the option to take negatives from all processes."""

    def __init__(self, gather_distributed: Gather = False) -> None:
        super().__init__()
        check_gather(gather_distributed)
        self.gather_distributed = gather_distributed


class ClipLoss(_Gathering):
    """open_clip's `ClipLoss`: `loss(image_features, text_features, logit_scale)`.

    Args:
        gather_distributed: take negatives from all processes; every process then returns the joined
            batch's loss, and after DDP's averaging has its gradient. "ring" does so in memory that
            does not grow with them.

    Shape:
        image_features: (N, D), floating point; they need not be normalised.
        text_features: (N, D).
        logit_scale: one positive number, 1 / temperature; it may require a gradient.
        logit_bias: one number, which changes nothing, as in theirs.
        Output: one number; {"contrastive_loss": it} with output_dict.
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        loss = info_nce_loss(
            image_features,
            text_features,
            _temperature(logit_scale),
            symmetric=True,
            gather_distributed=self.gather_distributed,
        )
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(_Gathering):
    """open_clip's `SigLipLoss`: `loss(image_features, text_features, logit_scale, logit_bias)`.

    Args:
        gather_distributed: as of `ClipLoss`.

    Shape:
        image_features: (N, D), floating point; they need not be normalised.
        text_features: (N, D).
        logit_scale: one positive number, 1 / temperature; it may require a gradient.
        logit_bias: one number; it may require a gradient.
        Output: one number; {"contrastive_loss": it} with output_dict.
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        loss = sigmoid_contrastive_loss(
            image_features,
            text_features,
            _temperature(logit_scale),
            0.0 if logit_bias is None else logit_bias,
            gather_distributed=self.gather_distributed,
        )
        return {"contrastive_loss": loss} if output_dict else loss


class MultipleNegativesRankingLoss(nn.Module):
    """sentence-transformers' loss of that name: `loss(sentence_features, labels)`, for its trainer.

    Columns of the dataset are queries, their answers, then hard negatives, if any.

    Args:
        model: gives {"sentence_embedding": (N, D)} of each of the sentence features.
        scale: 1 / temperature.
        gather_across_devices: take negatives from all processes.
        directions: "query_to_doc" and any of "doc_to_query", "query_to_query", "doc_to_doc".
        partition_mode: "joint", all in one softmax, or "per_direction", the mean of two losses, of
            which neither compares queries with queries or documents with documents.
        hardness_mode: the negatives that hardness_strength weighs: "in_batch_negatives",
            "hard_negatives", "all_negatives", or None of them.
        hardness_strength: times the similarity, without its gradient, is added to their logits.
        matryoshka_dims: sum the losses of the embeddings' first columns, so many at a time, as a
            `MatryoshkaLoss` around this one does; they share their products here.
        matryoshka_weights: what each of those is multiplied by; 1 by default.
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        gather_across_devices: bool = False,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        matryoshka_dims: Sequence[int] | None = None,
        matryoshka_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_callable("model", model)
        check_number("scale", scale, 0, above=True)
        check_flags(gather_across_devices=gather_across_devices)
        check_choice("partition_mode", partition_mode, ("joint", "per_direction"))
        for name in directions:
            check_choice("directions", name, DIRECTIONS)
        if partition_mode == "per_direction" and not set(directions) <= {*DIRECTIONS[:2]}:
            raise ValueError(
                "partition_mode must be 'joint' with 'query_to_query' or 'doc_to_doc', whose own "
                "softmax would lack the pair"
            )
        if hardness_mode is not None:
            check_choice("hardness_mode", hardness_mode, HARDNESS)
        check_dims(matryoshka_dims, matryoshka_weights)
        self.model, self.scale = model, scale
        self.gather_across_devices = gather_across_devices
        self.directions, self.partition_mode = tuple(directions), partition_mode
        self.hardness_mode, self.hardness_strength = hardness_mode, hardness_strength
        self.matryoshka_dims, self.matryoshka_weights = matryoshka_dims, matryoshka_weights
        self._options: dict[str, Any] = {}
        if partition_mode == "joint":
            self._options["directions"] = [name.replace("doc", "key") for name in directions]
        if hardness_mode is not None:
            self._options["hardness"] = hardness_strength
            self._options["hardness_on"] = HARDNESS[hardness_mode]

    def forward(
        self, sentence_features: Sequence[Mapping[str, Any]], labels: Tensor | None = None
    ) -> Tensor:
        embeddings = [self.model(features)["sentence_embedding"] for features in sentence_features]
        if len(embeddings) < 2:
            raise ValueError(
                "sentence_features must be of two columns or more, queries and their answers; "
                f"got {len(embeddings)}"
            )
        query, key, *hard = embeddings
        loss = partial(
            info_nce_loss,
            temperature=1 / self.scale,
            gather_distributed=self.gather_across_devices,
            dims=self.matryoshka_dims,
            dim_weights=self.matryoshka_weights,
        )
        given = torch.stack(hard, 1) if hard else None
        there = loss(query, key, hard_negatives=given, **self._options)
        if self.partition_mode == "joint" or len(set(self.directions)) == 1:
            return there
        return (there + loss(key, query)) / 2

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as the trainer writes them into a model card."""
        prefixes = {
            "matryoshka_dims": self.matryoshka_dims,
            "matryoshka_weights": self.matryoshka_weights,
        }
        return {
            "scale": self.scale,
            "similarity_fct": "cos_sim",
            "gather_across_devices": self.gather_across_devices,
            "directions": self.directions,
            "partition_mode": self.partition_mode,
            "hardness_mode": self.hardness_mode,
            "hardness_strength": self.hardness_strength,
            **(prefixes if self.matryoshka_dims is not None else {}),
        }


class SupContrastLoss(nn.Module):
    """SupContrast's `SupConLoss`, which is SimCLR's loss without labels: `loss(features, labels)`.

    Args:
        temperature: positive.
        base_temperature: the loss is multiplied by temperature / base_temperature.

    Shape:
        features: (N, V, ...), V views of each item, floating point; what follows is flattened.
        labels: (N,), a class of each item; without them its own views are its positives.
        Output: one number.
    """

    def __init__(self, temperature: float = 0.07, base_temperature: float = 0.07) -> None:
        super().__init__()
        check_number("temperature", temperature, 0, above=True)
        check_number("base_temperature", base_temperature, 0, above=True)
        self.temperature, self.base_temperature = temperature, base_temperature

    def forward(
        self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        check_floating(features=features)
        if features.ndim < 3:
            raise ValueError(
                f"features must have shape (N, V, D), V views of N items; got "
                f"{tuple(features.shape)}"
            )
        if mask is not None:
            raise ValueError(
                f"mask is not taken, got {described(mask)}: use labels, equal where it is 1"
            )
        n, views = features.shape[:2]
        z = features.flatten(2).transpose(0, 1).flatten(0, 1)
        if labels is None:
            labels = torch.arange(n, device=features.device)
        elif labels.shape not in ((n,), (n, 1)):
            raise ValueError(f"labels must have shape ({n},); got {described(labels)}")
        loss = sup_con_loss(z, labels.view(n).repeat(views), self.temperature)
        return loss * (self.temperature / self.base_temperature)


class MetricLearningLoss(nn.Module):
    """A loss of embeddings and labels under pytorch-metric-learning's call, for its trainers.

    Args:
        loss: of `(embeddings, labels)`, as `SupConLoss()`.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        check_callable("loss", loss)
        self.loss = loss

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        given = {"indices_tuple": indices_tuple, "ref_emb": ref_emb, "ref_labels": ref_labels}
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"{name} must be None, got {described(value)}: the loss takes all pairs of the "
                    "batch, and no mined or other ones"
                )
        loss: Tensor = self.loss(embeddings, labels)
        return loss


def _temperature(logit_scale: float | Tensor) -> float | Tensor:
    check_scalar("logit_scale", logit_scale)
    if isinstance(logit_scale, Tensor):
        return 1 / logit_scale.to(torch.promote_types(logit_scale.dtype, torch.float32))
    check_number("logit_scale", logit_scale, 0, above=True)
    return 1 / logit_scale
