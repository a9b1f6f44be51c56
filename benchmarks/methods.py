"""Measures every tuning method through the real trainer: trained parameters, peak memory, time of a step, loss.

    python benchmarks/methods.py [--model DIR] [--steps 6] [--rounds 2]   # writes benchmarks/results/methods.json

Without `--model` a random Llama of 4 blocks and width 256 is tuned, which says what a method costs and not what it learns.
Each method runs in a process of its own, forked after the imports, so that its peak memory is what lies above them. Its
steps alternate with those of LoRA in the same process; times are CPU seconds of one thread, which other programs on the
machine disturb least.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import runpy
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RESULT = ROOT / "benchmarks" / "results" / "methods.json"
SHAPE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8}
BATCH = 8


def measure(row: str, config: Any, model: Path, folder: Path, steps: int, rounds: int) -> dict[str, Any]:
    """One method beside LoRA, in this process; the first round warms up and is not counted."""
    import torch

    from strategies import runtime as processes
    from tests.helpers.building import data_set, run_config, trainer_for
    from trainer.tuning.base import LoraConfig

    torch.set_num_threads(1)
    runtime = processes.join_job("cpu", timeout_s=600, threads=1)
    data = data_set(folder, uneven=False, num=64)
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    total = steps * (rounds + 1)
    plain = run_config(model, "single", "lora", micro=BATCH, steps=total, batch={"global": BATCH, "micro": BATCH})
    trainer = trainer_for(replace(plain, tuning=config), data, runtime)
    took: dict[str, list[float]] = {"method": [], "lora": []}
    losses: list[float] = []

    def go(which: str, of: Any) -> None:
        for batch in of.loader.steps(of.progress.samples, steps):
            began = time.process_time()
            record = of.train_step(batch)
            took[which].append(time.process_time() - began)
            if which == "method":
                losses.append(float(record.local_sums["loss"]) / record.counts["loss"])

    go("method", trainer)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    beside = trainer_for(replace(plain, tuning=LoraConfig(rank=8)), data, runtime)
    go("lora", beside)
    for times in took.values():
        times.clear()
    for _ in range(rounds):
        go("lora", beside)
        go("method", trainer)
    named = list(trainer.engine.step_module.named_parameters())
    processes.leave_job()
    return {
        "row": row,
        "trained": sum(p.numel() for _, p in named if p.requires_grad),
        "memory_mib": (peak - idle) / 1024,
        "step_ratio": statistics.median(took["method"]) / statistics.median(took["lora"]),
        "step_s": statistics.median(took["method"]),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def in_a_process(*arguments: Any) -> dict[str, Any]:
    """`measure` in a fork of this process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, json.dumps(measure(*arguments)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    if not text:
        raise RuntimeError(f"{arguments[0]}: the measuring process ended without a result")
    return json.loads(text)


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()

    import peft
    import torch
    import transformers

    import strategies.runtime
    import tests.helpers.building as building

    settings = runpy.run_path(str(ROOT / "docs" / "make_methods.py"))["SETTINGS"]
    from trainer.config.combinations import methods_by_name

    folder = Path(tempfile.mkdtemp())
    model = options.model or building.model_dir(folder, **SHAPE)
    building.data_set(folder, uneven=False, num=64)
    assert strategies.runtime
    found = []
    for row in methods_by_name():
        found.append(in_a_process(row, settings[row][0], model, folder, options.steps, options.rounds))
        print(json.dumps(found[-1]), flush=True)
    record = {
        "command": "python benchmarks/methods.py" + "".join(f" {word}" for word in sys.argv[1:]),
        "model": options.model.name if options.model else "random Llama, 4 blocks, width 256",
        "random": options.model is None,
        "steps": options.steps * (options.rounds + 1),
        "batch": f"{BATCH} documents of 4 to 40 tokens, fp32, AdamW",
        "hardware": f"{platform.processor() or platform.machine()}, one thread",
        "versions": {"torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__},
        "methods": {each.pop("row"): each for each in found},
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
