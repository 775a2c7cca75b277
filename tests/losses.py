"""The in-batch losses in every form that takes a road of its own, and their generic inputs."""

import torch

DIRECTIONS = ("query_to_key", "key_to_query", "query_to_query", "key_to_key")
LABELS = torch.arange(400) % 4


def prefixes(z):
    """All columns but the last, and all: few columns alone are ill-conditioned."""
    return z.shape[1] - 1, z.shape[1]


# loss(module, z1, z2, temperature), of cosloss.functional or cosloss.reference; their biases are
# small, for a bias's gradient is not divided by a row's norm and would be all that a judge sees
LOSSES = {
    "nt_xent": lambda m, a, b, t: m.nt_xent_loss(a, b, t),
    "decoupled": lambda m, a, b, t: m.nt_xent_loss(a, b, t, "none", decoupled=True),
    "ignore": lambda m, a, b, t: m.nt_xent_loss(a, b, t, ignore=LABELS[: len(a)]),
    "weight": lambda m, a, b, t: m.nt_xent_loss(a, b, t, weight=LABELS[: len(a)] + 0.5),
    "in_batch_cosine": lambda m, a, b, t: m.in_batch_cosine_embedding_loss(a, b, 0.1) * t,
    "info_nce": lambda m, a, b, t: m.info_nce_loss(a, b, t),
    "each": lambda m, a, b, t: m.info_nce_loss(a, b, t, reduction="none"),
    "symmetric": lambda m, a, b, t: m.info_nce_loss(a, b, t, symmetric=True, reduction="none"),
    "queue": lambda m, a, b, t: m.info_nce_loss(a, b, t, torch.cat([a, b, a * b])),
    "hard": lambda m, a, b, t: m.info_nce_loss(
        a, b, t, hard_negatives=torch.stack([a * b, a + b], 1), ignore=LABELS[: len(a)]
    ),
    "key bias": lambda m, a, b, t: m.info_nce_loss(
        a, b, t, symmetric=True, reduction="none", key_bias=b[:, 0] / 3 - a[:, 1] / 2
    ),
    "query bias": lambda m, a, b, t: m.info_nce_loss(
        a,
        b,
        t,
        symmetric=True,
        key_bias=b[:, 0] / 3 - a[:, 1] / 2,
        query_bias=a[:, 0] / 2 - b[:, 2] / 3,
    ),
    "hard, key bias": lambda m, a, b, t: m.info_nce_loss(
        a,
        b,
        t,
        hard_negatives=torch.stack([a * b, a + b], 1),
        key_bias=torch.cat([b[:, 0], a[:, 1], b[:, 2]]) / 3,
    ),
    "shared hard": lambda m, a, b, t: m.info_nce_loss(
        a, b, t, symmetric=True, reduction="none", hard_negatives=(a * b)[1:]
    ),
    "directions": lambda m, a, b, t: m.info_nce_loss(a, b, t, directions=DIRECTIONS),
    "false negatives": lambda m, a, b, t: m.info_nce_loss(
        a, b, t, reduction="none", directions=DIRECTIONS[::2], false_negative_margin=-0.31
    ),
    "hardness": lambda m, a, b, t: m.info_nce_loss(
        a,
        b,
        t,
        hard_negatives=torch.stack([a * b, a + b], 1),
        directions=DIRECTIONS[::3],
        hardness=0.9,
        false_negative_margin=-0.5,
    ),
    "dims": lambda m, a, b, t: m.nt_xent_loss(
        a, b, t, ignore=LABELS[: len(a)], weight=LABELS[: len(a)] + 0.5, dims=prefixes(a)[::-1]
    ),
    "dims, each": lambda m, a, b, t: m.info_nce_loss(
        a, b, t, reduction="none", symmetric=True, dims=prefixes(a), dim_weights=(0.4, 1.5)
    ),
    "dims, queue": lambda m, a, b, t: m.info_nce_loss(
        a, b, t, torch.cat([a, b, a * b]), dims=prefixes(a)
    ),
    "dims, hard": lambda m, a, b, t: m.info_nce_loss(
        a, b, t, hard_negatives=torch.stack([a * b, a + b], 1), dims=prefixes(a)
    ),
    "dims, key bias": lambda m, a, b, t: m.info_nce_loss(
        a, b, t, key_bias=b[:, 0], dims=prefixes(a)
    ),
    "dims, directions": lambda m, a, b, t: m.info_nce_loss(
        a, b, t, directions=DIRECTIONS, dims=prefixes(a)
    ),
    "dims, sup_con": lambda m, a, b, t: m.sup_con_loss(
        a + b, LABELS[: len(a)], t, dims=prefixes(a)
    ),
    "dims, sigmoid": lambda m, a, b, t: (
        m.sigmoid_contrastive_loss(a, b, t, 0.3 - 2 * t, dims=prefixes(a)[:1], dim_weights=(0.7,))
        + m.sigmoid_contrastive_loss(a, b, t, 0.3 - 2 * t, "none", dims=prefixes(a)).mean()
    ),
    "sup_con": lambda m, a, b, t: m.sup_con_loss(a + b, LABELS[: len(a)], t),
    "other class": lambda m, a, b, t: m.sup_con_loss(
        a + b, LABELS[: len(a)], t, ignore=LABELS[: len(a)] // 2
    ),
    "sigmoid": lambda m, a, b, t: m.sigmoid_contrastive_loss(a, b, t, 0.3 - 2 * t),
}


def inputs(rows=5, columns=3, dtype=torch.float64, temperature=0.3):
    """z1 and z2 (rows, columns), whose pairs are alike, and a temperature that is a tensor."""
    generator = torch.Generator().manual_seed(rows)
    z1, z2 = torch.randn(2, rows, columns, dtype=torch.float64, generator=generator)
    return [x.to(dtype) for x in (z1, 0.6 * z1 + z2, torch.tensor(temperature))]


def leaves(*arguments, **keywords):
    """The same, with gradients asked for."""
    return [x.requires_grad_() for x in inputs(*arguments, **keywords)]


def gradients(loss, module, tensors, create_graph=False):
    """A loss's value and gradients, from an incoming gradient that is generic."""
    value = loss(module, *tensors)
    weight = torch.linspace(0.37, 1.4, value.numel(), dtype=value.dtype).view_as(value)
    return value, torch.autograd.grad(value, tensors, weight, create_graph=create_graph)
