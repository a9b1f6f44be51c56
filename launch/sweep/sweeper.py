"""A search before it starts: its settings, its space and the job that all trials share, all checked."""

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
    """Which trials are ended early."""

    none = "none"
    median = "median"


@dataclass(kw_only=True, slots=True)
class SweeperConfig:
    """Settings of a search."""

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
    """A search that can be begun."""

    settings: SweeperConfig
    space: tuple[SearchedSetting, ...]
    fixed: tuple[str, ...]
    """The words that all trials share."""
    first_job: Composed
    """The job with one value of each setting that is searched."""

    @property
    def metric(self) -> str:
        """The metric that the search improves."""
        return self.first_job.config.evaluation.watch

    @property
    def greater_is_better(self) -> bool:
        """Whether a larger metric is better."""
        from trainer.config.evaluation import more_is_better

        return more_is_better(self.first_job.config)

    def identity(self) -> dict[str, str]:
        """What tells this search from others: another one does not go on in its directory."""
        identity = {}
        for setting in sorted(self.space, key=lambda setting: setting.key):
            identity[f"{setting.key}="] = setting.text
        better = "larger" if self.greater_is_better else "smaller"
        identity["metric"] = f"{self.metric}, {better} is better"
        identity["sweeper.seed"] = str(self.settings.seed)
        identity["the words that all trials share"] = self.first_job.sha256[:8]
        return identity

    def words_of(self, params: dict[str, Any]) -> list[str]:
        """The own words of a trial for which these values were drawn."""
        return [setting.word(params[setting.key]) for setting in self.space if setting.key in params]

    @property
    def directory(self) -> Path:
        """`run.dir`, or one below runs/ that is the same for the same search."""
        typed_dir = self.first_job.config.run.dir
        if typed_dir:
            return Path(typed_dir).expanduser()
        digest = hashlib.sha256(json.dumps(self.identity()).encode()).hexdigest()
        return Path("runs") / f"search-{digest[:8]}"


def is_search(words: list[str]) -> bool:
    """Whether the words ask for a search, well or badly."""
    return any(word.partition("=")[0].split(".")[0] == "sweeper" for word in words)


def sweeper_of(words: list[str]) -> str:
    """What draws the trials: `optuna` or `wandb`."""
    return next((word.partition("=")[2] for word in reversed(words) if word.startswith("sweeper=")), SWEEPERS[0])


def plan_search(words: list[str]) -> Search:
    """Read and check everything. Raises ConfigError with every problem."""
    from launch.config.compose import compose

    settings, run_words = read_sweeper_words(words)
    space, fixed = read_space(run_words)
    if not space:
        raise ConfigError(
            f"sweeper={sweeper_of(words)}: no word has several values to search; write one as <setting>={EXAMPLES}"
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
    extremes = [setting.extreme_words() for setting in space]
    first_words = [setting_words[0] for setting_words in extremes]
    # Not every combination: settings are assumed not to depend on each other.
    first = compose([*fixed, *first_words])
    problems = _problems(first, settings, sweeper_of(words))
    # Every end of every setting must be legal, beside the first of the others.
    for number, setting_words in enumerate(extremes):
        others = first_words[:number] + first_words[number + 1 :]
        for word in setting_words[1:]:
            try:
                compose([*fixed, *others, word])
            except ConfigError as error:
                problems += [f"with {word}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return Search(settings, tuple(space), tuple(fixed), first)


def read_sweeper_words(words: list[str]) -> tuple[SweeperConfig, list[str]]:
    """The settings of the search, and the words of its runs. Raises ConfigError with every problem."""
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
    if not sweeper_words:
        setting_word = next(word for word in words if word.startswith("sweeper"))
        problems.append(f"{setting_word}: is of a search; add sweeper=optuna")
    if sweeper_of(words) == "optuna" and find_spec("optuna") is None:
        problems.append(f"sweeper=optuna: needs the package optuna; {install_command('search')}")
    if problems:
        raise ConfigError(problems)
    return settings, run_words


def _problems(first: Composed, settings: SweeperConfig, sweeper: str) -> list[str]:
    """What keeps a job that could run from being searched."""
    from trainer.config.run import LauncherName
    from trainer.evaluation.tasks.registry import metric_directions

    config = first.config
    problems = []
    has_evaluation_data = config.data.eval_path is not None or config.data.eval_share
    if not has_evaluation_data and config.evaluation.watch not in metric_directions(config.evaluation.tasks):
        problems.append(
            f"sweeper={sweeper}: there is no evaluation data that trials could be judged by ({config.evaluation.watch}); give "
            "data.eval_path or data.eval_share=0.05"
        )
    if settings.prune is Prune.median and not config.evaluation.every_steps:
        problems.append(
            "sweeper.prune=median: judges trials amid their way, and nothing is evaluated there; set evaluation.every_steps, or "
            "leave it out"
        )
    if config.launcher.name is LauncherName.slurm:
        problems.append(
            "launcher=slurm: a search starts its trials where the command runs; leave it out, and start the same command in as "
            "many jobs as shall work on it, with one run.dir that all of them see"
        )
    return problems


def listing(search: Search) -> str:
    """The lines that tell what is searched."""
    better = "larger" if search.greater_is_better else "smaller"
    trials = search.settings.trials
    lines = [f"sweeper.trials={trials} in {search.directory}, {search.metric} ({better} is better), of"]
    for setting in search.space:
        lines.append(f"  {setting.key}={setting.text}")
    return "\n".join(lines)
