"""The command line: one subcommand per suite, each a module with `run(rounds) -> bool`.

`gpu` also takes a folder for what it writes, and exits with 2 where there is no GPU; `throughput`
takes the name of an encoder.
"""

import argparse
from importlib import import_module
from pathlib import Path

SUITES = ("contrastive", "cosine", "gpu", "throughput")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks", description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each contender")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmark_gpu"), help="where gpu writes its results"
    )
    parser.add_argument(
        "--encoder", choices=("small_conv", "resnet18"), help="of throughput; without it, both"
    )
    options = parser.parse_args(arguments)
    # each suite has rivals of its own, which the others do without
    suite = import_module(f"experiments.benchmarks.{options.suite}")
    if options.suite == "gpu":
        return suite.run(options.rounds, options.out)
    if options.suite == "throughput":
        return 0 if suite.run(options.rounds, options.encoder) else 1
    return 0 if suite.run(options.rounds) else 1


if __name__ == "__main__":
    raise SystemExit(main())
