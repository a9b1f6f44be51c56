"""Runs that diverge, and runs that only look bad: which of them are called diverged, or worse than before training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from benchmarks.challenges.language import KNOWN, OTHER, WORDS, sentences, train, write
from strategies.runtime import Runtime
from trainer.monitors.anomalies import Guards, Outlier
from trainer.monitors.guard_config import GuardsConfig

STEPS, EVERY = 60, 20
DOCUMENTS, HELD_OUT = 160, 64
PROMPT_WORDS = 6

HEALTHY = (
    "random labels",
    "8 documents 60 times",
    "another language",
    "random weights (Gemma)",
    "dpo",
    "ipo",
    "kto",
    "distillation",
    "a spike that recovers",
    "what it knows",
)
"""Runs that must not be called diverged, whatever else is found of them."""
ODD_BATCH = "one batch of random words"
WORSE_DATA = "data that get worse within ten steps"
DISTURBED = (ODD_BATCH, WORSE_DATA)
"""Runs in which something stands out after half of their steps."""
DISTURBED_AT = 30
"""The step of the odd batch, and the last one before the data get worse."""
WORSE_SHARE = 0.012
"""Share of the words that are random in the first step of worse data; in each of the next nine it is as much more."""
DIVERGING = ("a rate of 3", "a rate of 3 after half warm-up", "a plateau")
"""Runs that must be."""


def course(directory: Path, base: Path, kind: str, name: str, seed: int) -> dict[str, Any]:
    """One run of a kind: its held-out loss before and at the end, and what was said at the end."""
    data = directory / name
    data.mkdir(exist_ok=True)
    words = [f"model.path={base}", f"run.seed={seed}", f"budget.steps={STEPS}", f"evaluation.every_steps={EVERY}"]
    words += _words(directory, data, kind, seed)
    record = train(directory / f"{name}-run", words)
    losses = [row["eval/loss"] for row in record["evaluations"]]
    found = record["challenges"].get("divergence", {})
    verdict = found.get("verdict") if found.get("found") else None
    return {
        "before": losses[0],
        "last": losses[-1],
        "diverged": verdict == "diverged",
        "worse": verdict == "worse than before training",
        "recovered": found.get("recovered_at") is not None,
    }


def disturbed(directory: Path, base: Path, kind: str, name: str, seed: int) -> None:
    """Make a run on the known language in which the words of some steps are random."""
    data = directory / name
    data.mkdir(exist_ok=True)
    drawn = random.Random(f"disturbed {seed}")
    rows = []
    for number, text in enumerate(sentences(KNOWN, f"course {seed}", 8 * STEPS)):
        step = number // 8 + 1
        odd_share = float(step == DISTURBED_AT)
        if kind == WORSE_DATA:
            odd_share = WORSE_SHARE * min(max(step - DISTURBED_AT, 0), 10)
        rows.append(" ".join(drawn.choice(WORDS) if drawn.random() < odd_share else word for word in text.split()))
    words = [f"model.path={base}", f"run.seed={seed}", f"budget.steps={STEPS}", "optim.lr=1e-4", "data.shuffle=false"]
    train(directory / f"{name}-run", [*words, f"data.path={write(data / 'train.jsonl', rows)}"])


def told_by_guards(run: Path) -> dict[str, Any]:
    """What the guards say of the steps of a run that was made: how many stand out by themselves, and how many levels begin.

    They are shown the rows that the run has written. Guards that only tell change nothing in a run, so this is what they said.
    """
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [row for row in map(json.loads, lines) if "loss" in row]
    outliers: list[Outlier] = []
    runtime = SimpleNamespace(device=torch.device("cpu"), is_main=True, world_size=1)
    guards = Guards(GuardsConfig(), len(steps), cast(Runtime, runtime), outliers.append)
    for row in steps:
        guards.record_step(0)
        guards.mark_outliers([dict(row)])
    levels = [outlier for outlier in outliers if outlier.is_level]
    return {
        "single_steps": len(outliers) - len(levels),
        "levels": len(levels),
        "of_the_loss": any("loss" in outlier.values for outlier in outliers),
        "told": bool(outliers),
    }


def _words(directory: Path, data: Path, kind: str, seed: int) -> list[str]:
    """Data and settings of a kind of run."""
    if kind == "random labels":
        return [*_files(data, _random_labels, seed), "objective=classification", "optim.lr=3e-3"]
    if kind == "8 documents 60 times":
        return [*_texts(data, OTHER, seed, documents=8), "optim.lr=3e-3"]
    if kind == "another language":
        return [*_texts(data, OTHER, seed), "optim.lr=1e-3"]
    if kind == "random weights (Gemma)":
        return [*_texts(data, KNOWN, seed), f"model.path={_gemma(directory)}", "optim.lr=1e-3"]
    if kind in ("dpo", "ipo"):
        loss = ["objective.loss_type=ipo"] if kind == "ipo" else []
        return [*_files(data, _pairs, seed), *_turns(data), "objective=dpo", *loss, "optim.lr=3e-4"]
    if kind == "kto":
        return [*_files(data, _pairs, seed), *_turns(data), "objective=kto", "optim.lr=3e-4"]
    if kind == "distillation":
        teacher = f"objective.teacher.path={directory / 'base' / 'export'}"
        student = f"model.path={directory / 'untrained'}"
        return [*_texts(data, KNOWN, seed), "objective=distillation", teacher, student, "optim.lr=1e-3"]
    if kind == "a spike that recovers":
        untrained = f"model.path={directory / 'untrained'}"
        high = ["optim.lr=0.5", "schedule=cosine", "schedule.warmup_share=0"]
        return [*_texts(data, KNOWN, seed), untrained, *high, "budget.steps=120"]
    if kind == "what it knows":
        return [*_texts(data, KNOWN, seed), "optim.lr=1e-4"]
    if kind == "a rate of 3":
        return [*_texts(data, KNOWN, seed), "optim.lr=3", "schedule.warmup_share=0"]
    if kind == "a rate of 3 after half warm-up":
        return [*_texts(data, KNOWN, seed), "optim.lr=3", "schedule.warmup_share=0.5"]
    return [*_texts(data, KNOWN, seed), "optim.lr=0.1"]


def _texts(data: Path, language: int, seed: int, documents: int = 8 * STEPS) -> list[str]:
    train_path = write(data / "train.jsonl", sentences(language, f"course {seed}", documents))
    held_path = write(data / "held.jsonl", sentences(language, f"course held {seed}", HELD_OUT))
    return [f"data.path={train_path}", f"data.eval_path={held_path}"]


def _files(data: Path, rows: Any, seed: int) -> list[str]:
    train_path = write(data / "train.jsonl", rows(f"train {seed}", DOCUMENTS))
    held_path = write(data / "held.jsonl", rows(f"held {seed}", HELD_OUT))
    return [f"data.path={train_path}", f"data.eval_path={held_path}"]


def _turns(data: Path) -> list[str]:
    """A template that writes turns one after the other, as the sentences of the language are."""
    path = data / "turns.jinja"
    path.write_text("{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}", encoding="utf-8")
    return [f"model.chat_template={path}"]


def _random_labels(name: str, count: int) -> list[dict[str, Any]]:
    """Sentences whose label says nothing of them: learned by heart, and held out at chance at best."""
    drawn = random.Random(f"labels {name}")
    return [
        {"text": text, "label": drawn.choice(("good", "bad"))} for text in sentences(KNOWN, f"labels {name}", count)
    ]


def _pairs(name: str, count: int) -> list[dict[str, Any]]:
    """Sentences that go on in the known language, against random words."""
    drawn = random.Random(f"pairs {name}")
    rows = []
    for text in sentences(KNOWN, f"pairs {name}", count):
        words = text.split()
        wrong = [drawn.choice(WORDS) for _ in words[PROMPT_WORDS:]]
        rows.append(
            {
                "prompt": " ".join(words[:PROMPT_WORDS]),
                "chosen": " ".join(words[PROMPT_WORDS:]),
                "rejected": " ".join(wrong),
            }
        )
    return rows


def _gemma(directory: Path) -> Path:
    """A Gemma of random weights, whose loss begins far above that of a uniform guess."""
    path = directory / "gemma"
    if path.exists():
        return path
    import torch
    from transformers import AutoTokenizer, GemmaConfig, GemmaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(directory / "untrained")
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=64,
        initializer_range=1.0,
        pad_token_id=0,
        eos_token_id=0,
    )
    GemmaForCausalLM(config).save_pretrained(path)
    return path
