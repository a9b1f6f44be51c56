"""A host of a run over ssh without ranks: what it was told goes to a file, then it does as STAND_IN says."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from launch.cluster import node


def run(told: dict, begin: dict) -> int:
    """In place of the ranks: notes what came, and ends by itself, with a code, or when it is told to."""
    what = os.environ["STAND_IN"].split(",")[begin["rank"]]
    signals: list[str] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, _: signals.append(signal.Signals(number).name))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGUSR1])
    place = Path(told["config"]).parent / f"node-{begin['rank']}.json"
    seen = {"environment": dict(os.environ), "cwd": str(Path.cwd()), "begin": begin, "told": told, "pid": os.getpid()}

    def note() -> None:
        aside = place.with_suffix(".part")
        aside.write_text(json.dumps({**seen, "signals": signals}))
        aside.rename(place)

    note()
    print(f"node {begin['rank']} prints", flush=True)
    print(f"node {begin['rank']} complains", file=sys.stderr, flush=True)
    while what == "wait" and not signals:
        time.sleep(0.05)
    note()
    return 130 if "SIGINT" in signals else int(what) if what.isdecimal() else 0


if __name__ == "__main__":
    node.run_ranks = run
    sys.exit(node.main("tests.launch.cluster.ssh_node"))
