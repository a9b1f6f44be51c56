"""Seconds and CPU seconds from the start of a process to the end of a LoRA run's first step: ours, and Trainer with peft.

    python benchmarks/first_step.py model=<directory> [rounds=5] [threads=2] [other=<directory>] [to=<file>]

Both train the same model on the same conversations (LoRA of rank 8 on all linear layers, one process, CPU, float32, batches of
four, no W&B), in turn, so that other work on the machine meets both. The step is over when ours has written the row of its first
step, and when the Trainer calls `on_step_end`; CPU seconds are of the process and the children it has waited for until then.
Both find their modules compiled. `threads`: of OpenMP; with several on a busy machine, one that waits for another burns CPU
seconds. `other`: a checkout of another version of shardtune, measured in turn with the two. `to`: a JSON file for the results.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAINER = """
import json, sys
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

model_dir, data, to = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_dir)
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
rows = []
for line in open(data):
    ids = tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=True, return_dict=True)["input_ids"][:256]
    rows.append({"input_ids": ids, "labels": ids})
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

def collate(batch):
    most = max(len(row["input_ids"]) for row in batch)
    padded = [row["input_ids"] + [tokenizer.pad_token_id] * (most - len(row["input_ids"])) for row in batch]
    labels = [row["labels"] + [-100] * (most - len(row["labels"])) for row in batch]
    mask = [[1] * len(row["input_ids"]) + [0] * (most - len(row["input_ids"])) for row in batch]
    return {"input_ids": torch.tensor(padded), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)}

class Told(TrainerCallback):
    def on_step_end(self, *_, **__):
        Path(to, "first").touch()

arguments = TrainingArguments(output_dir=to, per_device_train_batch_size=4, max_steps=2, report_to=[], use_cpu=True,
                              save_strategy="no", disable_tqdm=True)
Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[Told()]).train()
"""


def conversations(path: Path, count: int = 64) -> Path:
    """A file of short conversations."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n} and {n}?"},
                {"role": "assistant", "content": f"It is {2 * n}."},
            ]
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def ours(model: str, data: Path, to: Path) -> tuple[list[str], Path]:
    """(the command, the file whose first line ends the first step)."""
    words = [
        f"model.path={model}",
        f"data.path={data}",
        "data.max_length=256",
        f"data.cache_dir={to / 'cache'}",
        "tuning=lora",
    ]
    words += ["tuning.rank=8", "batch.global=4", "batch.micro=4", "budget.steps=2", "run.device=cpu", "precision=fp32"]
    words += ["logging.every_steps=1", "logging.wandb=disabled", "logging.report=false", f"run.dir={to / 'run'}"]
    return [sys.executable, "-m", "launch.main", "train", *words], to / "run" / "metrics.jsonl"


def theirs(model: str, data: Path, to: Path) -> tuple[list[str], Path]:
    """The same of the Trainer."""
    return [sys.executable, "-c", TRAINER, model, str(data), str(to)], to / "first"


def first_step(
    command: list[str], marker: Path, bytecode: Path, checkout: Path = ROOT, threads: int | None = None
) -> dict[str, float]:
    """Run until the marker is there; wall and CPU seconds until then.

    `bytecode`: where Python keeps compiled modules, unless the environment says it. `checkout`: the tree that shardtune is
    imported from. `threads`: of OpenMP; None: one for each core.
    """
    paths = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads or os.cpu_count()), "HF_HUB_OFFLINE": "1"}
    # As for installed packages: modules are compiled once. Without, each start of ours would compile all of its modules.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    env.setdefault("PYTHONPYCACHEPREFIX", str(bytecode))
    began = time.monotonic()
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=marker.parent.parent
    )
    while not marker.exists() or (marker.suffix and not marker.stat().st_size):
        if process.poll() is not None:
            raise RuntimeError(process.stderr.read().decode()[-2000:] if process.stderr else "")
        time.sleep(0.02)
    seconds = time.monotonic() - began
    ticks = Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[11:15]
    process.kill()
    process.wait()
    return {"seconds": round(seconds, 2), "cpu_seconds": round(sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"), 2)}


def main() -> None:
    """Measure, print and write."""
    words = dict(word.split("=", 1) for word in sys.argv[1:])
    model = str(Path(words["model"]).resolve())
    rounds = int(words.get("rounds", 5))
    threads = int(words["threads"]) if "threads" in words else None
    programs = [("shardtune", ours, ROOT), ("Trainer", theirs, ROOT)]
    if "other" in words:
        programs.append(("other version", ours, Path(words["other"]).resolve()))
    found: dict[str, list[dict[str, float]]] = {name: [] for name, _, _ in programs}
    with tempfile.TemporaryDirectory() as directory:
        data = conversations(Path(directory) / "train.jsonl")
        for number in range(
            rounds + 1
        ):  # the first warms caches: files, compiled modules, and our proof of the architecture
            for name, of, checkout in programs:
                to = Path(directory) / f"{name}-{number}" / "out"
                to.mkdir(parents=True)
                measured = first_step(*of(model, data, to), Path(directory) / "bytecode", checkout, threads)
                print(
                    name, measured, f"load {os.getloadavg()[0]:.1f}", "(not counted)" if not number else "", flush=True
                )
                found[name] += [measured] if number else []
    medians = {
        name: {key: statistics.median(each[key] for each in measured) for key in ("seconds", "cpu_seconds")}
        for name, measured in found.items()
    }
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft", "accelerate")}
    answer = {
        "what": "seconds from the start of a process to the end of the first step of a LoRA run",
        "command": "python benchmarks/first_step.py " + " ".join(sys.argv[1:]),
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": threads or os.cpu_count(),
            "load": os.getloadavg()[0],
        },
        "versions": {"python": platform.python_version(), **versions},
        "bitsandbytes": next((d.version for d in metadata.distributions() if d.name == "bitsandbytes"), None),
        "medians": medians,
        "each": found,
    }
    print(json.dumps(medians, indent=1))
    if "to" in words:
        Path(words["to"]).write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
