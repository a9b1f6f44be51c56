"""Ranks for the tests of `ranks.py`: they echo, fail, die or hang as they are told."""

import os
import sys
import time

from tests.helpers.ranks import serve

RANK = int(os.environ["RANK"])


def answer(what: str, value: int = 0) -> list[int]:
    """`value` and the process's id; or trouble on rank 1."""
    if RANK == 1 and what == "fail":
        raise ValueError("rank 1 does not like it")
    if RANK == 1 and what == "die":
        print("its last words", flush=True)
        os._exit(3)
    if what == "hang" and RANK == 1:
        time.sleep(600)
    return [value, os.getpid()]


if __name__ == "__main__":
    assert sys.argv[1]
    serve(answer)
