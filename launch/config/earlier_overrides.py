"""Overrides that earlier versions accepted and this one refuses. A run that began with such overrides is resumed by them."""

import os
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from launch.config.frozen import load_frozen_config
from launch.config.process_role import has_rank_variables
from launch.config.resume import has_same_overrides
from strategies.errors import ConfigError
from trainer.config.run import RunConfig


def earlier_config_of_same_overrides(overrides: list[str], run_dir: str | None) -> RunConfig | None:
    """The configuration of the run in `run_dir` if it began with the same overrides; None if not, or if there is no run.

    Earlier versions accepted overrides that this one refuses, and their runs must still be resumed by the same command.
    """
    if not run_dir:
        return None
    path = Path(run_dir).expanduser() / "config.yaml"
    if not path.is_file():
        return None
    with suppress(ConfigError):  # `freeze` reads the file again later, and says what is wrong with it
        if has_same_overrides(overrides, path):
            return load_frozen_config(path)
    return None


def keep_first_budget(config: RunConfig, earlier_config: RunConfig) -> None:
    """Let a run of an earlier version go on with the one budget it used, although its command names several.

    Earlier versions took one of steps, epochs and tokens silently.
    `config`: composed from the command, and changed;
    `earlier_config`: that of the run.
    A message on stderr names the budgets that have no effect.
    Does nothing if the command names one budget, or not that of the run.
    """
    typed_budgets = _budgets_that_are_set(config)
    kept_budgets = _budgets_that_are_set(earlier_config)
    if len(typed_budgets) < 2 or len(kept_budgets) != 1 or not kept_budgets.items() <= typed_budgets.items():
        return
    config.budget = earlier_config.budget
    if has_rank_variables(os.environ):  # the other ranks would print the same
        return
    ignored = {name: value for name, value in typed_budgets.items() if name not in kept_budgets}
    kept_text = _budget_overrides_text(kept_budgets)
    ignored_text = _budget_overrides_text(ignored)
    print(
        f"{config.run.dir}: keeps {kept_text}, with which it began; {ignored_text} had no effect, leave it out",
        file=sys.stderr,
    )


def _budget_overrides_text(budgets: dict[str, float]) -> str:
    """Budgets as they are typed: `budget.steps=100 budget.epochs=3`."""
    return " ".join(f"budget.{name}={value:g}" for name, value in budgets.items())


def _budgets_that_are_set(config: RunConfig) -> dict[str, float]:
    """The budgets of a run that are set, by name: steps, epochs or tokens."""
    return {name: value for name, value in asdict(config.budget).items() if value is not None}
