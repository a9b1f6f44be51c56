"""`shardtune export adapters=[a,b] to=<dir>`: combines LoRA adapters of one base into one model or one adapter.

A single adapter is merged as it is. The files are loaded again and the logits compared before the command ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.config.verb_words import VerbWords, flag, read_words, word
from launch.export.words import destination
from strategies.errors import ConfigError
from trainer.export.config import ExportType

COMBINATIONS = ("cat", "linear", "ties", "dare_linear", "dare_ties")
"""The names of `trainer.export.combine.Combination`, which takes torch to import."""


@dataclass(kw_only=True)
class CombineWords(VerbWords):
    """What `shardtune export adapters=[...]` takes."""

    adapters: list[str] = word(
        "the directories of LoRA adapters, all for the same base model",
        default=[],
        like="[runs/a/export,runs/b/export]",
    )
    to: Path = word(
        "a new directory for the model", like="<directory>", required="name a new directory, as in to=models/merged"
    )
    weights: list[float] = word("a factor for each adapter; default: 1", default=[], like="[0.7,0.3]")
    combine: str = word(
        f"{', '.join(COMBINATIONS)}; cat is exactly the weighted sum of the updates",
        default="cat",
        choices=COMBINATIONS,
    )
    density: float = word("share of entries that ties and dare keep, such as 0.5", default=0.5, above=0)
    seed: int = word("seed for the entries that dare drops", default=0, least=0)
    base: str | None = word("the base model; default: the one that the adapters name", like="<directory>")
    merge: bool = word("true writes a whole model, false writes one adapter", default=True)
    dtype: ExportType = word("data type of a whole model", default=ExportType.auto)
    max_shard_gib: float = word("size of the largest safetensors file, in GiB", default=5.0, above=0)
    verify: bool = word("the model is always verified after it is written", default=True, also=("--verify",))
    as_json: bool = flag("print where the model is as JSON, for a script", key="--json")


def asks_to_combine(argv: list[str]) -> bool:
    """Whether these command-line arguments of `export` combine adapters."""
    return any(argument.startswith("adapters=") for argument in argv)


def run(argv: list[str]) -> dict[str, Any]:
    """Combine LoRA adapters as the command line says, and write the model; returns the answer for `--json`.

    Errors: ConfigError with every argument that cannot be used, DriftError if the written model computes other logits.
    """
    words, problems = read_words("export adapters=", CombineWords, argv)
    if words.typed.get("adapters") and not words.adapters:
        problems.append(f"adapters={words.typed['adapters']}: names no adapter; write adapters=[runs/a/export]")

    import torch

    from trainer.export.combine import Combination, CombineSettings, combine
    from trainer.export.combine import problems as combine_problems

    settings = CombineSettings(
        adapters=words.adapters,
        weights=words.weights,
        combination=Combination(words.combine),
        density=words.density,
        seed=words.seed,
        base=words.base,
    )
    problems += combine_problems(settings)
    if problems:
        raise ConfigError(problems)

    dtype = None if words.dtype is ExportType.auto else getattr(torch, words.dtype)
    model_directory = destination(Path(), str(words.to))
    combine(
        settings,
        model_directory,
        merge=words.merge,
        dtype=dtype,
        max_shard_gib=words.max_shard_gib,
    )
    print(f"model: {model_directory}")
    return {"adapters": settings.adapters, "model": str(model_directory)}
