"""Cosine similarity, row-wise and pairwise, and the cosine embedding loss."""

from functools import reduce as reduce_with

import torch
from jaxtyping import Float
from torch import Tensor

from cosloss.arguments import (
    TorchArgumentError,
    check_device,
    check_number,
    check_tensor,
    described,
)
from cosloss.functional._checks import (
    check_floating,
    check_margin,
    check_pairs,
    check_real,
    check_reduction,
    reduce,
)
from cosloss.functional.in_batch_cosine import in_batch_cosine_embedding_loss
from cosloss.modes import autocast_dtype, readable, without_autocast
from cosloss.ops.cosine_similarity import cosine_distance
from cosloss.ops.cosine_similarity import cosine_similarity as row_wise
from cosloss.ops.pairwise_cosine_similarity import pairwise_cosine_similarity as pairwise

EMBEDDING_LOSS_EPS = 1e-8


def cosine_similarity(
    x1: Float[Tensor, "..."], x2: Float[Tensor, "..."], dim: int = 1, eps: float = 1e-8
) -> Float[Tensor, "..."]:
    """Cosine similarity of x1 and x2 along `dim`: torch's function, with an analytic gradient.

    S = <x1, x2> / (max(|x1|, eps) max(|x2|, eps))

    Args:
        x1: floating-point tensor; an integer one is promoted to the other's dtype.
        x2: the same; its shape broadcasts with x1's.
        dim: dimension of the broadcast shape along which the vectors lie.
        eps: each norm is clamped to at least eps >= 0; the gradient is the true derivative of the
            clamped function, below eps too.

    Returns:
        The similarities, in the broadcast shape without `dim`, in the promoted dtype, always in
        [-1, 1]; that of a vector with itself is exactly 1 unless eps clamps it. A zero row has
        similarity 0 and gradient 0. A row with a NaN or infinite entry gives NaN, and only it.

    Raises:
        TypeError: an input is not a tensor, eps no number or dim no integer.
        RuntimeError: (a ValueError too) the promoted dtype is not real floating point, the shapes
            do not broadcast, the inputs are on two devices, or eps is negative or not finite.
        IndexError: dim is out of range.

    Example:
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> cosine_similarity(x, torch.tensor([[1.0, 0.0]]))
        tensor([0.6000])

    Source: torch.nn.functional.cosine_similarity.
    """
    x1, x2 = _promoted(eps, x1=x1, x2=x2)
    if type(dim) is not int:
        check_dim(dim)
    if x1.device.type != "cpu":  # on the CPU, torch.autocast leaves this function alone
        x1, x2 = _autocast(x1), _autocast(x2)
    x1, x2 = (_last(x, dim) for x in _broadcast(x1, x2))
    return row_wise(x1, x2, eps)


def pairwise_cosine_similarity(
    x1: Float[Tensor, "*batch n d"],
    x2: Float[Tensor, "*batch m d"] | None = None,
    eps: float = 1e-8,
) -> Float[Tensor, "*batch n m"]:
    """Cosine similarity of every row of x1 with every row of x2, by one matrix product.

    S_ij = <x1_i, x2_j> / (max(|x1_i|, eps) max(|x2_j|, eps))

    Args:
        x1: (N, D), floating point; leading batch dimensions may precede.
        x2: (M, D); None compares x1 with itself.
        eps: each norm is clamped to at least eps >= 0.

    Returns:
        (N, M), in [-1, 1], in the promoted dtype. Without x2 it is exactly symmetric and its
        diagonal is exactly 1, except for rows that eps clamps. A zero row has similarity 0 and
        gradient 0.

    Raises:
        TypeError: an input is not a tensor, or eps no number.
        RuntimeError: (a ValueError too) the promoted dtype is not real floating point, the inputs
            are on two devices, or eps is negative or not finite.
        ValueError: an input has fewer than two dimensions, or the shapes do not match.

    Example:
        >>> pairwise_cosine_similarity(torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
        tensor([[1.0000, 0.6000],
                [0.6000, 1.0000]])

    Source: sklearn.metrics.pairwise.cosine_similarity.
    """
    if x2 is None:
        check_tensor(x1=x1)
        (x1,) = _promoted(eps, x1=x1)
    else:
        x1, x2 = _promoted(eps, x1=x1, x2=x2)
    other = x1 if x2 is None else x2
    if min(x1.ndim, other.ndim) < 2 or (x1.shape[:-2], x1.shape[-1]) != (
        other.shape[:-2],
        other.shape[-1],
    ):
        raise ValueError(
            "x1 and x2 must have shapes (..., N, D) and (..., M, D); "
            f"got {tuple(x1.shape)} and {tuple(other.shape)}"
        )
    # autocast would round the unit rows, and the products, to half precision
    with without_autocast(x1):
        return pairwise(x1, x2, eps)


