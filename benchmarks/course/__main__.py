"""Runs the experiments of the lessons one after the other, and keeps every run as soon as it has ended.

    python benchmarks/course                          # all that is not kept yet
    python benchmarks/course dirty balance --seeds 1  # some of them, one seed
    python docs/make_experiments.py                   # then: the tables of the pages

A run that is kept with the same words is not made again, so an interrupted command goes on where it was. Results are in
`benchmarks/results/course`, one file for each experiment; data and run directories are in `benchmarks/.work/course`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # in place of this folder, whose modules belong to a package

from benchmarks.course.experiments import EXPERIMENTS  # noqa: E402
from benchmarks.course.measuring import measure_experiment  # noqa: E402


def main() -> int:
    """See the top of the file. The exit code is 1 if a run failed."""
    parser = argparse.ArgumentParser(prog="python benchmarks/course", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"one of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the experiment, three as a rule")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"{', '.join(unknown)}: not an experiment; there are {', '.join(EXPERIMENTS)}")
    work = Path(os.environ.get("SHARDTUNE_BENCH_WORK", ROOT / "benchmarks" / ".work")) / "course"
    failures = 0
    for name in options.names or EXPERIMENTS:
        failures += measure_experiment(EXPERIMENTS[name], options.seeds or EXPERIMENTS[name].seeds, work)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
