"""What the exported classifier of a run answers to its held-out questions, by plain transformers."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean

COMMON = "Dental"
"""The specialty that most rows of `balance` have."""


def class_recall(run: Path) -> dict[str, float]:
    """`recall/<label>`: the share of a label's held-out questions that get it; `recall/rare`: the mean of all but the common.

    The run has an export, and its data is where `benchmarks.course.data.unbalanced_questions` wrote it.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    held_out = run.parents[1] / "held-out.jsonl"
    rows = [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    model = AutoModelForSequenceClassification.from_pretrained(run / "export").eval()
    right_by_label: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(rows), 40):
        part = rows[start : start + 40]
        texts = [row["text"] for row in part]
        batch = tokenizer(texts, truncation=True, max_length=48, padding=True, return_tensors="pt")
        with torch.inference_mode():
            answers = model(**batch).logits.argmax(-1).tolist()
        for row, answer in zip(part, answers, strict=True):
            right_by_label[row["label"]].append(model.config.id2label[answer] == row["label"])
    recall = {f"recall/{label}": round(fmean(right), 6) for label, right in sorted(right_by_label.items())}
    rare = [value for key, value in recall.items() if key != f"recall/{COMMON}"]
    return recall | {"recall/rare": round(fmean(rare), 6)}
