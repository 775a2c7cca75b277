"""Torch's own samples of these functions (OpInfo, module_db), ours against float64."""

import pytest
import torch

import cosloss

with pytest.MonkeyPatch.context() as patch:
    # the import would forbid the whole process to set torch.backends' flags, as a trainer does
    patch.setattr(torch.backends, "disable_global_flags", lambda: None)
    opinfo = pytest.importorskip(
        "torch.testing._internal.common_methods_invocations",
        reason="this torch ships without its OpInfo samples, or expecttest is missing",
    )
    modules = pytest.importorskip("torch.testing._internal.common_modules")
OURS = {
    "nn.functional.cosine_similarity": cosloss.cosine_similarity,
    "nn.functional.cosine_embedding_loss": cosloss.cosine_embedding_loss,
}


def info(name):
    found = [op for op in opinfo.op_db if op.name == name]
    if not found:
        pytest.skip(f"this torch has no OpInfo for {name}")
    return found[0]


def assert_equal_in_float64(ours, theirs, inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    value, value64 = ours(*inputs), theirs(*exact)
    assert value.shape == value64.shape
    torch.testing.assert_close(value.double(), value64, rtol=1e-6, atol=1e-6)
    weight = torch.linspace(0.37, 1.1, value.numel(), dtype=torch.float64).view_as(value64)
    grads = torch.autograd.grad(value, inputs, weight.to(value.dtype))
    grads64 = torch.autograd.grad(value64, exact, weight)
    torch.testing.assert_close([g.double() for g in grads], list(grads64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OURS)
def test_every_opinfo_sample(name):
    op = info(name)
    samples = list(op.sample_inputs("cpu", torch.float32, requires_grad=True))
    assert samples
    for sample in samples:
        rest = sample.args[1:]
        assert_equal_in_float64(
            lambda a, b, s=sample, rest=rest: OURS[name](a, b, *rest, **s.kwargs),
            lambda a, b, s=sample, rest=rest: op.op(a, b, *rest, **s.kwargs),
            (sample.input, sample.args[0]),
        )


@pytest.mark.parametrize("name", OURS)
def test_every_opinfo_error_is_raised_with_its_type(name):
    op = info(name)
    if op.error_inputs_func is None:
        pytest.skip("this torch has no error samples for it")
    for error in op.error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises(error.error_type):
            OURS[name](sample.input, *sample.args, **sample.kwargs)


def test_every_module_db_sample():
    (module,) = (m for m in modules.module_db if m.module_cls is torch.nn.CosineEmbeddingLoss)
    samples = module.module_inputs_func(
        module, device="cpu", dtype=torch.float32, requires_grad=True, training=True
    )
    assert samples
    for sample in samples:
        make, call = sample.constructor_input, sample.forward_input
        ours = cosloss.CosineEmbeddingLoss(*make.args, **make.kwargs)
        theirs = torch.nn.CosineEmbeddingLoss(*make.args, **make.kwargs)
        target = call.args[2]
        assert_equal_in_float64(
            lambda a, b, f=ours, t=target: f(a, b, t),
            lambda a, b, f=theirs, t=target: f(a, b, t),
            call.args[:2],
        )
