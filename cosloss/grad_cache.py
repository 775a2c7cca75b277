"""Batches of a contrastive loss that are larger than the encoder's memory: gradient caching.

The loss needs every embedding of the batch at once, the encoder needs none of the others. So each
chunk of the inputs is encoded without keeping activations, the loss is taken of all embeddings, and
the backward pass encodes chunk by chunk again to go through it. That is an encoder's forward pass
more, a third of a step, for activations of one chunk in place of the batch's; and it is exact.

Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from cosloss.arguments import check_callable, check_count, described

Encoder = Callable[..., Tensor]

# embeddings that another draw of dropout gives differ by about their size, roundings by far less
LARGEST_DIFFERENCE = 0.01


class GradCache(nn.Module):
    """A loss of embeddings whose encoders run chunk by chunk; its gradient is the whole batch's.

    Called with an input for each encoder, or with several views for one encoder; further keyword
    arguments are the loss's. The result is differentiated like any loss, so that autocast, gradient
    scaling, clipping and accumulation stay as they are. Dropout draws in the backward pass what it
    drew in the forward pass.

    Args:
        encoders_and_loss: encoders, then the loss. An encoder maps an input to embeddings (N, D);
            modules among them are sub-modules, `encoders` and `loss`.
        chunk_size: items that are encoded at once; one number, or one for each encoder.

    Shape:
        Inputs: a tensor (N, ...); a tuple or list of arguments; or a mapping of keyword arguments,
        as tokenizers give. All tensors have the same first dimension, which is cut into chunks.
        What is no tensor goes to every chunk.

    Raises:
        TypeError: chunk_size is not a whole number, an encoder or the loss cannot be called, or an
            encoder gives no tensor.
        ValueError: chunk_size is not positive, the number of inputs does not fit the encoders, an
            input has no batch, an encoder gives another number of rows, or mixes the items of a
            chunk by batch normalisation.
        RuntimeError: an encoder changes a buffer, which would happen twice in each step; or gives
            other embeddings in the backward pass, as with randomness of a generator of its own.

    In several processes wrap the whole, `DistributedDataParallel(GradCache(...))`, and not the
    encoder: gradients are then exchanged once, after the last chunk.

    Example:
        >>> import torch
        >>> from cosloss import GradCache, NTXentLoss
        >>> step = GradCache(torch.nn.Linear(8, 4), NTXentLoss(), chunk_size=16)
        >>> loss = step(torch.randn(64, 8), torch.randn(64, 8))
        >>> loss.backward()
        >>> step.encoders[0].weight.grad.shape
        torch.Size([4, 8])

    Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
    2021.
    """

    def __init__(
        self, *encoders_and_loss: Callable[..., Any], chunk_size: int | Sequence[int]
    ) -> None:
        super().__init__()
        if len(encoders_and_loss) < 2:
            raise TypeError("GradCache needs an encoder and a loss: GradCache(encoder, loss, ...)")
        *encoders, loss = encoders_and_loss
        for name, part in (*(("encoder", encoder) for encoder in encoders), ("loss", loss)):
            check_callable(name, part)
        for encoder in encoders:
            if isinstance(encoder, DistributedDataParallel):
                raise TypeError(
                    "encoder is wrapped in DistributedDataParallel, which would not exchange "
                    "gradients here; use DistributedDataParallel(GradCache(encoder.module, ...))"
                )
        sizes: list[Any]
        if isinstance(chunk_size, Sequence) and not isinstance(chunk_size, str):
            sizes = list(chunk_size)
        else:
            sizes = [chunk_size] * len(encoders)  # refused below if it is no number
        if len(sizes) != len(encoders):
            raise ValueError(
                f"chunk_size must be one number, or one for each of {len(encoders)} encoders; "
                f"got {len(sizes)}"
            )
        for size in sizes:
            _check_chunk_size(size)
        self.chunk_sizes = sizes
        self.encoders = nn.ModuleList(
            x if isinstance(x, nn.Module) else _Function(x) for x in encoders
        )
        self.loss = loss

    def forward(self, *inputs: Any, **loss_arguments: Any) -> Any:
        """What the loss gives for the inputs' embeddings."""
        encoders, sizes = list(self.encoders), self.chunk_sizes
        if len(encoders) == 1:
            encoders, sizes = encoders * len(inputs), sizes * len(inputs)
        if not inputs or len(inputs) != len(encoders):
            raise ValueError(
                f"needs an input for each of {len(encoders) or 'its'} encoders; got {len(inputs)}"
            )
        embeddings = [
            encode_in_chunks(encoder, given, size)
            for encoder, given, size in zip(encoders, inputs, sizes, strict=True)
        ]
        return self.loss(*embeddings, **loss_arguments)

    def extra_repr(self) -> str:
        return f"chunk_sizes={self.chunk_sizes}"


