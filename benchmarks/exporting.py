"""Seconds and memory of writing a whole model out of its checkpoint, beside gathering it from an engine, as before.

python -m benchmarks.exporting [--shape smollm2|3gib] [--processes 2] [--only new|old]. Each process has one thread, and is forked
with the libraries loaded; its memory is the peak beyond what it had then. The old way is one process, as it always was. The files
of both ways must have the same SHA-256. With both ways, the result goes to benchmarks/results/exporting.json.
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers

from strategies import runtime as processes
from strategies.base import Progress
from strategies.matmul import Matmul
from strategies.saved_parameters import SavedParameters
from tests.helpers.exports import trained, weight_source
from tests.helpers.gathered_export import write_gathered
from tests.helpers.tokenizers import tiny_tokenizer
from trainer.build.step_module import build_step_module
from trainer.data.config import Layout
from trainer.export.config import ExportConfig
from trainer.export.trained_model import TrainedModel, trained_shapes
from trainer.export.write import write_export
from trainer.model.config import ModelConfig
from trainer.model.loading import load_tokenizer
from trainer.objectives.sft import SftConfig
from trainer.optim.config import AdamwConfig, SgdConfig
from trainer.reporting.documents.facts import ModelFacts
from trainer.tuning.base import FullConfig

GIB = 2**30
SHAPES = {
    "smollm2": (
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
        {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    ),
    "3gib": (
        {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "num_attention_heads": 16},
        {"num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": True},
    ),
}
"""Settings of a Llama: that of SmolLM2-135M, and one of 0.79 billion parameters, stored in float32."""
MAX_SHARD_GIB = 0.5
RESULTS = Path(__file__).parent / "results" / "exporting.json"


def optimizer_of(shape: str) -> AdamwConfig | SgdConfig:
    """AdamW, whose moments a checkpoint has too; of the large model plain SGD, so that the old way fits into a small host."""
    return AdamwConfig(lr=1e-4) if shape == "smollm2" else SgdConfig(lr=1e-4, momentum=0.0)


def make_base(shape: str, directory: Path) -> None:
    """A model of random weights with a tokenizer."""
    torch.manual_seed(0)
    sizes, more = SHAPES[shape]
    config = transformers.LlamaConfig(**sizes, **more)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)


def make_checkpoint(shape: str, base: Path, checkpoint: Path) -> None:
    """The checkpoint of a run after its first step; of the large model before it."""
    steps = 1 if shape == "smollm2" else 0
    engine, *_ = trained(base, FullConfig(), one_process(), steps=steps, optim=optimizer_of(shape))
    checkpoint.mkdir()
    engine.state(Progress()).save(checkpoint)


def write_new_file(shape: str, base: Path, checkpoint: Path, to: Path) -> None:
    """The export as it is written today."""
    model = ModelConfig(path=str(base))
    tokenizer = load_tokenizer(model)
    built = build_step_module(
        model,
        objective_config=SftConfig(),
        tuning_config=FullConfig(),
        layout=Layout.auto,
        tokenizer=tokenizer,
        num_labels=None,
        half_on_gpu=False,
    )
    described = TrainedModel(
        built=built,
        source=weight_source(built, base),
        trained=SavedParameters(checkpoint, trained_shapes(built), schedule_free_beta=None),
        tokenizer=tokenizer,
        base_directory=base,
        base_path=str(base),
        seed=1,
        frozen_dtype=torch.float32,
    )
    config = ExportConfig(max_shard_gib=MAX_SHARD_GIB)
    write_export(described, destination=to, config=config, facts=ModelFacts(), runtime=one_process())


def write_old(shape: str, base: Path, checkpoint: Path, to: Path) -> None:
    """The export as it was written before: an engine loads the checkpoint, and is gathered tensor by tensor."""
    engine, built, _ = trained(base, FullConfig(), one_process(), steps=0, optim=optimizer_of(shape))
    engine.load(checkpoint)
    write_gathered(engine, built, base, to, dtype=torch.float32, max_bytes=int(MAX_SHARD_GIB * GIB))


def one_process() -> processes.Runtime:
    """A job of one rank on the CPU."""
    return processes.join_job("cpu", timeout_s=3600, threads=1, matmul=Matmul.blas)


def measured(work: Callable[[], None], processes: int = 1) -> dict[str, float]:
    """What `work` takes in forked processes that form a job of `processes` ranks.

    Returns seconds of the slowest process, CPU seconds of all, and GiB beyond those at its start, of the largest process.
    """
    pipes = [_fork(work, _rank_variables(rank, processes)) for rank in range(processes)]
    texts = [pipe.read() for pipe in pipes]
    for _ in range(processes):
        os.wait()
    if not all(texts):
        sys.exit("a process failed, as the lines above say")
    figures = [json.loads(text) for text in texts]
    return {
        "s": max(each["s"] for each in figures),
        "cpu_s": sum(each["cpu_s"] for each in figures),
        "gib": max(each["gib"] for each in figures),
    }


def _rank_variables(rank: int, processes: int) -> dict[str, str]:
    """What torchrun would set for a rank; nothing for a job of one."""
    if processes == 1:
        return {}
    if rank == 0:
        os.environ["MASTER_PORT"] = str(_free_port())
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    return {name: str(number) for name, number in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}


def _free_port() -> int:
    """A port of this host that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _fork(work: Callable[[], None], variables: dict[str, str]) -> TextIO:
    """Start a process that does `work`. Returns the pipe at which it tells its figures, as JSON; nothing if it failed."""
    answer, told = os.pipe()
    if os.fork() == 0:
        try:
            os.close(answer)
            os.environ.update(variables)
            os.write(told, json.dumps(_measured_here(work)).encode())
        except BaseException:  # noqa: BLE001 - the parent's own work must not go on here
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(told)
    return os.fdopen(answer)


