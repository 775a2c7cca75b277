"""The command line: one subcommand per suite, each a module with `run(rounds) -> bool`."""

import argparse

from experiments.benchmarks import contrastive, cosine, throughput

SUITES = {
    "contrastive": contrastive.run,
    "cosine": cosine.run,
    "throughput": throughput.run,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks", description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each contender")
    options = parser.parse_args()
    return 0 if SUITES[options.suite](options.rounds) else 1


if __name__ == "__main__":
    raise SystemExit(main())
