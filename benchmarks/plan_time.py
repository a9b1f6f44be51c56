"""How long a plan takes: `python -m benchmarks.plan_time [8b] [70b] [8x7b] [--words strategy=fsdp2 ...]`.

Runs `shardtune plan` as a user does for Llama models of these sizes on 4 nodes of 8 H100, and writes seconds of wall and of
processor time (its processes included) to benchmarks/results/plan_time.json, with the load that the machine had besides.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.environments import hardware
from benchmarks.planning import MODELS

RESULTS = Path(__file__).parent / "results" / "plan_time.json"
SIZES = {"8b": "Meta-Llama-3-8B", "70b": "Llama-2-70B", "8x7b": "Mixtral-8x7B-Instruct-v0.1"}
WORDS = ["data.max_length=4096", "hardware=h100_80g", "launcher.nodes=4", "launcher.gpus_per_node=8"]


def measured(size: str, more: list[str], place: Path) -> dict[str, Any]:
    """Seconds of one plan, whose answer is left in `place`."""
    (place / size).mkdir(parents=True, exist_ok=True)
    (place / size / "config.json").write_text(json.dumps(MODELS[SIZES[size]]), encoding="utf-8")
    words = [*WORDS, *more]
    command = [sys.executable, "-m", "launch.main", "plan", f"model.path={place / size}", *words, "--json"]
    before, started, load = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic(), os.getloadavg()[0]
    done = subprocess.run(command, capture_output=True, text=True)
    wall, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 69):
        raise SystemExit(done.stderr)
    (place / f"{size}.json").write_text(done.stdout, encoding="utf-8")
    answer = json.loads(done.stdout)
    return {
        "model": SIZES[size],
        "words": " ".join(words),
        "options": len(answer["options"]),
        "wall_s": round(wall, 1),
        "processor_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "load_before": round(load, 1),
        "best": answer["best"],
    }


def main(argv: list[str]) -> int:
    """Measure each size that is named, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*", default=["8b", "70b"], choices=list(SIZES))
    parser.add_argument("--words", nargs="*", default=[], help="further words of the plan")
    parser.add_argument(
        "--answers", type=Path, help="keep the answers here, to compare those of two versions to the byte"
    )
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        rows = [measured(size, options.words, options.answers or Path(place)) for size in options.sizes]
    about = {
        "date": date.today().isoformat(),
        "hardware": hardware(),
        "versions": {package: version(package) for package in ("torch", "transformers", "deepspeed")},
        "command": " ".join(
            ["python -m benchmarks.plan_time", *options.sizes, *(["--words", *options.words] if options.words else [])]
        ),
    }
    RESULTS.write_text(json.dumps(about | {"plans": rows}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