def _measured_here(work: Callable[[], None]) -> dict[str, float]:
    """What work takes in this process: seconds, CPU seconds, and GiB beyond those at its start."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here
    before_kib = memory_kib("VmRSS")
    began = time.perf_counter()
    work()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "s": time.perf_counter() - began,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "gib": (memory_kib("VmHWM") - before_kib) * 1024 / GIB,
    }


def memory_kib(name: str) -> int:
    """A number of this process in `/proc/self/status`: VmRSS now, VmHWM at its peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{name}:")[1].split()[0])


def digests(directory: Path) -> dict[str, str]:
    """The SHA-256 of each file of weights."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def model_name() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def main() -> None:
    """Make a model and a checkpoint, and write the export both ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--processes", type=int, default=2, help="of today's way")
    parser.add_argument("--only", choices=["new", "old"])
    asked = parser.parse_args()
    figures: dict[str, dict[str, float]] = {}
    files: dict[str, dict[str, str]] = {}
    load_before = os.getloadavg()[0]
    # transformers loads a class when it is first asked for. Here, so that no measured process imports it.
    assert issubclass(transformers.LlamaForCausalLM, transformers.PreTrainedModel)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base, checkpoint = root / "base", root / "checkpoint"
        measured(lambda: make_base(asked.shape, base))
        measured(lambda: make_checkpoint(asked.shape, base, checkpoint))
        # With several processes, today's way is also measured with one: the old way has no more.
        ways = [
            (f"new, {count} processes", write_new_file, count) for count in sorted({1, asked.processes}, reverse=True)
        ]
        for name, write, processes in [*ways, ("old", write_old, 1)]:
            if asked.only is not None and not name.startswith(asked.only):
                continue
            to = root / name
            figures[name] = measured(lambda write=write, to=to: write(asked.shape, base, checkpoint, to), processes)
            shown = ", ".join(f"{key} {value:.2f}" for key, value in figures[name].items())
            print(f"{asked.shape}, {name}: {shown}", flush=True)
            files[name] = digests(to)
            shutil.rmtree(to)
    if asked.only is not None:
        return
    first, *others = files.values()
    assert all(other == first for other in others), "the ways write other bytes"
    print(f"{len(first)} files with the same SHA-256")
    save_result(asked.shape, {"files": len(first), "load": [load_before, os.getloadavg()[0]], "ways": figures})


def save_result(shape: str, result: dict[str, Any]) -> None:
    """Put the figures of a shape beside those of the other one."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    results[shape] = {"processor": model_name(), "torch": torch.__version__, **result}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