def cosine_embedding_loss(
    input1: Float[Tensor, "*n d"],
    input2: Float[Tensor, "*n d"],
    target: Tensor | None = None,
    margin: float = 0.0,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Float[Tensor, "..."]:
    """Cosine embedding loss of labelled pairs, or of a whole batch of positive pairs.

    With a target y:    l = 1 - S where y = 1, and max(0, S - margin) where y = -1.
    Without a target:   l_i = 1 - S_i,pos(i) + mean_j max(0, S_ij - margin), for each of the 2N rows
    of both inputs; rows i of input1 and input2 are positives, all other rows are negatives.

    Args:
        input1: (N, D), (D,) or (..., D), floating point.
        input2: a shape that broadcasts with input1's.
        target: every entry 1 or -1; broadcasts to the inputs' shape without D. None for the
            in-batch form, which needs two inputs (N, D).
        margin: similarity up to which a negative costs nothing, in [-1, 1].
        reduction: "none" gives (N,), or (2N,) in-batch; "sum" and "mean" are over those. The
            in-batch mean is the positives' mean plus the negatives' mean, whatever N is; with
            N = 1 there is no negative, and that part is 0.
        weight: multiplies each pair's loss before the reduction; the mean divides by the number of
            pairs, as binary_cross_entropy's does. Broadcasts to the inputs' shape without D.

    Returns:
        The loss, a scalar unless reduction is "none". Norms are clamped to at least 1e-8. 1 - S
        keeps its relative accuracy where S is near 1. A pair with a zero row costs 1, or
        max(0, -margin), and has gradient 0.

    Raises:
        TypeError: an input is not a real floating-point tensor, target or weight no real tensor,
            or margin no number.
        RuntimeError: (a ValueError too) shapes do not match, or tensors are on two devices.
        ValueError: a target is not 1 or -1, margin or reduction is invalid, weight is given without
            a target, or the batch is empty and the reduction "mean". Where raising for a target
            would wait for a device, or is impossible (torch.compile, vmap), the loss of that pair
            and its gradient are NaN instead.

    Example:
        >>> x = torch.tensor([[1.0, 0.0]])
        >>> cosine_embedding_loss(x, torch.tensor([[0.0, 2.0]]), torch.tensor([1]))
        tensor(1.)

    Source: torch.nn.functional.cosine_embedding_loss.
    """
    check_reduction(reduction)
    check_margin(margin)
    if target is None:
        if weight is not None:
            raise ValueError(
                "weight needs a target, and the in-batch form takes none; "
                f"got {described(weight)} without one"
            )
        check_pairs(input1=input1, input2=input2)
        return in_batch_cosine_embedding_loss(input1, input2, margin, reduction)

    check_floating(input1=input1, input2=input2)
    input1, input2 = map(_autocast, _promoted(0.0, input1=input1, input2=input2))
    input1, input2 = _broadcast(input1, input2, ("input1", "input2"))
    _check_pairs(input1, reduction, target=target, weight=weight)
    target = target.double()  # in uint8, 255 equals -1
    positive, negative = target == 1, target == -1
    distance = cosine_distance(input1, input2, EMBEDDING_LOSS_EPS)
    loss = torch.where(positive, distance, torch.relu((1 - margin) - distance))
    if readable(target):
        _check_target(target, positive | negative)
    else:
        loss = loss * torch.where(positive | negative, 1.0, torch.nan).to(loss.dtype)
    return reduce(loss if weight is None else weight * loss, reduction)


def check_eps(eps: float) -> None:
    """Raise unless eps is a number of at least 0.

    Raises:
        TypeError: it is no number.
        TorchArgumentError: it is negative or not finite.
    """
    try:
        check_number("eps", eps, 0)
    except ValueError as error:
        raise TorchArgumentError(str(error)) from None


def check_dim(dim: int) -> None:
    """Raise TypeError unless dim is an integer."""
    if isinstance(dim, bool) or not isinstance(dim, int | torch.SymInt):
        raise TypeError(f"dim must be an integer; got {described(dim)}")


def _promoted(eps: float, **tensors: Tensor) -> list[Tensor]:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            check_tensor(**{name: tensor})  # a DTensor is welcome here
    check_eps(eps)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    dtype = reduce_with(torch.promote_types, dtypes)
    if not dtype.is_floating_point:
        names = " and ".join(tensors)
        raise TorchArgumentError(
            f"{names} must have a common real floating-point dtype; "
            f"got {' and '.join(str(x.dtype) for x in tensors.values())}"
        )
    if len(tensors) == 2:
        (name1, x1), (name2, x2) = tensors.items()
        if x1.device != x2.device:
            check_device(name1, x1, name2, x2)
    return [x if x.dtype == dtype else x.to(dtype) for x in tensors.values()]


def _broadcast(
    x1: Tensor, x2: Tensor, names: tuple[str, str] = ("x1", "x2")
) -> tuple[Tensor, Tensor]:
    # a view of a view that changes nothing is refused by forward-mode AD under torch.compile
    if x1.shape == x2.shape:
        return x1, x2
    for have, want in zip(reversed(x1.shape), reversed(x2.shape), strict=False):
        if have not in (1, want) and want != 1:
            raise TorchArgumentError(
                f"the shapes of {names[0]} and {names[1]} must match, or broadcast; "
                f"got {tuple(x1.shape)} and {tuple(x2.shape)}"
            )
    x1, x2 = torch.broadcast_tensors(x1, x2)
    return x1, x2


def _last(x: Tensor, dim: int) -> Tensor:
    if not -max(x.ndim, 1) <= dim < max(x.ndim, 1):
        raise IndexError(
            f"dim is out of range [{-max(x.ndim, 1)}, {max(x.ndim, 1) - 1}] for x1 and x2 of shape "
            f"{tuple(x.shape)}; got {dim}"
        )
    if x.ndim == 0:
        return x.movedim(dim, -1).reshape(1)
    return x if dim in (-1, x.ndim - 1) else x.movedim(dim, -1)


def _autocast(x: Tensor) -> Tensor:
    # torch.autocast runs these functions in float32
    narrow = torch.finfo(x.dtype).bits < 32
    return x.float() if narrow and autocast_dtype(x) is not None else x


def _check_pairs(input1: Tensor, reduction: str, **labels: Tensor | None) -> None:
    if not input1.ndim:
        raise ValueError("input1 and input2 must have shape (..., D); got two 0-d tensors")
    pairs = input1.shape[:-1]
    for name, label in labels.items():
        if label is None:
            continue
        check_tensor(**{name: label})
        check_real(name, label)
        # expanding one way only: a (N, 1) target would otherwise make an (N, N) loss
        if not _expands(label.shape, pairs):
            raise TorchArgumentError(
                f"{name} must broadcast to the inputs' shape without the last dimension, "
                f"{tuple(pairs)}; got {tuple(label.shape)}"
            )
        check_device("input1", input1, name, label)
    if reduction == "mean" and 0 in pairs:
        raise ValueError("input1 and input2 must have a pair for a mean; got an empty batch")


def _expands(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(
        have in (1, want) for have, want in zip(reversed(shape), reversed(to), strict=False)
    )


def _check_target(target: Tensor, valid: Tensor) -> None:
    if not valid.all():
        raise ValueError(f"every target must be 1 or -1; got {target[~valid][0].item()}")
