"""Plans a hyperparameter search: reads and checks its settings, its search space, and the job that all trials share."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config.verb_words import read_group
from launch.sweep.space import EXAMPLES, SearchedSetting, read_space
from strategies.errors import ConfigError
from strategies.extras import install_command

if TYPE_CHECKING:
    from launch.config.frozen import Composed

SWEEPERS = ("optuna", "wandb")


class Prune(Enum):
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
    prune: Prune = Prune.none
    """`median` ends a trial whose evaluation is worse than the median of the earlier trials at that step; `none` ends none."""


@dataclass(frozen=True, slots=True)
class Search:
    """A hyperparameter search that has been checked and can be started."""

    settings: SweeperConfig
    space: tuple[SearchedSetting, ...]
    fixed: tuple[str, ...]
    """The words that all trials share."""
    first_job: Composed
    """The job with the first value of each searched setting: what it has in other settings, all trials have."""

    @property
    def metric(self) -> str:
        """The held-out metric that the search improves."""
        return self.first_job.config.evaluation.watched

    @property
    def greater_is_better(self) -> bool:
        """Whether a larger metric is better."""
        from trainer.config.evaluation import more_is_better

        return more_is_better(self.first_job.config)

    def identity(self) -> dict[str, str]:
        """What must be the same for a command to continue this search in its directory; keys and values are for messages."""
        identity = {}
        for setting in sorted(self.space, key=lambda setting: setting.key):  # the order of the words does not matter
            identity[f"{setting.key}="] = setting.text
        better = "larger" if self.greater_is_better else "smaller"
        identity["metric"] = f"{self.metric}, {better} is better"
        identity["sweeper.seed"] = str(self.settings.seed)
        identity["the words that all trials share"] = self.first_job.sha256[:8]
        return identity

    def trial_words(self, params: dict[str, Any]) -> list[str]:
        """The words of a trial, such as `optim.lr=2e-4`, from the values that were drawn for it by setting."""
        return [setting.word(params[setting.key]) for setting in self.space if setting.key in params]

    @property
    def directory(self) -> Path:
        """The directory of the search: `run.dir`, or a directory below runs/ whose name is a hash of the search."""
        typed_dir = self.first_job.config.run.dir
        if typed_dir:
            return Path(typed_dir).expanduser()
        digest = hashlib.sha256(json.dumps(self.identity()).encode()).hexdigest()
        return Path("runs") / f"search-{digest[:8]}"


def is_search(words: list[str]) -> bool:
    """Whether a search is meant: whether any word is `sweeper=...` or `sweeper.<setting>=...`, right or wrong."""
    return any(word.partition("=")[0].split(".")[0] == "sweeper" for word in words)


def chosen_sweeper(words: list[str]) -> str:
    """What draws the trials, as the last word `sweeper=` names it; `optuna` if there is none."""
    for word in reversed(words):
        if word.startswith("sweeper="):
            return word.partition("=")[2]
    return SWEEPERS[0]


def plan_search(words: list[str]) -> Search:
    """Read the words of a search, and compose its jobs as far as needed to know that every trial is legal.

    Raises ConfigError with every problem at once.
    """
    from launch.config.compose import compose

    settings, run_words = read_sweeper_words(words)
    space, fixed = read_space(run_words)
    if not space:
        raise ConfigError(
            f"sweeper={chosen_sweeper(words)}: no word has several values to search; write one as <setting>={EXAMPLES}"
        )
    typed = {word.partition("=")[0]: word for word in run_words}
    if settings.metric is not None:
        watch = f"evaluation.watch={settings.metric}"
        if typed.get("evaluation.watch", watch) != watch:
            raise ConfigError(f"sweeper.metric={settings.metric}: and {typed['evaluation.watch']}; give one of them")
        if "evaluation.watch" not in typed:
            fixed.append(watch)
    if "export.at_end" not in typed:  # most trials are thrown away
        fixed.append("export.at_end=false")
    searched_keys = {setting.key for setting in space}
    for key in ("run.dir", "evaluation.watch", "evaluation.greater_is_better", "launcher"):
        if key in searched_keys:
            raise ConfigError(f"{typed[key]}: is the same for all trials; give one value")

    # Not every combination: settings are assumed not to depend on each other. Compose the first value of all settings,
    # then each other end or choice of one setting beside the first values of the others.
    extreme_words = [setting.extreme_words() for setting in space]
    first_words = [words_of_setting[0] for words_of_setting in extreme_words]
    first_job = compose([*fixed, *first_words])
    problems = _search_problems(first_job, settings, chosen_sweeper(words))
    for number, words_of_setting in enumerate(extreme_words):
        other_words = first_words[:number] + first_words[number + 1 :]
        for word in words_of_setting[1:]:
            try:
                compose([*fixed, *other_words, word])
            except ConfigError as error:
                problems += [f"with {word}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return Search(settings, tuple(space), tuple(fixed), first_job)


def read_sweeper_words(words: list[str]) -> tuple[SweeperConfig, list[str]]:
    """(the settings of the search, `sweeper.*`; the other words, which are of its runs).

    Raises ConfigError with every problem at once.
    """
    settings, other_words, problems = read_group("sweeper", SweeperConfig(), words)
    sweeper_words: list[str] = []
    run_words: list[str] = []
    for word in other_words:
        is_sweeper = word == "sweeper" or word.startswith("sweeper=")
        if is_sweeper:
            sweeper_words.append(word)
        else:
            run_words.append(word)
    for word in sweeper_words:
        if word.partition("=")[2] not in SWEEPERS:
            problems.append(
                f"{word}: there is no such sweeper; sweeper=optuna searches, sweeper=wandb writes a file for W&B's agent, "
                "and without it -m runs all points"
            )
    if settings.trials < 1:
        problems.append(f"sweeper.trials={settings.trials}: must be at least 1")
    if settings.seed < 0:
        problems.append(f"sweeper.seed={settings.seed}: must be at least 0")
    if not sweeper_words:  # sweeper.trials=20 alone would start no search
        setting_word = next(word for word in words if word.startswith("sweeper"))
        problems.append(f"{setting_word}: is of a search; add sweeper=optuna")
    if chosen_sweeper(words) == "optuna" and find_spec("optuna") is None:
        problems.append(f"sweeper=optuna: needs the package optuna; {install_command('search')}")
    if problems:
        raise ConfigError(problems)
    return settings, run_words


def _search_problems(first_job: Composed, settings: SweeperConfig, sweeper: str) -> list[str]:
    """Why a job that could run alone cannot be a trial of a search: no metric to judge it by, or SLURM as its launcher."""
    from trainer.config.evaluation import is_held_out_loss
    from trainer.config.run import LauncherName
    from trainer.evaluation.interval import AUTO
    from trainer.evaluation.tasks.registry import metric_directions

    config = first_job.config
    problems = []
    has_evaluation_data = config.data.eval_path is not None or config.data.eval_share
    if not has_evaluation_data and config.evaluation.watched not in metric_directions(config.evaluation.tasks):
        problems.append(
            f"sweeper={sweeper}: there is no evaluation data that trials could be judged by ({config.evaluation.watched}); give "
            "data.eval_path or data.eval_share=0.05"
        )
    every = config.evaluation.every_steps
    if settings.prune is Prune.median and (not every or (every == AUTO and not is_held_out_loss(config))):
        problems.append(
            f"sweeper.prune=median: judges trials amid their way, where evaluation.every_steps={every} does not measure "
            f"{config.evaluation.watched}; set evaluation.every_steps to a number of steps, or leave it out"
        )
    if config.launcher.name is LauncherName.slurm:
        problems.append(
            "launcher=slurm: a search starts its trials where the command runs; leave it out, and start the same command in as "
            "many jobs as shall work on it, with one run.dir that all of them see"
        )
    return problems


def search_listing(search: Search) -> str:
    """What is printed before a search starts: number of trials, directory, metric, and the searched settings."""
    better = "larger" if search.greater_is_better else "smaller"
    trials = search.settings.trials
    lines = [f"sweeper.trials={trials} in {search.directory}, {search.metric} ({better} is better), of"]
    for setting in search.space:
        lines.append(f"  {setting.key}={setting.text}")
    return "\n".join(lines)
