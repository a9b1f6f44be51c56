"""Plans a hyperparameter search: reads and checks its settings, its search space, and the job that all trials share."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config.verb_arguments import read_setting_group
from launch.sweep.space import SEARCHED_VALUE_EXAMPLES, SearchedSetting, split_searched_settings
from strategies.errors import ConfigError
from strategies.extras import install_command

if TYPE_CHECKING:
    from launch.config.frozen import ComposedConfig

SWEEPER_NAMES = ("optuna", "wandb")


class TrialPruning(Enum):
    """Which trials of a search are ended early."""

    none = "none"
    median = "median"


@dataclass(kw_only=True, slots=True)
class SweeperConfig:
    """Settings of a hyperparameter search, `sweeper.*`."""

    trials: int = 20
    """Runs of the search in its directory, those of all commands that work on it together."""
    seed: int = 0
    """Seed of what is drawn; the runs have their own, `run.seed`."""
    metric: str | None = None
    """Metric of the last evaluation that the search makes better; null takes `evaluation.watch`."""
    prune: TrialPruning = TrialPruning.none
    """`median` ends a trial whose evaluation is worse than the median of the earlier trials at that step; `none` ends none."""


@dataclass(frozen=True, slots=True)
class PlannedSearch:
    """A hyperparameter search that has been checked and can be started."""

    settings: SweeperConfig
    searched_settings: tuple[SearchedSetting, ...]
    shared_arguments: tuple[str, ...]
    """The arguments that all trials share."""
    first_trial: ComposedConfig
    """The configuration with the first value of each searched setting. All trials have its values of the other settings."""

    @property
    def metric(self) -> str:
        """The held-out metric that the search improves."""
        return self.first_trial.config.evaluation.watched

    @property
    def greater_is_better(self) -> bool:
        """Whether a larger metric is better."""
        from trainer.config.evaluation import is_greater_better

        return is_greater_better(self.first_trial.config)

    def search_identity(self) -> dict[str, str]:
        """What makes two commands work on the same search: texts that must be equal in both, by the names that messages show.

        For example `{"optim.lr=": "interval(1e-5,1e-3)", "metric": "eval/loss, smaller is better", ...}`.
        """
        identity = {}
        # Sorted, because the order in which the settings were given does not matter.
        for setting in sorted(self.searched_settings, key=lambda setting: setting.key):
            identity[f"{setting.key}="] = setting.values_text
        better = "larger" if self.greater_is_better else "smaller"
        identity["metric"] = f"{self.metric}, {better} is better"
        identity["sweeper.seed"] = str(self.settings.seed)
        # The hash of all settings that decide a result: those that trials share, and the first value of each searched one.
        identity["the words that all trials share"] = self.first_trial.sha256[:8]
        return identity

    def trial_arguments(self, params: dict[str, Any]) -> list[str]:
        """The arguments of a trial, such as `optim.lr=0.0002`; `params` are the values that Optuna drew, by setting."""
        return [setting.argument(params[setting.key]) for setting in self.searched_settings if setting.key in params]

    @property
    def directory(self) -> Path:
        """The directory of the search: `run.dir`, or a directory below runs/ whose name is a hash of the search."""
        configured_dir = self.first_trial.config.run.dir
        if configured_dir:
            return Path(configured_dir).expanduser()
        digest = hashlib.sha256(json.dumps(self.search_identity()).encode()).hexdigest()
        return Path("runs") / f"search-{digest[:8]}"


def is_search_requested(arguments: list[str]) -> bool:
    """Whether any argument is `sweeper=...` or `sweeper.<setting>=...`, right or wrong, so that a search is meant."""
    return any(argument.partition("=")[0].split(".")[0] == "sweeper" for argument in arguments)


def requested_sweeper_name(arguments: list[str]) -> str:
    """The value of the last argument `sweeper=`, which names what draws the trials; `optuna` if there is none."""
    for argument in reversed(arguments):
        if argument.startswith("sweeper="):
            return argument.partition("=")[2]
    return SWEEPER_NAMES[0]


def plan_search(all_arguments: list[str]) -> PlannedSearch:
    """Read the arguments of `train -m sweeper=...`, and compose enough trials to know that every one is legal.

    Raises ConfigError with every problem at once.
    """
    from launch.config.compose import compose_config

    settings, run_arguments = read_sweeper_settings(all_arguments)
    searched_settings, shared_arguments = split_searched_settings(run_arguments)
    if not searched_settings:
        raise ConfigError(
            f"sweeper={requested_sweeper_name(all_arguments)}: no setting has several values to search; write one as "
            f"<setting>={SEARCHED_VALUE_EXAMPLES}"
        )
    argument_by_key = {argument.partition("=")[0]: argument for argument in run_arguments}
    if settings.metric is not None:
        # The search judges by the monitored metric, so `sweeper.metric` sets that.
        watch_argument = f"evaluation.watch={settings.metric}"
        given_argument = argument_by_key.get("evaluation.watch")
        if given_argument is None:
            shared_arguments.append(watch_argument)
        elif given_argument != watch_argument:
            raise ConfigError(f"sweeper.metric={settings.metric}: and {given_argument}; give one of them")
    if "export.at_end" not in argument_by_key:  # most trials are thrown away
        shared_arguments.append("export.at_end=false")
    searched_keys = {setting.key for setting in searched_settings}
    for key in ("run.dir", "evaluation.watch", "evaluation.greater_is_better", "launcher"):
        if key in searched_keys:
            raise ConfigError(f"{argument_by_key[key]}: is the same for all trials; give one value")

    # Not every combination is composed: settings are assumed not to depend on each other. First the first values of all
    # settings together, then each other end or choice of one setting with the first values of the others.
    arguments_by_setting = [setting.arguments_at_ends() for setting in searched_settings]
    first_arguments = [arguments[0] for arguments in arguments_by_setting]
    first_trial = compose_config([*shared_arguments, *first_arguments])
    problems = _trial_config_problems(first_trial, settings, requested_sweeper_name(all_arguments))
    for index, arguments in enumerate(arguments_by_setting):
        first_arguments_of_others = first_arguments[:index] + first_arguments[index + 1 :]
        for argument in arguments[1:]:
            try:
                compose_config([*shared_arguments, *first_arguments_of_others, argument])
            except ConfigError as error:
                problems += [f"with {argument}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return PlannedSearch(
        settings=settings,
        searched_settings=tuple(searched_settings),
        shared_arguments=tuple(shared_arguments),
        first_trial=first_trial,
    )


def read_sweeper_settings(all_arguments: list[str]) -> tuple[SweeperConfig, list[str]]:
    """Take the settings of the search out of a command line: returns (`sweeper.*` as an object, the arguments of its runs).

    Raises ConfigError with every problem at once.
    """
    settings, other_arguments, problems = read_setting_group("sweeper", SweeperConfig(), all_arguments)
    sweeper_arguments: list[str] = []
    run_arguments: list[str] = []
    for argument in other_arguments:
        chooses_sweeper = argument == "sweeper" or argument.startswith("sweeper=")
        if chooses_sweeper:
            sweeper_arguments.append(argument)
        else:
            run_arguments.append(argument)
    for argument in sweeper_arguments:
        if argument.partition("=")[2] not in SWEEPER_NAMES:
            problems.append(
                f"{argument}: there is no such sweeper; sweeper=optuna searches, sweeper=wandb writes a file for W&B's agent, "
                "and without it -m runs all points"
            )
    if settings.trials < 1:
        problems.append(f"sweeper.trials={settings.trials}: must be at least 1")
    if settings.seed < 0:
        problems.append(f"sweeper.seed={settings.seed}: must be at least 0")
    if not sweeper_arguments:  # sweeper.trials=20 alone would start no search
        setting_argument = next(argument for argument in all_arguments if argument.startswith("sweeper"))
        problems.append(f"{setting_argument}: is of a search; add sweeper=optuna")
    if requested_sweeper_name(all_arguments) == "optuna" and find_spec("optuna") is None:
        problems.append(f"sweeper=optuna: needs the package optuna; {install_command('search')}")
    if problems:
        raise ConfigError(problems)
    return settings, run_arguments


def _trial_config_problems(first_trial: ComposedConfig, settings: SweeperConfig, sweeper_name: str) -> list[str]:
    """Check that trials can be judged and run here; returns an error message for each of these:

    - There is no evaluation data by which trials could be judged.
    - Trials are to be pruned, but the metric is not measured during training.
    - SLURM is the launcher.

    `first_trial` stands for all trials. `sweeper_name`, such as `optuna`, is for messages. The metric by which trials are
    judged is `evaluation.watched`.
    """
    from trainer.config.evaluation import watches_held_out_loss
    from trainer.config.run import LauncherName
    from trainer.evaluation.interval import AUTO
    from trainer.evaluation.tasks.registry import metric_directions

    config = first_trial.config
    problems = []
    has_evaluation_data = config.data.eval_path is not None or config.data.eval_share
    is_metric_of_task = config.evaluation.watched in metric_directions(config.evaluation.tasks)
    if not has_evaluation_data and not is_metric_of_task:
        problems.append(
            f"sweeper={sweeper_name}: there is no evaluation data that trials could be judged by "
            f"({config.evaluation.watched}); give data.eval_path or data.eval_share=0.05"
        )
    # `auto` measures the held-out loss during training, but no metric of a task: that takes too long.
    every_steps = config.evaluation.every_steps
    is_measured_during_training = bool(every_steps) and (every_steps != AUTO or watches_held_out_loss(config))
    if settings.prune is TrialPruning.median and not is_measured_during_training:
        problems.append(
            f"sweeper.prune=median: judges trials amid their way, where evaluation.every_steps={every_steps} does not measure "
            f"{config.evaluation.watched}; set evaluation.every_steps to a number of steps, or leave it out"
        )
    if config.launcher.name is LauncherName.slurm:
        problems.append(
            "launcher=slurm: a search starts its trials where the command runs; leave it out, and start the same command in as "
            "many jobs as shall work on it, with one run.dir that all of them see"
        )
    return problems


def search_summary_text(search: PlannedSearch) -> str:
    """What is printed before a search starts: number of trials, directory, metric, and the searched settings.

    "sweeper.trials=20 in runs/search-1f2e3d4c, eval/loss (smaller is better), of", then a line for each setting.
    """
    better = "larger" if search.greater_is_better else "smaller"
    trials = search.settings.trials
    lines = [f"sweeper.trials={trials} in {search.directory}, {search.metric} ({better} is better), of"]
    for setting in search.searched_settings:
        lines.append(f"  {setting.key}={setting.values_text}")
    return "\n".join(lines)
