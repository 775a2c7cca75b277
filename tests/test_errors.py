"""Every argument of every public function and module, given what it does not take.

Public callables are found by themselves. An argument that is new needs a value that is right, in
RIGHT, and what else it takes, in TAKES; without them the sweep fails.
"""

import inspect
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

import cosloss
from cosloss import callbacks, functional, gradient_check, losses, replay, testing, verify, watch

N, D = 6, 4
Z = torch.randn(2, N, D, generator=torch.Generator().manual_seed(0))
MODULES = (cosloss, functional, losses, gradient_check, callbacks, watch, testing)
# what the library makes, and no user
RESULTS = {
    gradient_check.Discrepancy,
    gradient_check.FiniteDifferenceReport,
    gradient_check.GradientReport,
    testing.Errors,
    watch.GradientError,
}

WRONG = {
    "None": None,
    "a str": "explode",
    "a list": [0, 1] * (N // 2),
    "a numpy array": np.arange(N) % 2,
    "a class": nn.Linear,
    "an int": 3,
    "a negative int": -1,
    "a float": 0.5,
    "nan": math.nan,
    "inf": math.inf,
    "a negative float": -7.5,
    "a bool": True,
    "a dict": {"loss": 3},
    "int tensor (N,)": torch.arange(N) % 2,
    "bool tensor (N,)": torch.arange(N) % 2 == 0,
    "float tensor (N,)": torch.linspace(0.5, 1.5, N),
    "complex tensor (N,)": torch.ones(N, dtype=torch.complex64),
    "int tensor (N - 1,)": torch.ones(N - 1, dtype=torch.int64),
    "int tensor (N,) elsewhere": torch.ones(N, dtype=torch.int64, device="meta"),
    "float tensor (N, D)": Z[0].clone(),
    "int tensor (N, D)": torch.ones(N, D, dtype=torch.int64),
    "bool tensor (N, D)": torch.ones(N, D, dtype=torch.bool),
    "complex tensor (N, D)": torch.ones(N, D, dtype=torch.complex64),
    "float tensor (N, D) elsewhere": torch.ones(N, D, device="meta"),
    "float tensor (N, D + 1)": torch.ones(N, D + 1),
    "float tensor (N - 1, D)": torch.ones(N - 1, D),
    "float tensor (N, 2, D)": torch.ones(N, 2, D),
    "float tensor (N, 0)": torch.ones(N, 0),
    "float tensor (0, D)": torch.ones(0, D),
    "one-hot (N, 3)": nn.functional.one_hot(torch.arange(N) % 3),
    "float tensor ()": torch.tensor(0.7),
    "int tensor ()": torch.tensor(1),
    "bool tensor ()": torch.tensor(True),
    "complex tensor ()": torch.tensor(1j),
    "float tensor () elsewhere": torch.tensor(0.5, device="meta"),
    "nan tensor ()": torch.tensor(math.nan),
    "negative tensor ()": torch.tensor(-7.5),
}


def only(pattern):
    return {name for name in WRONG if re.fullmatch(pattern, name)}


NUMBER = only("an int|a float")
WHOLE = {"an int"}
EMBEDDINGS = {"float tensor (N, D)"}
TOKENS = {"float tensor (N, 2, D)"}
PER_ITEM = only(r"(int|bool) tensor \(N,\)")
WEIGHTS = PER_ITEM | {"float tensor (N,)"}
# kept in the module as a number
SCALAR = NUMBER | only(r"(float|int) tensor \(\)")
# taken by a function as it is, where its sign would have to be waited for elsewhere
LEARNT = SCALAR | {"negative tensor ()", "nan tensor ()"}
FLAG = {"a bool"}
NONE = {"None"}
BROADCAST = only(r"float tensor \((N, D|N, 2, D|)\)|(nan|negative) tensor \(\)")
# integers are promoted to the other's dtype
PROMOTED = BROADCAST | only(r"(int|bool) tensor \((N, D)?\)")
PAIRWISE = only(r"(float|int|bool) tensor \((N|N - 1|0), D\)")
SINGLE = only(r".* tensor \(\)") - {"complex tensor ()"}
ONE = only(r"(int|bool) tensor \(\)")
TAKES = {
    "x1": BROADCAST,
    "x2": BROADCAST,
    "dim": only("a negative int"),
    "eps": NUMBER,
    "z1": EMBEDDINGS,
    "z2": EMBEDDINGS,
    "z": EMBEDDINGS,
    "query": EMBEDDINGS,
    "key": EMBEDDINGS,
    "negatives": EMBEDDINGS | NONE | {"float tensor (N - 1, D)"},
    "key_bias": NONE | {"float tensor (N,)"},
    "query_bias": NONE,  # one-way, as these are called
    "guide": NONE,
    "hard_negatives": NONE | only(r"float tensor \((N|N - 1|N, 2), D\)"),
    "query_tokens": TOKENS,
    "document_tokens": TOKENS,
    "query_mask": NONE,
    "document_mask": NONE,
    "input1": BROADCAST,
    "input2": BROADCAST,
    "target": NONE,
    "labels": WEIGHTS,
    "ignore": PER_ITEM | NONE,
    "weight": WEIGHTS | NONE,
    "temperature": SCALAR,
    "bias": LEARNT | only("a negative .*"),
    "margin": only("a float|a negative int"),
    "negative_weight": NUMBER,
    "reduction": set(),
    "symmetric": FLAG,
    "hardness": NUMBER,
    "hardness_on": set(),
    "false_negative_margin": NONE | only("a float|a negative int"),
    "decoupled": FLAG,
    "gather_distributed": FLAG,
    "dims": NONE,
    "dim_weights": NONE,
    "learnable_temperature": FLAG,
    "learnable_bias": FLAG,
    "scalar_parameters": FLAG,
    "device": NONE | WHOLE,
    "dtype": NONE,
    "chunk_size": WHOLE,
    "size": WHOLE,
    "encoder": set(),
    "inputs": only(".* tensor .*|one-hot.*"),  # the encoder's
    "fn": set(),
    "twin": NONE,
    "how": set(),
    "seed": NONE | WHOLE,
    "directions": NONE | WHOLE,
    "slow_entries": WHOLE,
    "unit_rows": FLAG,
    "forward_ad": FLAG,
    "second_order": FLAG,
    "surrogate": FLAG,
    "every": WHOLE,
    "every_n_batches": WHOLE,
    "on_failure": set(),
    "rows": NONE | WHOLE,
    "module": set(),
    "check": NONE,
    "log": NONE,
    "directory": NONE | {"a str"},
    "name": {"a str"},
    "keywords": {"a dict"},
    "layout": {"a class"},
    "function": set(),
    "generic": set(),
    "hard": set(),
    "peer": NONE,
    "sample": set(),
    "ops": set(),
    "dtypes": set(),
    "show": set(),
    "path": {"a str"},
}
# where an argument takes other things than its namesakes
ALSO = {
    ("cosine_similarity", "x1"): PROMOTED,
    ("cosine_similarity", "x2"): PROMOTED,
    ("CosineSimilarity()", "x1"): PROMOTED,
    ("CosineSimilarity()", "x2"): PROMOTED,
    ("MemoryBank", "dim"): WHOLE,
    ("info_nce_loss", "directions"): set(),
    ("InfoNCELoss", "directions"): set(),
    ("CosineSimilarity", "dim"): WHOLE | only("a negative int"),
    ("cosine_embedding_loss", "target"): NONE | ONE,
    ("CosineEmbeddingLoss()", "target"): NONE | ONE,
    ("cosine_embedding_loss", "weight"): NONE | WEIGHTS | SINGLE,
    ("CosineEmbeddingLoss()", "weight"): NONE | WEIGHTS | SINGLE,
    ("sup_con_loss", "z"): EMBEDDINGS | {"float tensor (N, D + 1)"},
    ("SupConLoss()", "z"): EMBEDDINGS | {"float tensor (N, D + 1)"},
    ("pairwise_cosine_similarity", "x1"): only(r"float tensor \(.*,.+\).*"),
    ("pairwise_cosine_similarity", "x2"): NONE | PAIRWISE,
    ("rows_without_positive", "labels"): WEIGHTS | only(r"int tensor \(N.*\).*"),
    ("FiniteDifferences", "directions"): WHOLE,
    ("GradcheckCallback", "directions"): WHOLE,
    ("GradcheckCallback", "target"): only("None|a str|a class"),
    ("GradientDiscrepancyCallback", "target"): only("None|a str|a class"),
    ("GradientWatch", "target"): {"a class"},
    ("StepCheck", "directions"): NONE | WHOLE,
    ("SigmoidContrastiveLoss", "bias"): SCALAR | only("a negative .*|negative tensor .*"),
    ("Sample", "inputs"): set(),
    ("verify", "device"): set(),
    ("verify_surroundings", "device"): set(),
    ("errors", "device"): set(),
    ("replay", "device"): NONE,
    ("errors", "dtype"): set(),
    ("errors", "twin"): set(),
    ("Op", "twin"): set(),
    ("InfoNCELoss()", "negatives"): EMBEDDINGS | NONE | {"float tensor (N - 1, D)"},
}
MODEL = nn.Sequential(nn.Linear(D, 3), nn.Tanh())
OP = testing.OPS[0]
SAMPLE = next(iter(OP.generic()))
RIGHT = {
    **dict.fromkeys(("x1", "z1", "z", "query", "input1", "inputs"), Z[0]),
    **dict.fromkeys(("x2", "z2", "key", "input2"), Z[1]),
    **dict.fromkeys(("query_tokens", "document_tokens"), Z.transpose(0, 1)),
    "labels": torch.arange(N) % 2,
    "temperature": 0.5,
    "bias": -1.0,
    "target": torch.ones(N),
    "chunk_size": 2,
    "size": 4,
    "encoder": MODEL,
    "fn": torch.tanh,
    "module": MODEL,
    "name": "a name",
    "function": OP.function,
    "twin": OP.twin,
    "generic": OP.generic,
    "hard": OP.hard,
    "sample": SAMPLE,
    "dtype": torch.float64,
    "path": "missing.pt",
}
RIGHT_THERE = {
    ("MemoryBank", "dim"): 3,
    ("GradientWatch", "target"): "1",
    ("GradientWatch", "twin"): None,
    ("compare_gradients", "twin"): None,
    ("cosine_embedding_loss", "target"): torch.ones(N),
    ("CosineEmbeddingLoss()", "target"): torch.ones(N),
    ("Sample", "inputs"): {"x1": Z[0]},
}


def callables():
    """The public functions and modules by name, and modules' calls as "Module()"."""
    found = {n: getattr(m, n) for m in MODULES for n in m.__all__}
    found |= {"verify": verify.verify, "verify_surroundings": verify.verify_surroundings}
    found["replay"] = replay.replay
    found = {n: f for n, f in found.items() if callable(f) and f not in RESULTS}
    for name, module in list(found.items()):
        if isinstance(module, type) and issubclass(module, losses._base.Loss):
            found[f"{name}()"] = module().forward
    return found


CALLABLES = callables()
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def parameters(function):
    return {
        n: p for n, p in inspect.signature(function).parameters.items() if p.kind not in VARIADIC
    }


def right(name, function):
    """Arguments that are right: those that have no default, and what a call needs besides."""
    given = {}
    for argument, parameter in parameters(function).items():
        if (name, argument) in RIGHT_THERE:
            given[argument] = RIGHT_THERE[name, argument]
        elif parameter.default is inspect.Parameter.empty:
            given[argument] = RIGHT[argument]
    return given


def call(name, function, given):
    if name == "GradCache":
        return function(MODEL, cosloss.NTXentLoss(), **given)
    if name in ("compare_gradients", "check_finite_differences"):
        first, second = given.pop("fn"), {n: given.pop(n) for n in ("twin",) if n in given}
        return function(first, *second.values(), torch.ones(2, 3), **given)
    return function(**given)


def arguments():
    return [(n, a) for n, f in CALLABLES.items() for a in parameters(f)]


@pytest.mark.parametrize("name", sorted(set(CALLABLES) - {"replay", "verify_surroundings"}))
def test_what_is_right_is_taken(name):
    function = CALLABLES[name]
    given = right(name, function)
    if name == "verify":
        given |= {"ops": (OP,), "dtypes": ("float64",), "show": str}
    call(name, function, given)


@pytest.mark.parametrize(("name", "argument"), arguments())
@pytest.mark.filterwarnings("ignore")
def test_a_wrong_argument_is_named_in_one_line(name, argument):
    function = CALLABLES[name]
    assert argument in TAKES, "say in TAKES what this argument takes"
    taken = ALSO.get((name, argument), TAKES[argument])
    problems = []
    for what, value in WRONG.items():
        if what in taken:
            continue
        try:
            call(name, function, {**right(name, function), argument: value})
        except (TypeError, ValueError, IndexError) as error:
            text = str(error)
            told = re.search("; got .|has no loss under the name", text)
            if "\n" in text or not re.search(rf"\b{argument}\b", text) or not told:
                problems.append(f"{what}: {type(error).__name__}: {text}")
        except Exception as error:
            problems.append(f"{what}: {type(error).__name__}: {error}")
        else:
            problems.append(f"{what}: taken")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("mistake", "advice"),
    [
        (lambda: cosloss.NTXentLoss()(Z[0], torch.arange(N)), "labels? SupConLoss"),
        (lambda: cosloss.NTXentLoss()(Z[0], torch.ones(N)), "labels? SupConLoss"),
        (lambda: cosloss.NTXentLoss(Z[0], Z[1]), "called as NTXentLoss()(...)"),
        (lambda: cosloss.CosineEmbeddingLoss(Z[0], Z[1]), "called as CosineEmbeddingLoss()(...)"),
        (lambda: cosloss.CosineSimilarity(Z[0], Z[1]), "called as CosineSimilarity()(...)"),
        (lambda: cosloss.SupConLoss()(Z[0], [0] * N), "use torch.as_tensor(labels)"),
        (lambda: cosloss.SupConLoss()(Z[0], np.zeros(N)), "use torch.as_tensor(labels)"),
        (lambda: cosloss.SupConLoss()(Z[0], WRONG["one-hot (N, 3)"]), "use labels.argmax(1)"),
        (lambda: cosloss.SupConLoss()(Z[0], torch.ones(N, 1)), "use labels.squeeze(1)"),
        (lambda: cosloss.SupConLoss()(Z.mT, torch.ones(2)), "z.flatten(0, 1) and labels.repeat"),
        (lambda: cosloss.max_sim(Z, Z, torch.ones(2, N)), "use query_mask.bool()"),
        (lambda: cosloss.nt_xent_loss(Z.mT, Z.mT), "z1[:, 0] and z1[:, 1]"),
        (lambda: cosloss.nt_xent_loss(Z[0], Z[1].to("meta")), "use z2.to(z1.device)"),
        (lambda: cosloss.cosine_embedding_loss(*Z, [1] * N), "use torch.as_tensor(target)"),
        (lambda: cosloss.CosineEmbeddingLoss()(Z[0], Z[1].int()), "use input2.float()"),
        (lambda: cosloss.GradCache(MODEL, nn.Linear, chunk_size=2), "use Linear()"),
    ],
)
def test_a_newcomers_mistake_is_told_what_to_type(mistake, advice):
    with pytest.raises((TypeError, ValueError), match=re.escape(advice)) as error:
        mistake()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--device", "gpu"], "argument --device: it must be a device"),
        (["--device", "meta"], "argument --device: it must be a device of this machine"),
        (["--device", "cuda:99"], "argument --device: it must be a device of this machine"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--explode"], "unrecognized arguments: --explode"),
        (["--replay", "missing.pt"], "No such file or directory: 'missing.pt'"),
        (["--replay", __file__], "was not written by a gradient check"),
    ],
)
def test_the_command_line_says_what_is_wrong(options, text, capsys):
    try:
        status = verify.main(options)
    except SystemExit as leave:
        status = leave.code
    error = capsys.readouterr().err
    assert status == 2
    assert text in error.splitlines()[-1]
    assert "Traceback" not in error
