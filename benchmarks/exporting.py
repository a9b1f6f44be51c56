"""Seconds and memory of writing a whole model out of its checkpoint, beside gathering it from an engine, as before.

python -m benchmarks.exporting [--shape smollm2|3gib] [--only new|old]. Each way runs in one process of one thread, forked with
the libraries loaded; its memory is the peak beyond what it had then. The files of both ways must have the same SHA-256.
"""

import argparse
import hashlib
import json
import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from strategies import runtime as processes
from strategies.base import Progress
from strategies.matmul import Matmul
from strategies.parameters import meta_context
from strategies.saved_parameters import SavedParameters
from tests.helpers.exports import trained, weight_source
from tests.helpers.gathered_export import write_gathered
from tests.helpers.tokenizers import tiny_tokenizer
from trainer.build.parts import build_step
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


def write_new(shape: str, base: Path, checkpoint: Path, to: Path) -> None:
    """The export as it is written today."""
    model = ModelConfig(path=str(base))
    tokenizer = load_tokenizer(model)
    built = build_step(
        model,
        objective_config=SftConfig(),
        tuning_config=FullConfig(),
        layout=Layout.auto,
        tokenizer=tokenizer,
        num_labels=None,
        context=meta_context(),
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
    return processes.start("cpu", timeout_s=3600, threads=1, matmul=Matmul.blas)


def measured(work: Callable[[], None]) -> dict[str, float]:
    """What work takes in a process of its own: seconds, seconds of the processor, and GiB beyond those at its start."""
    answer, told = os.pipe()
    if os.fork() == 0:
        try:
            os.write(told, json.dumps(_measured_here(work)).encode())
        except BaseException:  # noqa: BLE001 - the parent's own work must not go on here
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(told)
    with os.fdopen(answer) as pipe:
        text = pipe.read()
    os.wait()
    if not text:
        sys.exit("a process failed, as the lines above say")
    return json.loads(text)


def _measured_here(work: Callable[[], None]) -> dict[str, float]:
    """What work takes in this process, as `measured` returns it."""
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


def main() -> None:
    """Make a model and a checkpoint, and write the export both ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--only", choices=["new", "old"])
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base, checkpoint = root / "base", root / "checkpoint"
        measured(lambda: make_base(asked.shape, base))
        measured(lambda: make_checkpoint(asked.shape, base, checkpoint))
        files = {}
        for name, write in (("new", write_new), ("old", write_old)):
            if asked.only not in (None, name):
                continue
            found = measured(lambda write=write, name=name: write(asked.shape, base, checkpoint, root / name))
            print(
                f"{asked.shape}, {name}: " + ", ".join(f"{key} {value:.2f}" for key, value in found.items()), flush=True
            )
            files[name] = digests(root / name)
        if len(files) == 2:
            assert files["new"] == files["old"], "the two ways write other bytes"
            print(f"{len(files['new'])} files with the same SHA-256")


if __name__ == "__main__":
    main()
