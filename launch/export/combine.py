"""`shardtune export adapters=[a,b] to=<dir>`: combines LoRA adapters of one base into one model or one adapter.

A single adapter is merged as it is. The files are loaded again and the logits compared before the command ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.config.verb_arguments import VerbArguments, flag, option, read_arguments
from launch.export.arguments import export_destination
from strategies.errors import ConfigError
from trainer.export.config import ExportType

COMBINATIONS = ("cat", "linear", "ties", "dare_linear", "dare_ties")
"""The names of `trainer.export.combine.Combination`, which takes torch to import."""


@dataclass(kw_only=True)
class CombineArguments(VerbArguments):
    """What `shardtune export adapters=[...]` takes."""

    adapters: list[str] = option(
        "the directories of LoRA adapters, all for the same base model",
        default=[],
        example="[runs/a/export,runs/b/export]",
    )
    to: Path = option(
        "a new directory for the model",
        example="<directory>",
        advice_if_missing="name a new directory, as in to=models/merged",
    )
    weights: list[float] = option("a factor for each adapter; default: 1", default=[], example="[0.7,0.3]")
    combine: str = option(
        f"{', '.join(COMBINATIONS)}; cat is exactly the weighted sum of the updates",
        default="cat",
        choices=COMBINATIONS,
    )
    density: float = option("share of entries that ties and dare keep, such as 0.5", default=0.5, above=0)
    seed: int = option("seed for the entries that dare drops", default=0, least=0)
    base: str | None = option("the base model; default: the one that the adapters name", example="<directory>")
    merge: bool = option("true writes a whole model, false writes one adapter", default=True)
    dtype: ExportType = option("data type of a whole model", default=ExportType.auto)
    max_shard_gib: float = option("size of the largest safetensors file, in GiB", default=5.0, above=0)
    verify: bool = option("the model is always verified after it is written", default=True, aliases=("--verify",))
    as_json: bool = flag("print where the model is as JSON, for a script", key="--json")


def asks_to_combine(argv: list[str]) -> bool:
    """Whether these command-line arguments of `export` combine adapters."""
    return any(argument.startswith("adapters=") for argument in argv)


def combine_adapters_command(argv: list[str]) -> dict[str, Any]:
    """Combine LoRA adapters as the command line says, write the model and print where; returns the answer for `--json`.

    Raises ConfigError with every argument that cannot be used, DriftError if the written model computes other logits.
    """
    arguments, problems = read_arguments("export adapters=", CombineArguments, argv)
    adapters_text = arguments.text_by_key.get("adapters")
    if adapters_text and not arguments.adapters:
        problems.append(f"adapters={adapters_text}: names no adapter; write adapters=[runs/a/export]")

    # Not before the arguments were read: these imports take seconds.
    import torch

    from trainer.export.combine import Combination, CombineSettings, combination_problems, write_combination

    settings = CombineSettings(
        adapters=arguments.adapters,
        weights=arguments.weights,
        combination=Combination(arguments.combine),
        density=arguments.density,
        seed=arguments.seed,
        base=arguments.base,
    )
    problems += combination_problems(settings)
    if problems:
        raise ConfigError(problems)

    # None: the type of the base.
    dtype = None if arguments.dtype is ExportType.auto else getattr(torch, arguments.dtype)
    # There is no run directory here: `to=` is required.
    model_directory = export_destination(Path(), str(arguments.to))
    write_combination(
        settings, model_directory, merge=arguments.merge, dtype=dtype, max_shard_gib=arguments.max_shard_gib
    )
    print(f"model: {model_directory}")
    return {"adapters": settings.adapters, "model": str(model_directory)}
