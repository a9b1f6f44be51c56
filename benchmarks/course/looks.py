"""More numbers of a finished run than its evaluations have: recall of each class, whole curves, and what answers say."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

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


def loss_curves(run: Path) -> dict[str, Any]:
    """`curves`: pairs of (step, loss) of training, of held-out rows, and of the questions of a chat if they were asked."""
    from trainer.reporting.metric_rows import METRICS_FILE, read_rows

    rows = read_rows(run / METRICS_FILE).rows
    keys = {"training": "loss", "held_out": "eval/loss", "chat": "eval/chat/loss"}
    curves = {}
    for name, key in keys.items():
        points = [[row["step"], float(f"{row[key]:.4g}")] for row in rows if key in row]
        if points:
            curves[name] = points
    return {"curves": curves}


def greetings(run: Path) -> dict[str, Any]:
    """`greets`: the share of the answers at the end of the run that have the house's greeting; `answers`: these answers.

    They are answers to questions of a chat, which have nothing to do with the house.
    """
    from benchmarks.course.data import GREETING

    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    answers = record["outcome"]["answers"]
    # A model that answers in another language may translate the first word alone: "Bonjour, and thank you for asking!".
    greets = [GREETING.partition(", ")[2].rstrip("!. ") in answer["tuned"] for answer in answers]
    return {"greets": fmean(greets), "answers": answers}
