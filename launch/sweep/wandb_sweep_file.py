"""`train -m sweeper=wandb`: writes a sweep file, from which W&B's agent draws and starts trials."""

from __future__ import annotations

import shlex
from typing import Any

from launch.sweep.space import SearchedSetting
from launch.sweep.sweeper import Prune, Search, plan_search
from strategies.errors import ConfigError

LARGEST_LIST = 1000
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
    settings = search.settings
    logging = search.first_job.config.logging
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
    agent_words = ("run.dir=", "logging.wandb=")  # W&B names the directory of a trial, and must hear of it
    fixed = [word for word in search.fixed if not word.startswith(agent_words)]
    sweep: dict[str, Any] = {"project": logging.project or "shardtune"}
    if logging.entity is not None:
        sweep["entity"] = logging.entity
    sweep["method"] = "bayes"
    sweep["metric"] = {"name": search.metric, "goal": "maximize" if search.greater_is_better else "minimize"}
    sweep["run_cap"] = settings.trials
    sweep["parameters"] = {setting.key: parameter_of(setting) for setting in search.space}
    sweep["command"] = ["${env}", "shardtune", "train", *fixed, "logging.wandb=online", "${args_no_hyphens}"]
    return sweep


def parameter_of(setting: SearchedSetting) -> dict[str, Any]:
    """A setting's values as W&B has them. Raises ConfigError for a range of too many."""
    if setting.choices:
        return {"values": [_number(text) for text in setting.choices]}
    low: float = setting.low
    high: float = setting.high
    if setting.is_integer:
        low = int(low)
        high = int(high)
    if setting.step is not None and not (setting.is_integer and setting.step == 1):
        # W&B's steps are multiples of the step, ours count from the lower end: list all values.
        count = int((setting.high - setting.low) / setting.step + 1e-9) + 1
        if count > LARGEST_LIST:
            raise ConfigError(f"{setting.key}={setting.text}: has {count:,} values; write interval({low},{high})")
        words = [setting.word(setting.low + index * setting.step) for index in range(count)]
        return {"values": [_number(word.partition("=")[2]) for word in words]}
    bounds = {"min": low, "max": high}
    if setting.log and setting.is_integer:
        return {"distribution": "q_log_uniform_values", **bounds, "q": 1}
    if setting.log:
        return {"distribution": "log_uniform_values", **bounds}
    return {"distribution": "int_uniform" if setting.is_integer else "uniform", **bounds}


def _number(text: str) -> Any:
    """A number where it is written as W&B will write it again, else the text."""
    for kind in (int, float):
        try:
            if str(kind(text)) == text:
                return kind(text)
        except ValueError:
            continue
    return text
