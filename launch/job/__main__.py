"""Runs one command of a job script: `begin`, `end`, `part` and others."""

import sys

if __name__ == "__main__":
    from launch.main import run_guarded
    from launch.streams import restart_in_utf8

    restart_in_utf8()

    sys.exit(run_guarded("job", sys.argv[1:]))
