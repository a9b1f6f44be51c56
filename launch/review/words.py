"""The words of `shardtune review` become what is to be made or scored."""

from __future__ import annotations

import copy
import difflib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.export.words import ACCEPT, accepted_kinds
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.config.outside_values import OutsideValue
    from launch.evaluate.words import EvaluationPlan
    from trainer.config.review import ReviewConfig
    from trainer.config.run import RunConfig

MAKE = ("prompts", "n", "arms", "seed", "to", "checkpoint", ACCEPT)
SCORE = ("review", "drop")
ARMS = "arms."
"""Before a setting: it allows what the runs of `arms=` reach out to."""
ALLOWED = frozenset({"review", "evaluation", "strategy", "launcher", "run", "precision"})


@dataclass(slots=True)
class Making:
    """What `review make` is asked for."""

    run: Path
    prompts: str
    arms: dict[str, str | None]
    """By name: the run or model directory, None for the run itself and its base."""
    to: Path
    checkpoint: Path
    model: dict[str, Any]
    """What is judged, as reports say it."""
    review: ReviewConfig
    settings: list[str]
    """Words for how it is computed, and those that allow what the run reaches out to."""
    allowing: list[str]
    """Words that allow what the runs among the arms reach out to."""
    command: list[str]
    """All words as they were typed, the verb first, for messages."""
    accept: str = ""
    """The word that takes another base than the runs were trained on, empty where it was not typed."""


@dataclass(slots=True)
class Scoring:
    """What `review score` is asked for."""

    run: Path
    review: Path
    answers: list[Path]
    drop: list[str] = field(default_factory=list)
    as_json: bool = False


def making(argv: list[str]) -> Making:
    """The words of `review make`. Errors: ConfigError with every problem."""
    from launch.config.compose import recompose
    from launch.config.read_run import ReadingVerb, read_run, take_words
    from launch.export.command import find_checkpoint
    from launch.review.sheet import BASE, TUNED
    from trainer.checkpoints.manifest import fingerprint
    from trainer.config.ranges import range_problems
    from trainer.session.base_files import use_recorded_base

    command = ["review", "make", *argv]
    allowing, argv = take_words(argv, ARMS)
    bare, own, settings, problems = _sort(argv, MAKE)
    problems += [f"{word}: there is no such flag; review make takes --help" for word in bare if word.startswith("-")]
    runs = [word for word in bare if not word.startswith("-")]
    if len(runs) != 1:
        problems.append(
            f"{' '.join(runs) or 'no run'}: name one run, as in shardtune review make runs/x prompts=<file>"
        )
    if "prompts" not in own:
        problems.append("prompts: not set; give a file of prompts, as in prompts=prompts.jsonl")
    if problems:
        raise ConfigError(problems)
    run = Path(runs[0]).expanduser()
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: is no run directory (it has no config.yaml); name a run")
    settings += [f"review.{key}={own[key]}" for key in ("n", "seed") if key in own]

    def with_own_words(frozen: RunConfig, words: list[str]) -> RunConfig:
        frozen.run.dir, frozen.run.resume = None, "auto"
        return recompose(frozen, words, ALLOWED)

    config = read_run(run, ReadingVerb(command, _needs, own_groups=ALLOWED), settings, with_own_words)
    checkpoint = find_checkpoint(run, own.get("checkpoint", "last"), config.checkpoint)
    accepted = use_recorded_base(config, run, accepted_kinds(own), teacher=True, start=True)
    review = config.review
    problems += range_problems(review, "review")
    problems += review.problems()
    arms, wrong = _arms(own.get("arms", f"[{BASE},{TUNED}]"))
    to = Path(own["to"]).expanduser() if "to" in own else run / "review"
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        wrong.append(f"to={to}: exists and is not empty; a review is never written over: name a new directory")
    if problems := [*problems, *wrong]:
        raise ConfigError(problems)
    artefact = None if accepted else fingerprint(checkpoint)  # on another base these are other weights
    model = {"run": str(run), "checkpoint": checkpoint.name, "artefact": artefact, "accepted": accepted}
    plain = [word for word in settings if not word.startswith("review.")]
    accept = f"{ACCEPT}={own[ACCEPT]}" if ACCEPT in own else ""
    return Making(run, own["prompts"], arms, to, checkpoint, model, review, plain, allowing, command, accept)


