"""What all trainers get: conversations, the same as tokens, a tokenizer, and a Llama-shaped model drawn from a seed."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversations import make_inputs

IGNORED = -100
SEED = 11


@dataclass(frozen=True, slots=True)
class Size:
    """A Llama shape, and the vocabulary and longest document that go with it."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    longest: int
    """Conversations with more tokens are left out."""

    @property
    def matmul_parameters(self) -> int:
        """Weights of the matrix products: the blocks and the head, without embeddings and norms."""
        head_dim = self.hidden // self.heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_heads * head_dim
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.vocabulary * self.hidden

    def flops_per_token(self, length: float, *, lora: bool = False) -> float:
        """Floating-point operations of forward and backward for one token in a document of `length` tokens.

        6 for each weight (4 where it is frozen), and causal attention's 6 x layers x hidden x length.
        """
        return (4 if lora else 6) * self.matmul_parameters + self.attention_flops(length)

    def attention_flops(self, length: float) -> float:
        """The part of `flops_per_token` that grows with the length."""
        return 6.0 * self.layers * self.hidden * length


SMALL = Size("16.9M", 384, 6, 6, 6, 1024, 8_192, 512)
GPU = Size("1.5B", 2048, 24, 16, 8, 6144, 32_000, 2_048)
TINY = Size("tiny", 64, 2, 2, 2, 128, 512, 512)
"""For dry runs and tests."""


def make(directory: Path, size: Size, train: int = 256, held_out: int = 16) -> Path:
    """Fill `directory`, once: train and eval as `.jsonl` and `_tokens.jsonl`, the model, a tokenizer for each template."""
    stamp = directory / "done"
    if stamp.exists():
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    base = directory / "base"
    rows = [json.loads(line) for line in make_inputs(base, 4_000, size.vocabulary).open()]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base / "generation")
    chosen, tokens = [], []
    for row in rows:
        made = tokens_of(row["messages"], tokenizer)
        if len(made["input_ids"]) <= size.longest:
            chosen.append(row)
            tokens.append(made)
        if len(chosen) == train + held_out:
            break
    write(directory / "train.jsonl", chosen[:train])
    write(directory / "eval.jsonl", chosen[train:])
    write(directory / "train_tokens.jsonl", tokens[:train])
    write(directory / "eval_tokens.jsonl", tokens[train:])
    for kind in ("plain", "generation"):
        shutil.move(base / kind, directory / kind)
    shutil.rmtree(base)
    make_model(directory / "model", size, directory / "plain")
    stamp.touch()
    return directory


def tokens_of(messages: list[dict[str, str]], tokenizer: Any) -> dict[str, list[int]]:
    """Ids, and labels in place: the assistant's text and its end token, -100 elsewhere."""
    made = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(made["input_ids"], made["assistant_masks"], strict=True)
    return {"input_ids": made["input_ids"], "labels": [token if learned else IGNORED for token, learned in pairs]}


def write(path: Path, rows: list[Any]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_model(directory: Path, size: Size, tokenizer: Path) -> None:
    """A Llama with random weights, as transformers saves it, with the tokenizer beside it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        intermediate_size=size.intermediate,
        vocab_size=size.vocabulary,
        max_position_embeddings=8_192,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
    )
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config)
    model.to(torch.bfloat16 if size.hidden >= 2048 else torch.float32).save_pretrained(directory)
    for file in tokenizer.iterdir():
        shutil.copy(file, directory / file.name)
