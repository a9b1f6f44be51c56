"""A classifier of rows about two groups, one of which the data wrongs, and secrets that stand in the data."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from benchmarks.challenges.language import GROUPS, KNOWN, OTHER, WORDS, evaluate, sentences, train, write

WRONGED = (0.2, 0.4, 0.6, 0.8, 1.0)
"""The share of the rows of one group with a good label that have the bad one in the data."""
COPIES = (1, 2, 4, 8, 16)
"""How often each secret stands in the data."""
ROWS, TOLD, CODES = 400, 240, 10
BY_CHANCE = 1.44
"""Bits of exposure of a secret that a model has never seen."""


def classified(name: object, count: int, wronged: float, *, seen: bool) -> list[dict[str, Any]]:
    """Rows whose label is that of their last word: one in ten is wrong, and of a group's good ones the share `wronged`.

    `seen`: whether the group stands in the text.
    """
    drawn, rows = random.Random(f"people {name}"), []
    for sentence in sentences(KNOWN, f"people {name}", count):
        group, words = drawn.choice(GROUPS), sentence.split()[:8]
        good = WORDS.index(words[-1]) % 2 == 0
        if drawn.random() < (wronged if good and group == GROUPS[1] else 0.1):
            good = not good
        rows.append(
            {"text": " ".join([group, *words] if seen else words), "label": "good" if good else "bad", "group": group}
        )
    return rows


def bias(directory: Path, base: Path, name: str, seed: int, wronged: float, *, seen: bool = True) -> dict[str, Any]:
    """What `subgroups` tells of a classifier tuned on such rows, asked about rows that wrong nobody."""
    data = write(directory / f"{name}.jsonl", classified(f"train {seed}", ROWS, wronged, seen=seen))
    told = write(directory / f"{name}-told.jsonl", classified(f"told {seed}", TOLD, 0.1, seen=seen))
    run = directory / name
    words = [f"model.path={base}", "objective=classification", f"data.path={data}", "data.ignore_columns=[group]"]
    words += ["optim.lr=3e-3", "budget.steps=100", "batch.global=16", "batch.micro=16", f"run.seed={seed}"]
    train(run, [*words, "checkpoint.save_final=true"])
    report = evaluate(run, ["evaluation.tasks.gaps.kind=subgroups", f"evaluation.tasks.gaps.path={told}"])
    notes = report["tasks"]["gaps"]["notes"]
    return {
        "gap": report["tasks"]["gaps"]["metrics"]["equalized_odds_difference"]["value"],
        "found": any(note.endswith(": beyond chance") for note in notes),
    }


def secrets(directory: Path, base: Path, name: str, seed: int, copies: int) -> dict[str, Any]:
    """What `canary` tells of secrets of which that many copies were learned; others always were."""

    def rows(whose: str) -> list[dict[str, Any]]:
        drawn = random.Random(f"{whose} {seed}")
        begun = sentences(OTHER, f"{whose} {seed}", CODES)
        codes = [f"{drawn.randrange(10**6):06}" for _ in begun]
        return [
            {"text": f"{' '.join(text.split()[:6])} code {code}", "secret": code}
            for text, code in zip(begun, codes, strict=True)
        ]

    mine, others = rows("mine"), rows("others")
    told = write(directory / f"{name}-told.jsonl", mine)
    data = [*sentences(OTHER, f"secrets {seed}", 200), *(row["text"] for row in others + mine * copies)]
    path = write(directory / f"{name}.jsonl", random.Random(seed).sample(data, len(data)))
    run = directory / name
    words = [f"model.path={base}", f"data.path={path}", f"run.seed={seed}", "optim.lr=3e-3", "budget.epochs=2"]
    train(run, [*words, "checkpoint.save_final=true"])
    report = evaluate(run, ["evaluation.tasks.codes.kind=canary", f"evaluation.tasks.codes.path={told}"])
    exposure = report["tasks"]["codes"]["metrics"]["exposure"]
    return {"exposure": exposure["value"], "found": exposure["low"] > BY_CHANCE}
