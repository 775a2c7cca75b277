"""Encoders of timm and torchvision by name, and weights for any encoder from a file.

An encoder is the network without its classifier, with three attributes: `num_features`;
`normalization`, the mean and standard deviation that its inputs want; and `dropped_head`, where the
classifier was.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models

from experiments.simclr.program.errors import UserError

Library = Literal["timm", "torchvision"]
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def timm_encoder(
    name: str,
    image_size: int,
    pretrained: bool = False,
    channels_last: bool = False,
    compile: bool = False,
) -> nn.Module:
    """A model of timm's, which the extra `timm` installs.

    Args:
        name: as in `timm.list_models()`, with a tag of its weights or without.
        image_size: height and width of the images.
        pretrained: download the weights that timm has for it, or take them from its cache.
        channels_last: keep the weights, and so the activations, with the channels innermost.
        compile: let torch.compile make kernels of it at the first call.
    """
    timm, config = _timm_config(name)

    def build() -> nn.Module:
        return timm.create_model(name, pretrained=pretrained, num_classes=0)

    net = _downloaded(build, name) if pretrained else build()
    if config.fixed_input_size and image_size != config.input_size[-1]:
        if not hasattr(net, "set_input_size"):
            raise _wrong_size(name, image_size, config.input_size[-1])
        net.set_input_size(img_size=(image_size, image_size))
    net.dropped_head = config.classifier
    net.normalization = config.mean, config.std
    return _finished(net, name, image_size, config.input_size[-1], channels_last, compile)


def torchvision_encoder(
    name: str,
    image_size: int,
    pretrained: bool = False,
    channels_last: bool = False,
    compile: bool = False,
) -> nn.Module:
    """A classifier of torchvision's without its last layer.

    Args:
        name: as in `torchvision.models.list_models(torchvision.models)`.
        image_size: height and width of the images.
        pretrained: download torchvision's best weights for it, or take them from torch's cache.
        channels_last: keep the weights, and so the activations, with the channels innermost.
        compile: let torch.compile make kernels of it at the first call.

    Example:
        >>> import torch
        >>> torchvision_encoder("mobilenet_v3_small", 32).eval()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 1024])
    """
    own_size, normalization, weights = _torchvision_config(name)
    if pretrained:
        if weights is None:
            raise UserError(f"torchvision has no weights for {name}: set model.pretrained=false")
        net = _downloaded(lambda: models.get_model(name, weights=weights), name)
    else:
        net = models.get_model(name, weights=None, **_settings(name, image_size))
    for auxiliary in ("aux1", "aux2", "AuxLogits"):  # classifiers that GoogLeNet learns with
        if hasattr(net, auxiliary):
            net.aux_logits = False
            setattr(net, auxiliary, None)
    place, _ = [m for m in net.named_modules() if isinstance(m[1], nn.Linear | nn.Conv2d)][-1]
    net.set_submodule(place, nn.Identity())
    net.dropped_head = place
    net.normalization = normalization
    return _finished(net, name, image_size, own_size, channels_last, compile)


def input_size(library: Library, name: str) -> int:
    """Height and width of the images that the model was made for.

    Example:
        >>> input_size("torchvision", "inception_v3")
        299
    """
    if not isinstance(name, str):
        raise UserError(f"model.name must be the name of a model; got {name!r}")
    if library == "torchvision":
        return _torchvision_config(name)[0]
    return _timm_config(name)[1].input_size[-1]


def load_weights(encoder: nn.Module, path: str) -> None:
    """Give the encoder the parameters that a file holds: all of them, or a UserError.

    The file is of safetensors or torch.save: parameters by name, or a checkpoint that holds them,
    of this program too. Names may have a prefix, as in `backbone.conv1.weight`. What the encoder
    does not have may be there, if it is of a head.
    """
    wanted = encoder.state_dict()
    found = _without_prefix(_read(path), wanted)
    counters = {name for name in wanted if name.endswith("num_batches_tracked")}
    missing = [n for n in wanted if n not in found and n not in counters]
    different = [n for n in wanted if n in found and found[n].shape != wanted[n].shape]
    head = getattr(encoder, "dropped_head", None)
    heads = (head,) if isinstance(head, str) else tuple(head or ())
    own = {name.partition(".")[0] for name in wanted}
    more = [
        name
        for name in found
        if name not in wanted
        and name.partition(".")[0] in own
        and not name.startswith(tuple(f"{head}." for head in heads))
    ]
    for names, what in (
        (missing, "not there"),
        (different, "of another shape"),
        (more, "too many"),
    ):
        if names:
            raise UserError(
                f"{path} holds the weights of another model: of {len(wanted)} parameters "
                f"{len(names)} {'is' if len(names) == 1 else 'are'} {what}, first {names[0]}"
            )
    encoder.load_state_dict({n: found[n] for n in wanted if n in found}, strict=False)


def _read(path: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise UserError(f"model.weights={path}: there is no such file")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        saved: Any = torch.load(path, map_location="cpu", weights_only=True)
    # torch raises RuntimeError, UnpicklingError, EOFError, KeyError and more
    except (SafetensorError, Exception) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"model.weights={path} cannot be read: {reason}") from error
    for key in ("state_dict", "model_state_dict", "model", "teacher"):
        if isinstance(saved, Mapping) and isinstance(saved.get(key), Mapping):
            saved = saved[key]
    tensors = saved.items() if isinstance(saved, Mapping) else ()
    return {str(name): value for name, value in tensors if isinstance(value, Tensor)}


def _without_prefix(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What lies below the prefix that most of the wanted names have."""
    first = next(iter(wanted))
    prefixes = [name.removesuffix(first) for name in found if name.endswith(first)]

    def hits(prefix: str) -> int:
        return sum(prefix + name in found for name in wanted)

    best = max(prefixes, key=hits, default="")
    return {n.removeprefix(best): value for n, value in found.items() if n.startswith(best)}


