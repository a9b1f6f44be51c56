"""One of the ranks of `test_packed_cache.py`: `python -m tests.model.packing_rank <directory> <index> <count> <pause>`."""

import json
import sys
import time
from pathlib import Path

from tests.model.test_packed_cache import SIZES, made
from trainer.model import packed_cache


def main(directory: str, index: str, count: str, pause: str) -> None:
    """Say which weight it packs as it begins with it, then whether all are right."""
    packed_cache.MIN_CACHED_BYTES, log = 0, []

    def quantise(name):
        log.append(name)
        print("packs", name, flush=True)
        time.sleep(float(pause))
        return made(name)

    weights = packed_cache.QuantisedWeightsCache(
        Path(directory), SIZES, quantise, host_rank=packed_cache.HostRank(int(index), int(count))
    )
    same = all(weights.read_slice(name, 16, size - 3).equal(made(name)[16 : size - 3]) for name, size in SIZES.items())
    print(json.dumps({"packed": log, "same": same, "reason": weights.reason_not_cached}))


if __name__ == "__main__":
    main(*sys.argv[1:])
