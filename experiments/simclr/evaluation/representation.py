"""Whether embeddings have collapsed, and how well they are spread. Shapes: z1 and z2 (N, D)."""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ROWS = 512
MIN_STD, MIN_RANK = 0.1, 2.0


@torch.no_grad()
def representation_statistics(z1: Tensor, z2: Tensor) -> dict[str, float]:
    """Four numbers on the unit rows u of two views' embeddings, at most 512 rows of each.

    - `embedding_std`: sqrt(D) times the mean standard deviation of u's components: 1 for
      directions drawn at random, 0 where all are the same;
    - `effective_rank`: exp of the entropy of the singular values of all u, as shares of their sum:
      from 1 to D;
    - `alignment`: mean |u1 - u2|^2 of the two views of an image: 0 where the encoder ignores what
      the augmentation does;
    - `uniformity`: log mean exp(-2 |u_i - u_j|^2) over pairs of one view: 0 where all are the same,
      and about -4 for directions drawn at random.

    All are NaN where an embedding is.

    Source: Chen and He 2021, "Exploring Simple Siamese Representation Learning", section 4.1;
    Roy and Vetterli 2007, "The effective rank", and Garrido et al. 2023, "RankMe"; Wang and Isola
    2020, "Understanding Contrastive Representation Learning through Alignment and Uniformity".

    Example:
        >>> z = torch.eye(4)
        >>> found = representation_statistics(z, z)
        >>> {name: round(value, 3) for name, value in found.items()}
        {'embedding_std': 0.866, 'effective_rank': 4.0, 'alignment': 0.0, 'uniformity': -4.0}
    """
    u1, u2 = (F.normalize(z[:MAX_ROWS].float(), dim=1) for z in (z1, z2))
    u = torch.cat([u1, u2])
    # double: the smallest of the singular values are roots of the product's
    gram = u.double().T @ u.double()
    singular = _eigenvalues(gram).clamp_min(0).sqrt()
    share = singular / singular.sum().clamp_min(1e-30)  # of zero rows, 0
    numbers = {
        "embedding_std": u.std(0, correction=0).mean() * u.shape[1] ** 0.5,
        "effective_rank": torch.special.entr(share).sum().exp(),
        "alignment": (u1 - u2).square().sum(1).mean(),
        "uniformity": (_uniformity(u1) + _uniformity(u2)) / 2,
    }
    # one transfer: a GPU is waited for once
    values = torch.stack([number.float() for number in numbers.values()]).tolist()
    return dict(zip(numbers, values, strict=True))


def has_collapsed(statistics: dict[str, float], dimensions: int) -> bool:
    """Whether all embeddings lie near one direction, or along one line of several dimensions.

    Example:
        >>> has_collapsed({"embedding_std": 0.02, "effective_rank": 3.0}, dimensions=64)
        True
    """
    along_a_line = dimensions > 3 and statistics["effective_rank"] < MIN_RANK
    return statistics["embedding_std"] < MIN_STD or along_a_line


def _eigenvalues(gram: Tensor) -> Tensor:
    # of a matrix with NaN, eigvalsh raises
    return torch.linalg.eigvalsh(gram) if gram.isfinite().all() else gram.diagonal() * torch.nan


def _uniformity(u: Tensor) -> Tensor:
    return torch.pdist(u).square().mul(-2).exp().mean().log()
