"""MaxSim tile by tile: its twin, every mode of differentiation, ties, masks and memory."""

import math

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from cosloss import functional, reference, release_memory
from cosloss.kernels import dispatch
from cosloss.kernels.eager import max_sim as kernel

MASKED = pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "masked"])


def tokens(b=5, q=3, c=7, t=4, d=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (b, q, d), (c, t, d)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def masks(b=5, q=3, c=7, t=4):
    """Every length of query and document, those without a token too."""
    return [torch.arange(k) < torch.arange(n)[:, None] % (k + 1) for n, k in ((b, q), (c, t))]


def leaves(**sizes):
    return [x.requires_grad_() for x in tokens(**sizes)]


def gradients(module, given, masks=(None, None), **options):
    value = module.max_sim(*given, *masks)
    weight = torch.linspace(-0.4, 1.3, value.numel(), dtype=value.dtype).view_as(value)
    return value.detach(), *torch.autograd.grad(value, given, weight, **options)


@pytest.fixture(params=[1, 40, 1 << 19], ids=["one by one", "few", "one tile"])
def tiles(request, monkeypatch):
    monkeypatch.setattr(kernel, "TILE", request.param)
    monkeypatch.setattr(kernel, "BLOCK", request.param)


@MASKED
@pytest.mark.parametrize("backend", ["eager", None])
def test_value_and_gradients_are_the_twins(masked, backend, tiles):
    given, excluded = leaves(), masks() if masked else (None, None)
    with dispatch.use(backend):
        ours = gradients(functional, given, excluded)
    torch.testing.assert_close(ours, gradients(reference, given, excluded))


@MASKED
@pytest.mark.parametrize("backend", ["eager", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_tokens_are_added_up_in_float32(dtype, backend, masked):
    sizes = {"b": 9, "q": 8, "c": 11, "t": 13, "d": 33}
    given = leaves(**sizes, dtype=dtype)
    excluded = masks(9, 8, 11, 13) if masked else (None, None)
    wide = [x.detach().double().requires_grad_() for x in given]
    with dispatch.use(backend):
        value, *grads = gradients(functional, given, excluded)
    exact, *exact_grads = gradients(reference, wide, excluded)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=2e-6)
    for found, true in zip(grads, exact_grads, strict=True):
        assert found.dtype == dtype
        rounding = max(torch.finfo(dtype).eps / 2, 1e-6)
        torch.testing.assert_close(found.double(), true, rtol=rounding, atol=1e-5)


def test_bfloat16_autocast_keeps_the_twins_budget():
    given = leaves(b=16, q=8, c=20, t=12, d=64, dtype=torch.float32)
    exact = reference.max_sim(*(x.detach().double() for x in given))
    with torch.autocast("cpu", torch.bfloat16):
        twin, ours = reference.max_sim(*given), functional.max_sim(*given)
    assert ours.dtype == torch.float32
    ours.sum().backward()
    assert (ours - exact).abs().max() <= 2 * (twin - exact).abs().max()


@MASKED
def test_gradcheck_in_every_mode(masked):
    excluded = masks(2, 3, 3, 4) if masked else (None, None)

    def function(*given):
        return functional.max_sim(*given, *excluded)

    given = leaves(b=2, q=3, c=3, t=4, d=4)
    modes = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(function, given, **modes, check_batched_forward_grad=True)
    assert torch.autograd.gradgradcheck(function, given)


@MASKED
def test_torch_func(masked):
    excluded, given = masks() if masked else (None, None), tokens()

    def sums(module):
        return lambda *given: module.max_sim(*given, *excluded).square().sum()

    ours, twin = sums(functional), sums(reference)
    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
        found, expected = (transform(f, (0, 1))(*given) for f in (ours, twin))
        torch.testing.assert_close(found, expected)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, x.flip(0)) for x in given]
        torch.testing.assert_close(
            *(forward_ad.unpack_dual(f(*duals)).tangent for f in (ours, twin))
        )
    stacked = [torch.stack([x, x.flip(1)]) for x in given]
    each = torch.stack([ours(*pair) for pair in zip(*stacked, strict=True)])
    torch.testing.assert_close(torch.func.vmap(ours)(*stacked), each)


def test_masks_are_batched_too():
    given, (query_mask, document_mask) = tokens(), masks()
    stacks = [torch.stack([m, m.flip(0)]) for m in (query_mask, document_mask)]
    together = torch.func.vmap(lambda *m: functional.max_sim(*given, *m))(*stacks)
    each = [functional.max_sim(*given, *m) for m in zip(*stacks, strict=True)]
    torch.testing.assert_close(together, torch.stack(each))


@MASKED
def test_compiles_without_a_graph_break(masked):
    torch._dynamo.reset()
    excluded, given = masks() if masked else (None, None), leaves()
    compiled = torch.compile(functional.max_sim, fullgraph=True, backend="aot_eager")
    value = compiled(*given, *excluded)
    found = torch.autograd.grad(0.37 * value.sum(), given)
    expected = torch.autograd.grad(0.37 * functional.max_sim(*given, *excluded).sum(), given)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("wanted", [0, 1])
def test_only_what_needs_a_gradient_gets_one(wanted):
    given, every = tokens(), leaves()
    given[wanted].requires_grad_()
    (found,) = torch.autograd.grad(functional.max_sim(*given).sum(), given[wanted])
    assert torch.equal(found, torch.autograd.grad(functional.max_sim(*every).sum(), every)[wanted])


