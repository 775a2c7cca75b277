"""The command line: one subcommand per suite, each a module with `run(rounds) -> bool`.

`gpu` also takes a folder for what it writes, and exits with 2 where there is no GPU.
"""

import argparse
from pathlib import Path

from experiments.benchmarks import contrastive, cosine, gpu, throughput

SUITES = {
    "contrastive": contrastive.run,
    "cosine": cosine.run,
    "throughput": throughput.run,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks", description=__doc__)
    parser.add_argument("suite", choices=(*SUITES, "gpu"))
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each contender")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmark_gpu"), help="where gpu writes its results"
    )
    options = parser.parse_args(arguments)
    if options.suite == "gpu":
        return gpu.run(options.rounds, options.out)
    return 0 if SUITES[options.suite](options.rounds) else 1


if __name__ == "__main__":
    raise SystemExit(main())
