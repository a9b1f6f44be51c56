"""`python -m tests.helpers.closed_streams <words>`: the command, its standard streams closed as by `<&- >&- 2>&-`."""

import os
import sys


def main(words: list[str]) -> int:
    from launch.main import main as command

    for descriptor in range(3):
        os.close(descriptor)
    # What Python makes of descriptors that are closed when it starts.
    sys.stdin = sys.stdout = sys.stderr = None
    return command(words)


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))
