"""What each rank reads of a base model while it loads, counted without weights: `python -m benchmarks.loading`.

The architectures are those of Llama 3.1 8B and Qwen3 30B-A3B, with the names and shapes that their published files have,
in bfloat16. The readers are those of a run, over files that answer with tensors on the meta device. Counted are the bytes
that a rank asks its files for, the largest tensor that it holds meanwhile, and how often it goes back in a file.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from strategies.parameters import meta_context
from trainer.model import experts
from trainer.model.weights import PretrainedWeights

GIB = 2**30
RANKS = 8
FILE_BYTES = 5 * 10**9
"""Bytes of a file of the published models, about."""


class CountedFiles:
    """Stands for `SafetensorsFiles`: tensors of given shapes, without values, and a count of what is asked for."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.directory = Path("published")
        self.shapes = shapes
        self.bytes_read = 0
        self.back = 0
        """Reads that begin before the end of an earlier read of the same file."""
        self._place: dict[str, tuple[int, int]] = {}
        end = 0
        for name, shape in shapes.items():
            file, offset = divmod(end, FILE_BYTES)
            self._place[name] = file, offset
            end += 2 * math.prod(shape)
        self._reached: dict[int, int] = {}

    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, stored: str) -> tuple[int, ...]:
        return self.shapes[stored]

    def on_meta(self, stored: str) -> Tensor:
        return torch.empty(self.shapes[stored], dtype=torch.bfloat16, device="meta")

    def rows(self, stored: str, first: int | None = None, last: int | None = None) -> Tensor:
        tensor = self.on_meta(stored)[first:last]
        file, offset = self._place[stored]
        row_bytes = 2 * math.prod(self.shapes[stored][1:])
        begin = offset + (first or 0) * row_bytes
        self.back += begin < self._reached.get(file, 0)
        self._reached[file] = begin + tensor.nbytes
        self.bytes_read += tensor.nbytes
        return tensor

    def read_slice(self, stored: str, start: int, stop: int) -> Tensor:
        row_size = math.prod(self.shapes[stored][1:])
        first, last = start // row_size, -(-stop // row_size)
        return self.rows(stored, first, last).reshape(-1)[start - first * row_size : stop - first * row_size]

    def close(self) -> None:
        pass


@dataclass(slots=True)
class Read:
    """What one rank read."""

    bytes_read: int = 0
    largest: int = 0
    """Bytes of the largest tensor that it made of what it read."""
    back: int = 0


def llama_8b() -> tuple[Any, dict[str, tuple[int, ...]]]:
    """(the architecture on meta, the shapes in its files)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with meta_context():
        plain = LlamaForCausalLM(config)
    return plain, {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()}


def qwen3_30b_a3b() -> tuple[Any, dict[str, tuple[int, ...]]]:
    """As `llama_8b`. The files have each expert's projections as matrices of their own."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
    )
    with meta_context():
        plain = Qwen3MoeForCausalLM(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in plain.state_dict().items():
        if ".mlp.experts." not in name:
            shapes[name] = tuple(tensor.shape)
            continue
        prefix = name.rpartition(".")[0]
        for expert in range(128):
            if name.endswith("gate_up_proj"):
                shapes[f"{prefix}.{expert}.gate_proj.weight"] = (768, 2048)
                shapes[f"{prefix}.{expert}.up_proj.weight"] = (768, 2048)
            else:
                shapes[f"{prefix}.{expert}.down_proj.weight"] = (2048, 768)
    return plain, shapes


def ranges(strategy: str, shape: torch.Size, rank: int) -> Iterator[tuple[int, int]]:
    """The elements `[start, stop)` of a flattened parameter that a rank asks for."""
    count = shape.numel()
    if strategy == "fsdp2":  # rows, as `fully_shard` deals them
        rows = -(-shape[0] // RANKS)
        row_size = count // shape[0]
        start, stop = rank * rows * row_size, min((rank + 1) * rows * row_size, count)
    elif strategy == "everything":
        start, stop = 0, count
    elif strategy == "rank 0 alone":
        start, stop = 0, count if rank == 0 else 0
    else:  # an equal part of the flattened parameter
        share = -(-count // RANKS)
        start, stop = min(rank * share, count), min((rank + 1) * share, count)
    if start < stop:
        yield start, stop


def count(plain: Any, shapes: dict[str, tuple[int, ...]], strategy: str, rank: int) -> Read:
    """Let one rank load."""
    files = CountedFiles(shapes)
    with mock.patch("trainer.model.weights.SafetensorsFiles", lambda _: files):
        checkpoint = PretrainedWeights(files.directory, plain)
    read = Read()
    for name, parameter in plain.named_parameters():
        for start, stop in ranges(strategy, parameter.shape, rank):
            read.largest = max(read.largest, checkpoint.read_slice(name, start, stop).nbytes)
    read.bytes_read, read.back = files.bytes_read, files.back
    return read


STRATEGIES = {
    "fsdp2, hsdp": "fsdp2",
    "zero3": "part",
    "zero3, parameters on a drive: before": "rank 0 alone",
    "zero3, parameters on a drive": "part",
    "ddp, zero1, zero2: before, and on CPUs": "everything",
    "ddp, zero1, zero2 on GPUs": "part",
}


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=__doc__)
    parser.parse_args()
    experts.register()
    for title, model in (("Llama 3.1 8B", llama_8b), ("Qwen3 30B-A3B", qwen3_30b_a3b)):
        plain, shapes = model()
        size = 2 * sum(math.prod(shape) for shape in shapes.values())
        print(f"\n{title}: {size / GIB:.1f} GiB in bfloat16, {len(shapes):,} tensors, {RANKS} ranks of one host\n")
        print("| strategy | a rank reads, GiB | all ranks | largest tensor of a rank, GiB | steps back in a file |")
        print("|---|---|---|---|---|")
        for name, strategy in STRATEGIES.items():
            reads = [count(plain, shapes, strategy, rank) for rank in range(RANKS)]
            most = max(read.bytes_read for read in reads) / GIB
            total = sum(read.bytes_read for read in reads) / GIB
            largest = max(read.largest for read in reads) / GIB
            back = max(read.back for read in reads)
            print(f"| {name} | {most:.2f} | {total:.1f} | {largest:.2f} | {back} |")


if __name__ == "__main__":
    main()
