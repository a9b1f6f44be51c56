"""Overfitting and forgetting at five strengths, where there is neither, and with each remedy."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from benchmarks.challenges.language import KNOWN, OTHER, sentences, train, write

STEPS, EVERY = 48, 4
OVERFIT = (64, 32, 16, 8, 4)
"""Documents, from hardly any overfitting to the strongest."""
FORGET = ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2")
"""Rates, likewise."""
MANY, FEW, RATE = 8, "3e-3", "1e-3"
"""What remedies are tried on: so many documents at that rate, and the other language at this one."""
AGAINST_OVERFITTING: dict[str, list[str]] = {
    "nothing": [],
    "a tenth of the rate": ["optim.lr=3e-4"],
    "evaluation.patience=3": ["evaluation.patience=3"],
    "optim.weight_decay=1": ["optim.weight_decay=1"],
    "LoRA of rank 2": ["tuning=lora", "tuning.rank=2"],
    "LoRA of rank 2, tuning.dropout=0.1": ["tuning=lora", "tuning.rank=2", "tuning.dropout=0.1"],
    "model.neftune_alpha=5": ["model.neftune_alpha=5"],
    "objective.label_smoothing=0.1": ["objective.label_smoothing=0.1"],
    "optim.layer_decay=0.5": ["optim.layer_decay=0.5"],
    "optim.ema_decay=0.95": ["optim.ema_decay=0.95"],
}
AGAINST_FORGETTING: dict[str, list[str]] = {
    "nothing": [],
    "a third of the rate": ["optim.lr=3e-4"],
    "LoRA of rank 4": ["tuning=lora", "tuning.rank=4"],
    "tuning=freeze tuning.layers=last-1": ["tuning=freeze", "tuning.layers=last-1"],
    "optim.layer_decay=0.5": ["optim.layer_decay=0.5"],
    "replay": ["replay"],
    "replay, kl_weight=1": ["replay", "objective.forgetting.kl_weight=1"],
    "kl_weight=1 alone": ["replay", "objective.forgetting.kl_weight=1", "objective.forgetting.replay_loss=false"],
    "optim.ema_decay=0.95": ["optim.ema_decay=0.95"],
}


def measured(directory: Path, base: Path, name: str, seed: int, words: list[str], *, held: Path) -> dict[str, Any]:
    """One run with both detectors on; what they said, and the losses."""
    general = write(directory / "general.jsonl", sentences(KNOWN, "general", 64))
    own = [f"model.path={base}", f"run.seed={seed}", f"budget.steps={STEPS}", f"evaluation.every_steps={EVERY}"]
    own += [f"data.eval_path={held}", f"challenges.forgetting.data={general}", "challenges.forgetting.action=note"]
    record = train(directory / name, [*own, *words])
    losses, challenges = [row["eval/loss"] for row in record["evaluations"]], record["challenges"]
    found: dict[str, Any] = {"before": losses[0], "best": min(losses), "last": losses[-1]}
    found["forgetting"] = record["evaluations"][-1]["forgetting"]
    for kind in ("overfitting", "forgetting"):
        found[f"{kind}_at"] = challenges[kind]["step"] if challenges.get(kind, {}).get("found") else None
    return found


def overfitting(directory: Path, base: Path, name: str, seed: int, documents: int, more: list[str]) -> dict[str, Any]:
    """A few documents of the other language, again and again."""
    data = write(directory / f"{name}.jsonl", sentences(OTHER, f"few {seed}", documents))
    held = write(directory / "held-other.jsonl", sentences(OTHER, "held", 64))
    return measured(directory, base, name, seed, [f"data.path={data}", f"optim.lr={FEW}", *more], held=held)


def forgetting(directory: Path, base: Path, name: str, seed: int, rate: str, more: list[str]) -> dict[str, Any]:
    """Fresh sentences of the other language at a rate; `replay` among the words mixes some of the known one in."""
    data = write(directory / f"{name}.jsonl", sentences(OTHER, f"other {seed}", STEPS * 8))
    held = write(directory / "held-other.jsonl", sentences(OTHER, "held", 64))
    words = [f"data.path={data}"]
    if "replay" in more:
        known = write(directory / f"{name}-known.jsonl", sentences(KNOWN, f"replay {seed}", STEPS * 2))
        words = [f"data.sources.task.path={data}", "data.sources.task.weight=0.8", "data.mixing.epoch=all"]
        words += [f"data.sources.general.path={known}", "data.sources.general.weight=0.2"]
        words += ["data.sources.general.replay=true"]
    words += [f"optim.lr={rate}", *(word for word in more if word != "replay")]
    return measured(directory, base, name, seed, words, held=held)


def nothing(directory: Path, base: Path, name: str, seed: int, rate: str) -> dict[str, Any]:
    """One pass over fresh sentences of the language that the model knows."""
    data = write(directory / f"{name}.jsonl", sentences(KNOWN, f"fresh {seed}", STEPS * 8))
    drawn = random.Random(seed).randrange(10**6)
    held = write(directory / f"{name}-held.jsonl", sentences(KNOWN, f"held {drawn}", 64))
    return measured(directory, base, name, seed, [f"data.path={data}", f"optim.lr={rate}"], held=held)
