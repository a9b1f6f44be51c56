"""`train -m sweeper=wandb`: writes a sweep file, from which W&B's agent draws and starts trials."""

from __future__ import annotations

import shlex
from typing import Any

from launch.compare.workspace import MIN_SHOWN_RUNS, WORKSPACE_FILE, markdown_cell, summary_columns
from launch.compare.workspace_script import (
    COST_PANELS,
    LOSS_PANELS,
    MEMORY_PANELS,
    SETTINGS_PANELS,
    SPEED_PANELS,
    PanelSection,
    WorkspaceContent,
    workspace_script_source,
)
from launch.sweep.space import RANGE_TOLERANCE, SearchedSetting
from launch.sweep.sweeper import PlannedSearch, SweeperConfig, TrialPruning, plan_search
from strategies.errors import ConfigError
from strategies.extras import install_command
from trainer.reporting.config import WANDB_COLUMN_BY_SETTING
from trainer.reporting.metric_names import XAxis, tracked_name

MAX_LISTED_VALUES = 1000
"""Values of a range that are listed in a sweep file at most."""
PANEL_SECTIONS = [
    PanelSection("Which settings are best?", list(SETTINGS_PANELS)),
    PanelSection("Which learns best?", list(LOSS_PANELS)),
    PanelSection("Which is fastest?", list(SPEED_PANELS)),
    PanelSection("What does each need?", list(MEMORY_PANELS)),
    PanelSection("What does each cost?", list(COST_PANELS)),
]
"""The sections of `workspace.py`."""


def write_sweep_file(arguments: list[str], *, print_only: bool = False) -> int:
    """Hand a search over to W&B (`train -m sweeper=wandb`): write `sweep.yaml`, and print how W&B's agents start its trials.

    Nothing is trained here. `arguments`: of the command line. A script that shows the trials in W&B, `workspace.py`, is
    written beside `sweep.yaml`. With `print_only`, `sweep.yaml` is printed, and nothing is written. Returns the exit code.
    Raises ConfigError with every problem, StorageError.
    """
    import yaml

    from trainer.reporting.status import write_text_atomic

    search = plan_search(arguments)
    sweep_yaml = yaml.safe_dump(wandb_sweep_config(search), sort_keys=False, width=1000)
    if print_only:
        print(sweep_yaml, end="")
        return 0
    path = search.directory / "sweep.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, sweep_yaml)
    workspace_path = path.with_name(WORKSPACE_FILE)
    write_text_atomic(workspace_path, trials_workspace_script(search))
    print(f"written: {path}\nbegin it:   wandb sweep {shlex.quote(str(path))}")
    print("work on it: wandb agent <the name it tells>   (as often as you like, where the model and the data are)")
    print(f"look at it: python {shlex.quote(str(workspace_path))}   (makes a view and a report of the trials in W&B)")
    return 0


def wandb_sweep_config(search: PlannedSearch) -> dict[str, Any]:
    """The content of `sweep.yaml`: which settings W&B draws, the metric to improve, and the command that runs a trial.

    {"project": ..., "method": "bayes", "metric": ..., "run_cap": trials, "parameters": ..., "command": [...]}. Raises
    ConfigError for settings of the search that W&B's agent does not have.
    """
    _refuse_settings_without_equal_in_wandb(search.settings)
    logging = search.first_trial.config.logging  # that of all trials
    # Left to the agent: W&B names the directory of a trial, and must receive its metrics.
    agent_settings = ("run.dir=", "logging.wandb=")
    shared_arguments = [argument for argument in search.shared_arguments if not argument.startswith(agent_settings)]
    if logging.group is None:
        shared_arguments.append(f"logging.group={trials_group_name(search)}")
    sweep: dict[str, Any] = {"project": logging.project or "shardtune"}
    if logging.entity is not None:
        sweep["entity"] = logging.entity
    sweep["method"] = "bayes"
    sweep["metric"] = {"name": search.metric, "goal": "maximize" if search.greater_is_better else "minimize"}
    sweep["run_cap"] = search.settings.trials
    sweep["parameters"] = {setting.key: wandb_sweep_parameter(setting) for setting in search.searched_settings}
    sweep["command"] = ["${env}", "shardtune", "train", *shared_arguments, "logging.wandb=online", "${args_no_hyphens}"]
    return sweep


def _refuse_settings_without_equal_in_wandb(settings: SweeperConfig) -> None:
    """Refuse what W&B's agent does in its own way: ending bad trials early (`sweeper.prune`), and drawing by a seed.

    Raises ConfigError.
    """
    problems = []
    if settings.prune is not TrialPruning.none:
        problems.append(
            f"sweeper.prune={settings.prune.value}: W&B's agent ends trials by hyperband alone; leave it out, write "
            "early_terminate into the file, or take sweeper=optuna"
        )
    if settings.seed:
        problems.append(f"sweeper.seed={settings.seed}: W&B draws by a seed of its own; leave it out")
    if problems:
        raise ConfigError(problems)


