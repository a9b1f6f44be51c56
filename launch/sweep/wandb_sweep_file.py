"""`train -m sweeper=wandb`: writes a sweep file, from which W&B's agent draws and starts trials."""

from __future__ import annotations

import shlex
from typing import Any

from launch.sweep.space import Searched
from launch.sweep.sweeper import Prune, Search, plan_search
from strategies.errors import ConfigError

MOST_VALUES = 1000
"""Values of a range that a file lists."""


def write_sweep(words: list[str], *, print_only: bool = False) -> int:
    """Write `sweep.yaml` and say how it is begun; the exit code. Errors: ConfigError with every problem, StorageError."""
    import yaml

    from trainer.reporting.status import write_text_atomic

    search = plan_search(words)
    text = yaml.safe_dump(sweep_of(search), sort_keys=False, width=1000)
    if print_only:
        print(text, end="")
        return 0
    path = search.directory / "sweep.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, text)
    print(f"written: {path}\nbegin it:   wandb sweep {shlex.quote(str(path))}")
    print("work on it: wandb agent <the name it tells>   (as often as you like, where the model and the data are)")
    return 0


def sweep_of(search: Search) -> dict[str, Any]:
    """The sweep as W&B has it: the space, what is made better, and the command of a trial. Raises ConfigError."""
    settings, logging = search.settings, search.first.config.logging
    problems = []
    if settings.prune is not Prune.none:
        problems.append(
            f"sweeper.prune={settings.prune.value}: W&B's agent ends trials by hyperband alone; leave it out, write "
            "early_terminate into the file, or take sweeper=optuna"
        )
    if settings.seed:
        problems.append(f"sweeper.seed={settings.seed}: W&B draws by a seed of its own; leave it out")
    if problems:
        raise ConfigError(problems)
    own = ("run.dir=", "logging.wandb=")  # W&B names a trial, and must hear of it
    fixed = [word for word in search.fixed if not word.startswith(own)]
    made = {
        "project": logging.project or "shardtune",
        "entity": logging.entity,
        "method": "bayes",
        "metric": {"name": search.metric, "goal": "maximize" if search.greater_is_better else "minimize"},
        "run_cap": settings.trials,
        "parameters": {one.key: parameter_of(one) for one in search.space},
        "command": ["${env}", "shardtune", "train", *fixed, "logging.wandb=online", "${args_no_hyphens}"],
    }
    return {key: value for key, value in made.items() if value is not None}


def parameter_of(one: Searched) -> dict[str, Any]:
    """A setting's values as W&B has them. Raises ConfigError for a range of too many."""
    if one.choices:
        return {"values": [_number(text) for text in one.choices]}
    low, high = (int(one.low), int(one.high)) if one.whole else (one.low, one.high)
    if one.step is not None and not (one.whole and one.step == 1):
        # W&B's steps are multiples of theirs, ours begin at the lower end.
        number = int((one.high - one.low) / one.step + 1e-9) + 1
        if number > MOST_VALUES:
            raise ConfigError(f"{one.key}={one.text}: has {number:,} values; write interval({low},{high})")
        values = [one.word(one.low + index * one.step).partition("=")[2] for index in range(number)]
        return {"values": [_number(text) for text in values]}
    if one.log:
        return (
            {"distribution": "q_log_uniform_values", "min": low, "max": high, "q": 1}
            if one.whole
            else {
                "distribution": "log_uniform_values",
                "min": low,
                "max": high,
            }
        )
    return {"distribution": "int_uniform" if one.whole else "uniform", "min": low, "max": high}


def _number(text: str) -> Any:
    """A number where it is written as W&B will write it again, else the text."""
    for kind in (int, float):
        try:
            if str(kind(text)) == text:
                return kind(text)
        except ValueError:
            continue
    return text
