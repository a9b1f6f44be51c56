"""`shardtune submit`: compose and freeze a run, then hand it to SLURM. With `--print` show the job script and stop.

Refuses any launcher but SLURM's; without a choice on the command line it takes `launcher=slurm`.
"""

from __future__ import annotations

from pathlib import Path


def main(argv: list[str]) -> int:
    """Submit the run that the overrides in `argv` describe; returns 0. Errors: those of composing and of `submit`."""
    from launch.compose import compose, default_run_dir, freeze, is_finished
    from launch.slurm import submit

    words = [word for word in argv if word != "--print"]
    print_only = len(words) < len(argv)
    if not any(word.startswith("launcher=") for word in words):
        words.insert(0, "launcher=slurm")
    composed = compose(words)
    asked = composed.config.run.dir
    run_dir = Path(asked).expanduser() if asked else default_run_dir(composed.sha256)
    if not print_only:
        finished = is_finished(run_dir)
        run_dir = freeze(composed, run_dir)
        if finished:
            print(f"{run_dir}: already finished with this configuration; nothing to do")
            return 0
    return submit(composed.config, [run_dir], print_only=print_only)
