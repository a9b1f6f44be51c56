"""`python -m launch.evaluate`: one rank of an evaluation, as torchrun and srun start it."""

import sys

from trainer.stopping.signals import block_signals

if __name__ == "__main__":
    block_signals()
    from launch.main import run_guarded
    from launch.streams import restart_in_utf8

    restart_in_utf8()
    from launch.train import exit_process

    exit_process(run_guarded("evaluate", sys.argv[1:]))
