"""A search before it starts: its settings, its space and the job that all trials share, all checked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config.verb_words import read_group
from launch.sweep.space import WAYS, Searched, read_space
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
    space: tuple[Searched, ...]
    fixed: tuple[str, ...]
    """The words that all trials share."""
    first: Composed
    """The job with one value of each setting that is searched."""

    @property
    def metric(self) -> str:
        """What is made better."""
        return self.first.config.evaluation.watch

    @property
    def greater_is_better(self) -> bool:
        """Which way."""
        from trainer.config.evaluation import more_is_better

        return more_is_better(self.first.config)

    def asked(self) -> dict[str, str]:
        """What makes it this search: another one does not go on in its directory."""
        space = {one.key: one.text for one in sorted(self.space, key=lambda one: one.key)}
        return {f"{key}=": text for key, text in space.items()} | {
            "metric": f"{self.metric}, {'larger' if self.greater_is_better else 'smaller'} is better",
            "sweeper.seed": str(self.settings.seed),
            "the words that all trials share": self.first.sha256[:8],
        }

    def words_of(self, params: dict[str, Any]) -> list[str]:
        """The own words of a trial for which these values were drawn."""
        return [one.word(params[one.key]) for one in self.space if one.key in params]

    @property
    def directory(self) -> Path:
        """`run.dir`, or one below runs/ that is the same for the same search."""
        if given := self.first.config.run.dir:
            return Path(given).expanduser()
        return Path("runs") / f"search-{hashlib.sha256(json.dumps(self.asked()).encode()).hexdigest()[:8]}"


def is_search(words: list[str]) -> bool:
    """Whether the words ask for a search, well or badly."""
    return any(word.partition("=")[0].split(".")[0] == "sweeper" for word in words)


def sweeper_of(words: list[str]) -> str:
    """Who draws the trials."""
    return next((word.partition("=")[2] for word in reversed(words) if word.startswith("sweeper=")), SWEEPERS[0])


def plan_search(words: list[str]) -> Search:
    """Read and check everything. Raises ConfigError with every problem."""
    from launch.config.compose import compose

    settings, rest = read_own(words)
    space, fixed = read_space(rest)
    if not space:
        raise ConfigError(
            f"sweeper={sweeper_of(words)}: no word has several values to search; write one as <setting>={WAYS}"
        )
    typed = {word.partition("=")[0]: word for word in rest}
    if settings.metric is not None:
        watch = f"evaluation.watch={settings.metric}"
        if typed.get("evaluation.watch", watch) != watch:
            raise ConfigError(f"sweeper.metric={settings.metric}: and {typed['evaluation.watch']}; give one of them")
        fixed += [] if "evaluation.watch" in typed else [watch]
    if "export.at_end" not in typed:
        fixed.append("export.at_end=false")
    for key in ("run.dir", "evaluation.watch", "evaluation.greater_is_better", "launcher"):
        if any(one.key == key for one in space):
            raise ConfigError(f"{typed[key]}: is the same for all trials; give one value")
    corners = [one.corners() for one in space]
    first = compose([*fixed, *(words_of[0] for words_of in corners)])
    problems = _problems(first, settings, sweeper_of(words))
    for number, words_of in enumerate(corners):
        for word in words_of[1:]:
            others = [each[0] for n, each in enumerate(corners) if n != number]
            try:
                compose([*fixed, *others, word])
            except ConfigError as error:
                problems += [f"with {word}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return Search(settings, tuple(space), tuple(fixed), first)


def read_own(words: list[str]) -> tuple[SweeperConfig, list[str]]:
    """The settings of the search, and the words of its runs. Raises ConfigError with every problem."""
    settings, others, problems = read_group("sweeper", SweeperConfig(), words)
    chosen = [word for word in others if word == "sweeper" or word.startswith("sweeper=")]
    rest = [word for word in others if word not in chosen]
    problems += [
        f"{word}: there is no such sweeper; sweeper=optuna searches, sweeper=wandb writes a file for W&B's agent, and without "
        "it -m runs all points"
        for word in chosen
        if word.partition("=")[2] not in SWEEPERS
    ]
    if settings.trials < 1:
        problems.append(f"sweeper.trials={settings.trials}: must be at least 1")
    if settings.seed < 0:
        problems.append(f"sweeper.seed={settings.seed}: must be at least 0")
    if not chosen:
        problems.append(f"{next(w for w in words if w.startswith('sweeper'))}: is of a search; add sweeper=optuna")
    if sweeper_of(words) == "optuna" and find_spec("optuna") is None:
        problems.append(f"sweeper=optuna: needs the package optuna; {install_command('search')}")
    if problems:
        raise ConfigError(problems)
    return settings, rest


def _problems(first: Composed, settings: SweeperConfig, by: str) -> list[str]:
    """What keeps a job that could run from being searched."""
    from trainer.config.run import LauncherName
    from trainer.evaluation.tasks.registry import metric_directions

    config, found = first.config, []
    if (
        config.data.eval_path is None
        and not config.data.eval_share
        and config.evaluation.watch not in metric_directions(config.evaluation.tasks)
    ):
        found.append(
            f"sweeper={by}: there is no evaluation data that trials could be judged by ({config.evaluation.watch}); give "
            "data.eval_path or data.eval_share=0.05"
        )
    if settings.prune is Prune.median and not config.evaluation.every_steps:
        found.append(
            "sweeper.prune=median: judges trials amid their way, and nothing is evaluated there; set evaluation.every_steps, or "
            "leave it out"
        )
    if config.launcher.name is LauncherName.slurm:
        found.append(
            "launcher=slurm: a search starts its trials where the command runs; leave it out, and start the same command in as "
            "many jobs as shall work on it, with one run.dir that all of them see"
        )
    return found


def listing(search: Search) -> str:
    """What would be searched."""
    better = "larger" if search.greater_is_better else "smaller"
    settings = asdict(search.settings)
    rows = [f"  {one.key}={one.text}" for one in search.space]
    return "\n".join(
        [f"sweeper.trials={settings['trials']} in {search.directory}, {search.metric} ({better} is better), of", *rows]
    )
