"""`shardtune submit`: compose and freeze a run, then hand it to SLURM. With `--print` show the job script and stop.

Refuses any launcher but SLURM's; without a choice on the command line it takes `launcher=slurm`.
"""

from __future__ import annotations

from pathlib import Path


def main(argv: list[str]) -> int:
    """Submit the run that the overrides in `argv` describe; returns 0. Errors: those of composing and of `submit`."""
    from launch.compose import compose, default_run_dir, freeze
    from launch.slurm import submit

    words = [word for word in argv if word != "--print"]
    print_only = len(words) < len(argv)
    if not any(word.startswith("launcher=") for word in words):
        words.insert(0, "launcher=slurm")
    composed = compose(words)
    run_dir = Path(composed.config.run.dir) if composed.config.run.dir else default_run_dir(composed.sha256)
    if not print_only:
        run_dir = freeze(composed, run_dir)
    return submit(composed.config, [run_dir], print_only=print_only)
