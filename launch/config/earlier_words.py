"""Words that earlier versions accepted and this one refuses. A run that began with such words is resumed by them."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from launch.config.frozen import has_same_words, load_frozen
from launch.config.process_role import seems_a_worker
from strategies.errors import ConfigError
from trainer.config.run import RunConfig


def begun_with(words: list[str], run_dir: str | None) -> RunConfig | None:
    """The configuration of the run in `run_dir` if it began with the same words; None for another run, or none."""
    if not run_dir:
        return None
    path = Path(run_dir).expanduser() / "config.yaml"
    if not path.is_file():
        return None
    with suppress(ConfigError):  # `freeze` says what is wrong with it
        return load_frozen(path) if has_same_words(words, path) else None
    return None


def keep_budget(config: RunConfig, begun: RunConfig) -> None:
    """Take the one budget that a run began with if its words name several: an earlier version took that one alone."""
    typed = _budgets(config)
    kept = _budgets(begun)
    if len(typed) < 2 or len(kept) != 1 or not kept.items() <= typed.items():
        return
    config.budget = begun.budget
    if seems_a_worker(os.environ):  # the other ranks would say the same
        return
    ignored = {name: value for name, value in typed.items() if name not in kept}
    print(
        f"{config.run.dir}: keeps {_budget_words(kept)}, with which it began; {_budget_words(ignored)} had no effect, leave it "
        "out",
        file=sys.stderr,
    )


def _budget_words(budgets: dict[str, float]) -> str:
    """Budgets as they are typed."""
    return " ".join(f"budget.{name}={value:g}" for name, value in budgets.items())


def _budgets(config: RunConfig) -> dict[str, float]:
    """The budgets that are set, by name."""
    return {name: value for name, value in asdict(config.budget).items() if value is not None}
