"""Compile every kernel for every kind of card, none of which need be there, and judge the code.

One line per kernel and block shape: seconds of compilation, shared memory, registers, the local
memory that registers spill to, what multiplies, and the instructions of a thread for a tile of its
main loop. The exit status is 1 where a kernel spills, takes more shared memory than its card has or
`block_shapes` says, has Hopper's products wait for one another, masks tiles that have no mask,
waits for sums that it adds to, has a polynomial in vain, or is in no configuration that fits. With
`--quick`, a few dtypes and widths only.

    TRITON_INTERPRET=0 python -m tests.kernels.triton.compiled [--quick | --cards 80 90 ...]
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from math import prod
from multiprocessing import Pool
from unittest.mock import patch

import torch

from cosloss.criteria import CosineEmbedding, CrossEntropy, DecoupledCrossEntropy, SigmoidContrast
from cosloss.kernels.inputs import Inputs, Source
from cosloss.kernels.triton import block_shapes, cosine_similarity, in_batch, unit_rows
from cosloss.kernels.triton.walk import SPANS
from cosloss.problem import Mask, PositiveMask, Problem
from tests.kernels.triton.compiling import CARDS, Launch, compiling

SPILL_LIMIT = 128  # bytes per thread
ROWS = 24000  # a large batch, whose programs have all columns
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKWARD = "in_batch_bwd_kernel"  # which loads a slope of each column
FORMS = ("exp", "logsumexp", "softplus", "hinge", "limits")

Job = tuple[int, Callable[..., None], tuple]  # a card's capability, what compiles, its arguments


def compile_rows(dtype: torch.dtype, columns: int) -> None:
    x1, x2 = torch.zeros(2, 1000, columns, dtype=dtype)
    cosine_similarity.forward(x1, x2, 1e-8)
    cosine_similarity.distance_forward(x1, x2, 1e-8)
    cosine_similarity.backward(x1[:, 0], x1, x2, 1e-8, (True, True))


def compile_unit_rows(dtype: torch.dtype, columns: int) -> None:
    views = torch.zeros(2, 1000, columns, dtype=dtype).unbind()
    for scale in (3.0, torch.tensor(3.0)):
        _, norm, products = unit_rows.forward(views, scale, dtype)
        grads = torch.zeros(2, 1000, columns).unbind()
        unit_rows.backward(grads, products, views, norm, (True, True), scale)


def compile_engine(dtype: torch.dtype, columns: int, form: str) -> None:
    """The engine as a criterion of this kind uses it, or as limits of the rows' logits do."""
    r = c = torch.zeros(ROWS, columns, dtype=dtype)
    bias = None
    diagonals = Mask((0, ROWS // 2, -ROWS // 2))
    if form == "exp":
        c, matrix = None, Problem(CrossEntropy(10.0), diagonals, True)
    elif form == "hinge":
        c, matrix = None, Problem(CosineEmbedding(0.1, 3), diagonals, True)
    elif form == "logsumexp":
        groups = torch.zeros(ROWS, dtype=torch.int64)
        pairs = Mask(groups=(groups, groups), classes=(groups, groups))
        positives = PositiveMask(groups, groups, torch.ones(ROWS))
        matrix = Problem(DecoupledCrossEntropy(), pairs, True, positives=positives)
    elif form == "limits":
        limited = Mask((0,), row_limits=torch.zeros(ROWS))
        matrix = Problem(DecoupledCrossEntropy(), limited, False)
    else:
        bias, matrix = torch.zeros(()), Problem(SigmoidContrast(), Mask((0,)), False)
    total = in_batch.forward(r, c, bias, matrix)
    needs = (True, c is not None, bias is not None)
    d_pos_logit = None if matrix.positives is None else total
    asked = {"needs": needs, "d_pos_logit": d_pos_logit}
    of_inputs = {"d_stat": total, "stat": total, "d_pos_logit": d_pos_logit}
    for in_bands in (block_shapes.in_bands, lambda rows: False):  # as in deterministic mode
        with patch.object(block_shapes, "in_bands", in_bands):
            in_batch.backward(r, c, bias, matrix, d_stat=total, stat=total, **asked)
            in_batch.input_grads(r, c, bias, matrix, _inputs(r, c, bias), **of_inputs)
    if in_batch.folds(matrix, bias, dtype):
        in_batch.forward_folded(r, c, matrix, weights=0.1, positive=total.float())


def _inputs(r: torch.Tensor, c: torch.Tensor | None, bias: torch.Tensor | None) -> Inputs:
    """Two views that are the rows, or the first view that is, with a temperature that is learnt."""
    norm = torch.zeros(ROWS, dtype=torch.float64)
    if c is None:
        x, pair = r.chunk(2)
        on_x, on_pair = norm.chunk(2)
        sources = [Source(x, on_x, True, pair, on_pair), Source(pair, on_pair, True, x, on_x)]
        pulls = torch.zeros(ROWS).chunk(2)
        return Inputs(sources, (), (), 3.0, pulls, torch.zeros(()), False, False)
    rows, columns = Source(r, norm, True, c, norm), Source(c, norm, True, r, norm)
    pulls, scale = [torch.zeros(ROWS)], torch.zeros(())
    return Inputs([rows], [columns], (), scale, pulls, None, True, bias is not None)


def jobs(capabilities: Iterable[int]) -> Iterator[Job]:
    """Every dtype, width and kind on each of these cards."""
    for capability in capabilities:
        for dtype in DTYPES:
            for columns in (1, 128, 2048, 10000):
                yield capability, compile_rows, (dtype, columns)
                yield capability, compile_unit_rows, (dtype, columns)
            for columns in (64, 128, 256, 512, 1024):
                for form in FORMS:
                    yield capability, compile_engine, (dtype, columns, form)


def quick_jobs() -> Iterator[Job]:
    """Each kernel once, and where shared memory and registers were found to be short."""
    yield 90, compile_rows, (torch.bfloat16, 128)
    yield 90, compile_unit_rows, (torch.bfloat16, 128)
    yield 90, compile_engine, (torch.bfloat16, 128, "exp")
    yield 90, compile_engine, (torch.bfloat16, 64, "exp")
    yield 89, compile_engine, (torch.bfloat16, 512, "exp")
    yield 80, compile_engine, (torch.float32, 128, "exp")


def compiled(job: Job) -> tuple[str, bool]:
    """What a job's kernels take, a line each; whether all of it is allowed."""
    capability, compile_all, arguments = job
    with compiling(capability) as found:
        compile_all(*arguments)
    lines = [f"{compile_all.__name__} {' '.join(map(str, arguments))}"]
    right = True
    for launch in found:
        line, allowed = judged(launch, capability, *arguments[:2])
        lines.append(line)
        right &= allowed
    return "\n".join(lines), right


def judged(launch: Launch, capability: int, dtype: torch.dtype, columns: int) -> tuple[str, bool]:
    """A line on what a kernel takes on such a card; whether it is allowed."""
    registers, spilled = launch.usage()
    limit = _said(launch, capability, dtype, columns)
    loop = launch.main_loop() if launch.name.startswith("in_batch") else None
    logits = _logits(launch)
    # ids are compared in every tile, and so are a hinge's and softplus's logits; rows in parts and
    # float32 that is split have selects of their own
    bare = (
        launch.cores == "wgmma"
        and dtype.itemsize == 2
        and launch.constants["KIND"] == "exp"
        and launch.constants["WHOLE"]
    )
    faults = {
        "masks the tiles without a mask": bare and loop.selects > 2 * SPANS.value + logits / 2,
        "reads back what it adds to": bare and launch.name != BACKWARD and loop.loads > 0,
        "leaves all exponentials to the special units": loop is not None
        and launch.constants.get("POLYNOMIAL", 0) > 0
        and launch.constants["KIND"] == "exp"
        and loop.exponentials >= logits,
        f"spills more than {SPILL_LIMIT} B": spilled > SPILL_LIMIT,
        f"takes more than {limit / 1024:.0f} KiB": launch.shared > limit,
        "wgmmas wait for one another": launch.serialised(),
    }
    said = ", ".join(fault.upper() for fault, found in faults.items() if found)
    line = (
        f"  {CARDS[capability].name:<6} {launch.name:<28} {launch.seconds:5.1f} s "
        f"{launch.shared / 1024:6.1f} KiB "
        f"{registers:4} registers {spilled:4} B spilled  {launch.cores:<8} {launch.shape()}  "
        f"{f'{loop.instructions} instructions for {logits} logits' if loop else ''}  {said}"
    )
    return line.rstrip(), not said


def _logits(launch: Launch) -> int:
    """The logits of a tile that each thread has."""
    constants = launch.constants
    block = [constants[x] for x in ("BLOCK", "BLOCK", "BLOCK_M", "BLOCK_N") if x in constants]
    return prod(block) // (32 * launch.kernel.metadata.num_warps)


def _said(launch: Launch, capability: int, dtype: torch.dtype, columns: int) -> int:
    """The shared memory that the kernel may take: what its block shape says, or what there is."""
    card, constants = CARDS[capability], launch.constants
    tables = {
        "in_batch_fwd_kernel": block_shapes.FORWARD,
        "in_batch_bands_kernel": block_shapes.FORWARD,
        BACKWARD: block_shapes.BACKWARD,
    }
    if launch.name not in tables:
        return card.shared
    block = tuple(constants[x] for x in ("BLOCK", "BLOCK_M", "BLOCK_N") if x in constants)
    asked = block, constants["num_warps"], constants["num_stages"]
    fitting = block_shapes.fitting(tables[launch.name], columns, dtype.itemsize, card)
    return next(s.kib * 1024 for s in fitting if s[:3] == asked and s.whole == constants["WHOLE"])


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cards", nargs="+", type=int, choices=CARDS, default=CARDS)
    given = parser.parse_args()
    wanted = quick_jobs() if given.quick else jobs(given.cards)
    bad = 0
    with Pool() as pool:
        for lines, right in pool.imap(compiled, wanted):
            print(lines, flush=True)
            bad += not right
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
