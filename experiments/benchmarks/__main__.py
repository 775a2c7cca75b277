"""The command line: one subcommand per suite, each a module with `run(rounds) -> bool`.

`gpu` and `silent_gradients` also take a folder for what they write, and a number of minutes; `gpu`
exits with 2 where there is no GPU; `throughput` takes the name of an encoder, `silent_gradients` a
pattern of names.
"""

import argparse
from importlib import import_module
from pathlib import Path

SUITES = ("contrastive", "cosine", "gpu", "grad_cache", "silent_gradients", "throughput")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks", description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each contender")
    parser.add_argument(
        "--out", type=Path, help="where gpu and silent_gradients write their results"
    )
    parser.add_argument(
        "--encoder", choices=("small_conv", "resnet18"), help="of throughput; without it, both"
    )
    parser.add_argument("--only", default="*", help="of silent_gradients: names that fit")
    parser.add_argument(
        "--minutes", type=float, help="of gpu and silent_gradients: begin nothing after so many"
    )
    parser.add_argument(
        "--skip-checks", action="store_true", help="of gpu: time a device that passed them before"
    )
    options = parser.parse_args(arguments)
    # each suite has rivals of its own, which the others do without
    suite = import_module(f"experiments.benchmarks.{options.suite}")
    if options.suite == "gpu":
        out = options.out or Path("benchmark_gpu")
        return suite.run(options.rounds, out, options.skip_checks, options.minutes)
    if options.suite == "silent_gradients":
        out = options.out or Path("silent_gradients")
        return 0 if suite.run(options.only, options.minutes, out) else 1
    if options.suite == "throughput":
        return 0 if suite.run(options.rounds, options.encoder) else 1
    return 0 if suite.run(options.rounds) else 1


if __name__ == "__main__":
    raise SystemExit(main())