def encode_in_chunks(encoder: Encoder, inputs: Any, chunk_size: int) -> Tensor:
    """The embeddings of a batch, with activations of one chunk at a time.

    The backward pass encodes each chunk again. Without gradients, as in evaluation, chunks are
    encoded once.

    Args:
        encoder: maps inputs to embeddings (N, D).
        inputs: a tensor (N, ...); a tuple or list of arguments; or a mapping of keyword arguments.
        chunk_size: items that are encoded at once.

    Returns:
        (N, D), of the encoder's dtype.

    Raises:
        TypeError, ValueError, RuntimeError: as `GradCache`.
    """
    check_callable("encoder", encoder)
    _check_chunk_size(chunk_size)
    rows = _batch_size(inputs)
    recorded = torch.is_grad_enabled()
    modules = list(encoder.modules()) if isinstance(encoder, nn.Module) and recorded else []
    _refuse_batch_norm(modules)
    buffers = [(name, buffer, buffer._version) for name, buffer in _buffers(modules)]
    parts = []
    for start in range(0, rows, chunk_size):
        arguments, keywords = _chunk(inputs, slice(start, start + chunk_size))
        if recorded:
            run = _Repeatable(encoder, modules)
            # else the second run ends before its embeddings are known
            with set_checkpoint_early_stop(False):
                part = checkpoint(run, *arguments, use_reentrant=False, **keywords)
        else:
            part = encoder(*arguments, **keywords)
        _check_embeddings(part, min(chunk_size, rows - start))
        parts.append(part)
        if start == 0:
            _refuse_changes(buffers)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Repeatable:
    """An encoder that is run on a chunk twice, and is to give the same embeddings both times."""

    def __init__(self, encoder: Encoder, modules: Sequence[nn.Module]) -> None:
        self._encoder = encoder
        self._weights = [w for module in modules for w in module.parameters(recurse=False)]
        self._versions: list[int] = []
        self._first: Tensor | None = None

    def __call__(self, *arguments: Any, **keywords: Any) -> Tensor:
        found = self._encoder(*arguments, **keywords)
        if not isinstance(found, Tensor):
            return found
        versions = [w._version for w in self._weights]
        if self._first is None:
            self._first, self._versions = found.detach(), versions
        elif versions != self._versions:
            raise RuntimeError(
                "the encoder's weights changed between the forward and the backward pass, which "
                "needs them; call the optimizer after backward()"
            )
        else:
            self._compare(found.detach())
        return found

    def _compare(self, again: Tensor) -> None:
        first = self._first
        # on an accelerator a comparison waits for it: the first one is enough
        if first is None or not first.numel() or (not first.is_cpu and self._encoder in _compared):
            return
        if (first - again).abs().amax() > LARGEST_DIFFERENCE * first.abs().amax():
            raise RuntimeError(
                "the encoder gave other embeddings when it encoded a chunk again for its gradient; "
                "draw its random numbers from torch's default generators, which are replayed"
            )
        _compared.add(self._encoder)


class _Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Encoder) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
        return self.function(*arguments, **keywords)


_compared = WeakSet[Encoder]()


def _check_chunk_size(size: Any) -> None:
    check_count("chunk_size", size)


def _parts(inputs: Any) -> tuple[list[Any], dict[str, Any]]:
    """The arguments and keyword arguments of an encoder's call."""
    if isinstance(inputs, Mapping):
        return [], dict(inputs)
    return (list(inputs), {}) if isinstance(inputs, tuple | list) else ([inputs], {})


def _batch_size(inputs: Any) -> int:
    arguments, keywords = _parts(inputs)
    tensors = [x for x in (*arguments, *keywords.values()) if isinstance(x, Tensor)]
    shapes = [tuple(x.shape) for x in tensors]
    sizes = {shape[:1] for shape in shapes}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            "inputs must be a tensor (N, ...), or a tuple or mapping of tensors of one first "
            f"dimension; got {', '.join(map(str, shapes)) or described(inputs)}"
        )
    if not (rows := shapes[0][0]):
        raise ValueError(f"inputs must have at least one item; got {described(tensors[0])}")
    return rows


def _chunk(inputs: Any, rows: slice) -> tuple[list[Any], dict[str, Any]]:
    arguments, keywords = _parts(inputs)

    def cut(x: Any) -> Any:
        return x[rows] if isinstance(x, Tensor) else x

    return [cut(x) for x in arguments], {name: cut(x) for name, x in keywords.items()}


def _check_embeddings(found: Any, rows: int) -> None:
    if not isinstance(found, Tensor):
        raise TypeError(
            f"an encoder must give a tensor of embeddings (N, D); got {type(found).__name__}"
        )
    if found.ndim < 1 or found.shape[0] != rows:
        raise ValueError(
            f"an encoder must give a row for each of a chunk's {rows} items; "
            f"got shape {tuple(found.shape)}"
        )


def _refuse_batch_norm(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        if isinstance(module, _BatchNorm) and module.training:
            raise ValueError(
                f"the encoder has {type(module).__name__} in training mode, whose statistics would "
                "be a chunk's and not the batch's; use group or layer norm, or .eval() on it"
            )


def _buffers(modules: Sequence[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for module in modules:
        for name, buffer in module.named_buffers(recurse=False):
            yield f"{type(module).__name__}.{name}", buffer


def _refuse_changes(before: Sequence[tuple[str, Tensor, int]]) -> None:
    for name, buffer, version in before:
        if buffer._version != version:
            raise RuntimeError(
                f"the encoder changes its buffer {name} in the forward pass, which runs twice for "
                "each chunk: its value would not be that of one step"
            )
