"""`python -m launch.export`: one of the processes that write an export, as torchrun starts it."""

import sys

from trainer.stopping.signals import block_signals

if __name__ == "__main__":
    block_signals()
    from launch.main import run_guarded
    from launch.streams import restart_in_utf8
    from strategies.compat.python import end_process, run_exit_functions

    restart_in_utf8()
    exit_code = run_guarded("export", sys.argv[1:])
    # At once: the threads of process groups can abort an interpreter that shuts down in order.
    if exit_code == 0:
        run_exit_functions()
    sys.stdout.flush()
    sys.stderr.flush()
    end_process(exit_code)