@MASKED
def test_two_runs_give_the_same_bits(masked, tiles):
    given = leaves(b=9, q=8, c=11, t=13, d=33, dtype=torch.float32)
    excluded = masks(9, 8, 11, 13) if masked else (None, None)
    first, again = (gradients(functional, given, excluded) for _ in range(2))
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_first_of_tied_tokens_takes_the_whole_gradient(dtype, tiles):
    """By hand: unit vectors, whose products are exact in every order of addition."""
    east, north = torch.eye(2, dtype=dtype)
    query = torch.stack([east, east + north])[None].requires_grad_()
    document = torch.stack([torch.stack([north, east, 4 * east, north])] * 2).requires_grad_()
    mask = torch.tensor([[True] * 4, [True, False, True, True]])
    functional.max_sim(query, document, None, mask)[0].sum().backward()
    # east finds the second token, or, masked, the third; the diagonal ties between all of them,
    # of which the first, north, takes it: (east + north) / sqrt 2 less its part along north
    tied = torch.tensor([0.5**0.5, 0.0], dtype=dtype)
    expected = torch.zeros(2, 4, 2, dtype=dtype)
    expected[:, 0] = tied
    torch.testing.assert_close(document.grad, expected)
    # the gradient of <east + north, north> / sqrt 2, from two documents; east's own is 0
    half = torch.tensor([-(0.5**1.5), 0.5**1.5], dtype=dtype)
    torch.testing.assert_close(query.grad[0], torch.stack([0 * half, 2 * half]))


def test_what_is_masked_is_met_by_nobody(tiles):
    (query, document), (query_mask, document_mask) = tokens(), masks()
    excluded = query_mask, document_mask
    plain = gradients(functional, [query.requires_grad_(), document.requires_grad_()], excluded)
    for junk in (torch.nan, torch.inf, 7.0):
        given = [
            torch.where(m[..., None], x.detach(), junk).requires_grad_()
            for x, m in ((query, query_mask), (document, document_mask))
        ]
        found = gradients(functional, given, excluded)
        torch.testing.assert_close(found, plain, rtol=0, atol=0)
    for grad, mask in zip(found[1:], excluded, strict=True):
        assert not grad[~mask].any()


def test_nothing_to_compare_scores_0_without_a_gradient(tiles):
    given = leaves()
    excluded = [m.clone() for m in masks()]
    excluded[0][1], excluded[1][2] = False, False
    value, *grads = gradients(functional, given, excluded)
    assert not value[1].any()
    assert not value[:, 2].any()
    assert value[2, 3] != 0
    assert not grads[0][1].any()
    assert not grads[1][2].any()


@pytest.mark.parametrize("backend", ["eager", None])
@pytest.mark.parametrize("junk", [torch.nan, torch.inf])
def test_a_number_that_is_none_makes_the_scores_that_meet_it_nan(junk, backend, tiles):
    for which, met in ((0, (2, slice(None))), (1, (slice(None), 2))):
        given = tokens(dtype=torch.float32)
        given[which][2, 1, 3] = junk
        with dispatch.use(backend):
            value = functional.max_sim(*given)
        assert value[met].isnan().all()
        assert value.isnan().sum() == value[met].numel()


def test_a_zero_token_has_no_gradient():
    given = tokens()
    given[0][1, 2] = given[1][3, 1] = 0
    leaves = [x.requires_grad_() for x in given]
    value, *grads = gradients(functional, leaves)
    torch.testing.assert_close((value, *grads), gradients(reference, leaves))
    assert not grads[0][1, 2].any()
    assert not grads[1][3, 1].any()


class Largest(TorchDispatchMode):
    """Notes the most bytes of a tensor that any operation returned."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.nbytes = max(self.nbytes, x.nbytes)
        return out


def test_the_tensor_of_all_similarities_is_never_made(monkeypatch):
    monkeypatch.setattr(kernel, "TILE", 1 << 13)
    release_memory()  # of larger tiles
    sizes = {"b": 24, "q": 16, "c": 24, "t": 40}
    every = 4 * math.prod(sizes.values())
    given, excluded = leaves(**sizes, d=8, dtype=torch.float32), masks(*sizes.values())
    with Largest() as seen:
        gradients(functional, given, excluded)
    assert seen.nbytes < every / 10
    with Largest() as seen:
        gradients(reference, given, excluded)
    assert seen.nbytes == every


@pytest.mark.parametrize(("tokens", "dtype"), [(2**15, torch.int16), (2**15 + 1, torch.int32)])
def test_a_position_is_kept_in_two_bytes_where_it_fits(tokens, dtype):
    given = [torch.randn(2, 1, 3).requires_grad_(), torch.randn(1, tokens, 3)]
    value = functional.max_sim(*given)
    position = value.grad_fn.saved_tensors[-1]
    assert (position.dtype, position.shape) == (dtype, (1, 2))
    assert (position >= 0).all()
    torch.testing.assert_close(value, reference.max_sim(*given))


@pytest.mark.parametrize(
    "change",
    [lambda g: 2 * g, lambda g: -g, lambda g: g.flip(0), lambda g: g + 1e-6 * g.abs().mean()],
    ids=["doubled", "negated", "swapped rows", "last digits off"],
)
@pytest.mark.parametrize("which", [0, 1])
def test_the_judge_catches_a_wrong_gradient(which, change, monkeypatch):
    backward = kernel.backward

    def planted(*arguments):
        found = list(backward(*arguments))
        found[which] = change(found[which])
        return found

    monkeypatch.setattr(kernel, "backward", planted)
    with pytest.raises(AssertionError):
        test_value_and_gradients_are_the_twins(False, "eager", None)
