"""`shardtune export adapters=[a,b] to=<dir>`: several LoRA adapters of one base as one merged model, or one adapter.

shardtune export adapters=[runs/a/export,runs/b/export] to=<dir> [weights=[0.7,0.3]] [combine=cat|linear|ties|dare_linear]
    [combine=dare_ties] [density=0.5] [seed=0] [base=<dir>] [merge=false] [dtype=bfloat16] [max_shard_gib=5]

`combine=cat` is exactly the weighted sum of the updates. One adapter alone is merged as it is. What was written is loaded
again, and its logits compared, before the command ends.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from launch.export.words import destination, flag_of, parse
from strategies.errors import ConfigError

KEYS = ("adapters", "weights", "combine", "density", "seed", "base", "to", "merge", "dtype", "max_shard_gib", "verify")


def wanted(argv: list[str]) -> bool:
    """Whether these words of `export` combine adapters."""
    return any(word.startswith("adapters=") for word in argv)


def run(argv: list[str]) -> dict[str, Any]:
    """Do what the words say; where the model is. Errors: ConfigError with every word that cannot be used, DriftError."""
    words, problems = parse(argv, KEYS, beside=" beside adapters=")
    numbers = {key: _number(key, words, problems) for key in ("density", "seed", "max_shard_gib") if key in words}
    try:
        weights = [float(part) for part in _list(words.get("weights", "[]"))]
    except ValueError:
        weights = []
        problems.append(f"weights={words['weights']}: must be numbers, as in weights=[0.7,0.3]")
    merge = flag_of(words, "merge", True, problems)
    if "to" not in words:
        problems.append("to: not set; name a new directory, as in to=models/merged")

    import torch

    from trainer.export.combine import Combination, CombineSettings, combine
    from trainer.export.combine import problems as combine_problems
    from trainer.export.config import ExportType

    kinds, how, dtype = list(Combination), words.get("combine", "cat"), words.get("dtype", "auto")
    if how not in kinds:
        near = difflib.get_close_matches(how, kinds, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        problems.append(f"combine={how}: must be one of {', '.join(kinds)}{hint}")
    if dtype not in list(ExportType):
        problems.append(f"dtype={dtype}: must be one of {', '.join(ExportType)}")
    settings = CombineSettings(
        adapters=_list(words["adapters"]),
        weights=weights,
        how=Combination(how) if how in kinds else Combination.cat,
        density=numbers.get("density", 0.5),
        seed=int(numbers.get("seed", 0)),
        base=words.get("base"),
    )
    problems += combine_problems(settings)
    if problems:
        raise ConfigError(problems)

    to = destination(Path(), words["to"])
    combine(
        settings,
        to,
        merge=merge,
        dtype=None if dtype == "auto" else getattr(torch, dtype),
        max_shard_gib=numbers.get("max_shard_gib", 5.0),
    )
    print(f"model: {to}")
    return {"adapters": settings.adapters, "model": str(to)}


def _list(text: str) -> list[str]:
    return [part.strip().strip("'\"") for part in text.strip("[]").split(",") if part.strip()]


def _number(key: str, words: dict[str, str], problems: list[str]) -> float:
    try:
        value = float(words[key])
    except ValueError:
        value = 0.0
    if not value > 0 and not (key == "seed" and value == 0):
        problems.append(f"{key}={words[key]}: must be a number above 0")
    return value
