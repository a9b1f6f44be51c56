"""What torchtune's recipes name by path in their configuration: the documents, a tokenizer that only pads, a constant rate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from torchtune.datasets import PackedDataset


class Documents(Dataset):
    """The tokens of the documents, as torchtune's collators take them, `count` of them."""

    def __init__(self, path: str, count: int) -> None:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        self.rows = [rows[index % len(rows)] for index in range(count)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"tokens": list(self.rows[index]["input_ids"]), "labels": list(self.rows[index]["labels"])}


class Padding:
    """The only thing that the recipes ask of the tokenizer."""

    pad_id = 0
    max_seq_len = None


def documents(tokenizer: Any, *, path: str, count: int, packed: bool, length: int) -> Dataset:
    """The documents one by one, or packed by torchtune to `length` tokens."""
    rows = Documents(path, count)
    return PackedDataset(rows, max_seq_len=length, padding_idx=Padding.pad_id) if packed else rows


def constant(optimizer: torch.optim.Optimizer, num_training_steps: int, last_epoch: int = -1) -> Any:
    """A learning rate that does not change."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0, last_epoch)