def trials_group_name(search: PlannedSearch) -> str:
    """The group of a search's trials in W&B, by which `workspace.py` finds them: `logging.group`, or the directory's name."""
    return search.first_trial.config.logging.group or search.directory.resolve().name


def trials_workspace_script(search: PlannedSearch) -> str:
    """Write `workspace.py`, the script by which a user makes a view and a report of a search's trials in W&B.

    Unlike the script that `launch/compare/workspace.py` writes, it has no results: the trials run on the hosts of W&B's agents.
    """
    logging = search.first_trial.config.logging
    column_by_key = {}
    for setting in search.searched_settings:
        column_by_key[setting.key] = WANDB_COLUMN_BY_SETTING.get(setting.key, f"config.{setting.key}")
    direction = "largest" if search.greater_is_better else "smallest"
    final_metric = f"final/{search.metric}"
    verdict = f"The trial with the {direction} {final_metric} is the best one: the first section shows it beside the settings."
    content = WorkspaceContent(
        title=search.directory.resolve().name,
        entity=logging.entity,
        project=logging.project or "shardtune",
        setting_columns=list(column_by_key.values()),
        # A number that each trial has for itself would make groups of one run.
        group_columns=[column_by_key[setting.key] for setting in search.searched_settings if setting.choices],
        baseline_run_id=None,
        summary_columns=summary_columns(final_metric),
        answer_lines=[],
        verdict_lines=[verdict],
        points_markdown_lines=_searched_settings_markdown_lines(search),
        max_runs=max(MIN_SHOWN_RUNS, search.settings.trials),
        x_axis_metric=XAxis(logging.x).tracked_name,
        loss_names=[tracked_name("loss")],
        grad_norm_names=[tracked_name("grad_norm")],
        tokens_per_s_names=[tracked_name("tokens_per_s")],
        memory_gib_names=[tracked_name("memory_gib")],
        held_out_metric=search.metric,
        final_metric=final_metric,
    )
    return workspace_script_source(
        PANEL_SECTIONS,
        content,
        run_filter_source=f'ws.Metric("Group").isin([{trials_group_name(search)!r}])',
        install_command=install_command("workspace"),
    )


def _searched_settings_markdown_lines(search: PlannedSearch) -> list[str]:
    """List the searched settings for W&B's report, as lines of a Markdown table: `| optim.lr | interval(1e-5,1e-3) |`."""
    lines = ["| setting | searched |", "|---|---|"]
    for setting in search.searched_settings:
        lines.append(f"| {setting.key} | {markdown_cell(setting.values_text)} |")
    return lines


def wandb_sweep_parameter(setting: SearchedSetting) -> dict[str, Any]:
    """Translate a searched setting into a parameter of W&B's sweep configuration: {"min": 1e-5, "max": 1e-3, ...}.

    The first case that applies:

    - Choices: their values.
    - A range, unless of whole numbers with step 1: all of its values, because W&B's steps are multiples of the step, and ours
      begin at the lower end. Raises ConfigError if there are more than `MAX_LISTED_VALUES`.
    - Numbers on a logarithmic scale, whole ones or any.
    - Numbers from the lower to the upper end, whole ones or any.
    """
    if setting.choices:
        return {"values": [_number_or_text(choice) for choice in setting.choices]}
    low: float = setting.low
    high: float = setting.high
    if setting.is_integer:
        low = int(low)
        high = int(high)
    has_step_of_one = setting.is_integer and setting.step == 1
    if setting.step is not None and not has_step_of_one:
        # The tolerance counts the upper end of 0.1 to 0.3 by 0.1, whose quotient is 1.9999999999999998.
        num_values = int((setting.high - setting.low) / setting.step + RANGE_TOLERANCE) + 1
        if num_values > MAX_LISTED_VALUES:
            raise ConfigError(
                f"{setting.key}={setting.values_text}: has {num_values:,} values; write interval({low},{high})"
            )
        values = []
        for index in range(num_values):
            value_text = setting.value_text(setting.low + index * setting.step)
            values.append(_number_or_text(value_text))
        return {"values": values}
    bounds = {"min": low, "max": high}
    if setting.is_logarithmic and setting.is_integer:
        return {"distribution": "q_log_uniform_values", **bounds, "q": 1}
    if setting.is_logarithmic:
        return {"distribution": "log_uniform_values", **bounds}
    return {"distribution": "int_uniform" if setting.is_integer else "uniform", **bounds}


def _number_or_text(value_text: str) -> Any:
    """Keep a value as it was typed through W&B: as a number if W&B writes it back in the same way, else as text.

    `1e-5` stays text, since W&B would make it 1e-05.
    """
    for number_type in (int, float):
        try:
            number = number_type(value_text)
        except ValueError:
            continue
        if str(number) == value_text:
            return number
    return value_text