def scoring(argv: list[str]) -> Scoring:
    """The words of `review score`. Errors: ConfigError with every problem."""
    from launch.review.sheet import KEY

    bare, own, settings, problems = _sort(argv, SCORE)
    as_json = "--json" in bare
    flags = [word for word in bare if word.startswith("-") and word != "--json"]
    problems += [f"{word}: there is no such flag; review score takes --json and --help" for word in flags]
    for word in settings:
        near = difflib.get_close_matches(word.partition("=")[0], SCORE, n=1)
        problems.append(f"{word}: review score has no such word; {near[0] + '=' if near else ', '.join(SCORE)}")
    words = [word for word in bare if not word.startswith("-")]
    if len(words) < 2:
        problems.append(
            "name a run and the files that reviewers saved: shardtune review score runs/x ada.json bert.json"
        )
    if problems:
        raise ConfigError(problems)
    run, *answers = (Path(word).expanduser() for word in words)
    if not run.is_dir():
        raise ConfigError(f"{run}: there is no such run")
    if missing := [str(path) for path in answers if not path.is_file()]:
        raise ConfigError(f"{', '.join(missing)}: there is no such file")
    review = Path(own["review"]).expanduser() if "review" in own else run / "review"
    if not (review / KEY).is_file():
        raise ConfigError(
            f"review={review}: holds no review; name the directory that review make wrote, as review=<directory>"
        )
    return Scoring(run, review, answers, _list(own.get("drop", "")), as_json)


def _sort(argv: list[str], keys: tuple[str, ...]) -> tuple[list[str], dict[str, str], list[str], list[str]]:
    """(bare words, own words by key, settings, problems)."""
    bare, own, settings, problems = list[str](), dict[str, str](), list[str](), list[str]()
    for word in argv:
        key, assigned, value = word.partition("=")
        if key == "run.dir" and assigned:
            bare.append(value)
        elif not assigned or word.startswith("-"):
            bare.append(word)
        elif key in keys:
            problems += [f"{word}: {key} is given twice"] if key in own else []
            problems += [] if value else [f"{word}: {key} needs a value"]
            own[key] = value
        else:
            settings.append(word)
    return bare, own, settings, problems


def _needs(value: OutsideValue, config: RunConfig) -> bool:
    """Whether having a run's model answer prompts uses a value of the run that reaches out of it."""
    from launch.config.read_run import uses_model_alone

    return uses_model_alone(value, config)


def _computing(settings: list[str]) -> list[str]:
    """The words for how answers are computed, without those that allow what one run reaches out to."""
    from launch.config.read_run import is_allowing_word

    return [word for word in settings if not is_allowing_word(word)]


def _list(text: str) -> list[str]:
    return [part.strip().strip("'\"") for part in text.strip("[]").split(",") if part.strip()]


def _arms(text: str) -> tuple[dict[str, str | None], list[str]]:
    """(arms by name, problems)."""
    from launch.review.sheet import BASE, TUNED

    found: dict[str, str | None] = {}
    problems = []
    for arm in _list(text):
        path = Path(arm).expanduser()
        if arm in (BASE, TUNED):
            found[arm] = None
        elif (path / "config.yaml").is_file() or (path / "config.json").is_file():
            name = path.name
            while name in found:
                name += "'"
            found[name] = str(path)
        else:
            problems.append(f"arms={text}: {arm} is neither {BASE}, {TUNED}, a run nor a model directory")
    if not problems and (TUNED not in found or len(found) < 2):
        problems.append(f"arms={text}: needs {TUNED}, and something to compare it with, as in arms=[{BASE},{TUNED}]")
    return found, problems


def arm_plan(asked: Making, name: str, where: str | None) -> EvaluationPlan:
    """An evaluation that has one model (and the run's base, where that is an arm) answer the prompts."""
    from launch.evaluate.words import plan, sort
    from launch.review.sheet import BASE

    key, to = "evaluation.tasks.answers", asked.to / "answers" / name
    words = ["evaluation.tasks=[]", f"{key}.kind=exact_match", f"{key}.path={asked.to / 'answers' / 'prompts.jsonl'}"]
    words += ["evaluation.resamples=1", f"to={to}"]
    words += asked.settings if where is None else [*_computing(asked.settings), *asked.allowing]
    words += [asked.accept] if asked.accept and (where is None or (Path(where) / "config.yaml").is_file()) else []
    if where is None:
        words += [str(asked.run), f"checkpoint={int(asked.checkpoint.name.rpartition('-')[2])}"]
        words += [f"against={BASE}"] if BASE in asked.arms else []
    else:
        words.append(where if (Path(where) / "config.yaml").is_file() else f"model.path={where}")
    sorted_words = sort(words)
    sorted_words.command = asked.command
    sorted_words.prefix = "" if where is None else ARMS
    made = plan(sorted_words)
    made.config.evaluation.tasks["answers"].write = copy.deepcopy(asked.review.write)
    made.job = replace(made.job, kept=False)
    return made