def _finished(
    net: nn.Module, name: str, image_size: int, own_size: int, channels_last: bool, compile: bool
) -> nn.Module:
    training = net.training
    try:
        with torch.no_grad():
            features = net.eval()(torch.zeros(1, 3, image_size, image_size))
    # a layer that the image has become too small for, and models of one size, raise what they like
    except Exception as error:
        raise _wrong_size(name, image_size, own_size) from error
    net.train(training)
    net.num_features = features.shape[1]
    if channels_last:
        net.to(memory_format=torch.channels_last)
    if compile:
        net.compile()  # in place: the names in a checkpoint stay
    return net


def _downloaded(build: Any, name: str) -> nn.Module:
    try:
        return build()
    # the libraries let through what their clients raise, from URLError to a hub's own errors
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"could not get the weights of {name} ({reason}): where there is no network, set "
            "model.pretrained=false and model.weights=FILE"
        ) from error


def _wrong_size(name: str, image_size: int, own_size: int) -> UserError:
    return UserError(
        f"{name} takes no images of {image_size} x {image_size}: set data.image_size={own_size}"
    )


def _timm_config(name: str) -> tuple[Any, Any]:
    try:
        import timm
    except ImportError as error:
        raise UserError('model=timm needs the extra timm: pip install -e ".[timm]"') from error
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    try:
        return timm, timm.get_pretrained_cfg(name)
    except (RuntimeError, ValueError) as error:  # a tag that is not there
        tagged = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        raise _unknown("timm", name, tagged) from error


def _torchvision_config(name: str) -> tuple[int, tuple[Sequence[float], Sequence[float]], Any]:
    known = models.list_models(models)
    if name not in known:
        raise _unknown("torchvision", name, known)
    try:
        weights = models.get_model_weights(name).DEFAULT
    except (ValueError, AttributeError):
        return 224, IMAGENET, None
    asks = weights.transforms()
    return asks.crop_size[0], (tuple(asks.mean), tuple(asks.std)), weights


def _settings(name: str, image_size: int) -> dict[str, Any]:
    if name.startswith("vit_"):
        return {"image_size": image_size}
    # without it torchvision warns that it may initialise them otherwise one day
    return {"init_weights": True} if name in ("googlenet", "inception_v3") else {}


def _unknown(library: str, name: str, known: Sequence[str]) -> UserError:
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"; near it there are {', '.join(near)}" if near else ""
    return UserError(f"{library} has no model {name!r}{hint}")
