"""The arguments of `shardtune review make` and `review score`."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config.verb_words import VerbWords, bare_word, bare_words, flag, read_words, setting_words, word
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.config.outside_values import OutsideValue
    from launch.evaluate.words import EvaluationPlan
    from trainer.config.review import ReviewConfig
    from trainer.config.run import RunConfig

ARMS_PREFIX = "arms."
"""Prefix of words that allow the runs among the arms to use files or hosts outside of their directories."""
SETTABLE_GROUPS = frozenset({"review", "evaluation", "strategy", "launcher", "run", "precision"})


@dataclass(kw_only=True)
class MakeWords(VerbWords):
    """What `shardtune review make` takes."""

    run: Path = bare_word("name one run, as in shardtune review make runs/x prompts=<file>")
    prompts: str = word(
        "the file that prompts are drawn from",
        like="prompts.jsonl",
        required="give a file of prompts, as in prompts=prompts.jsonl",
    )
    n: int | None = word("number of prompts to draw; the same as review.n", like="50")
    seed: int | None = word("seed of the drawing; the same as review.seed", like="0")
    arms: list[str] = word(
        "the models to compare: base, tuned, other runs, model directories", default=["base", "tuned"]
    )
    checkpoint: str = word(
        "which checkpoint: the one that the run exported at its end (auto), last, best or a step", default="auto"
    )
    accept: list[str] = word(
        "continue although the base model is not that of the training",
        default=[],
        like="[base]",
        choices=("base", "data"),
        also=("run.accept",),
    )
    to: Path | None = word("where to write the files; default: <run>/review", like="<directory>")
    settings: list[str] = setting_words()


@dataclass(kw_only=True)
class ScoreWords(VerbWords):
    """What `shardtune review score` takes."""

    run: Path = bare_word(
        "name a run and the files that reviewers saved: shardtune review score runs/x ada.json bert.json"
    )
    answers: list[Path] = bare_words()
    review: Path | None = word("the directory that make wrote; default: <run>/review", like="<directory>")
    drop: list[str] = word("reviewers whose votes do not count; the record names them", default=[], like="[name]")
    as_json: bool = flag("print the result as JSON instead of tables", key="--json")


@dataclass(slots=True)
class MakeRequest:
    """The arguments of `review make`, checked and resolved."""

    run: Path
    prompts: str
    arms: dict[str, str | None]
    """The models to compare, by name: run or model directory; None for the run under review (`tuned`) and its base model."""
    to: Path
    checkpoint: Path
    model: dict[str, Any]
    """What is judged, for the key and the reports: run, checkpoint, its fingerprint, and what was accepted."""
    review: ReviewConfig
    settings: list[str]
    """Settings for the evaluation of the run, such as `precision=bf16`, without those of `review.`."""
    allowing: list[str]
    """Arguments that allow the runs among the arms to use files or hosts outside of their directories."""
    command: list[str]
    """The command line, the verb first, for messages."""
    accept: str = ""
    """The argument `accept=[...]`, which allows another base model than the runs were trained on; empty if not given."""


def read_make_words(argv: list[str]) -> MakeRequest:
    """Read the arguments of `review make`, find the checkpoint, and check the arms. Raises ConfigError with every problem."""
    from launch.config.compose import recompose
    from launch.config.read_run import RunReader, read_run, split_allowing_words
    from launch.export.command import find_checkpoint
    from trainer.checkpoints.manifest import fingerprint
    from trainer.config.ranges import range_problems
    from trainer.session.base_files import use_recorded_base

    # The arguments themselves.
    command = ["review", "make", *argv]
    allowing, argv = split_allowing_words(argv, ARMS_PREFIX)
    words, problems = read_words("review make", MakeWords, argv)
    if problems:
        raise ConfigError(problems)
    run = words.run
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: is no run directory (it has no config.yaml); name a run")
    # n= and seed= are short for settings of the group `review`.
    review_settings = [f"review.{key}={words.typed[key]}" for key in ("n", "seed") if key in words.typed]
    settings = [*words.settings, *review_settings]

    # The configuration of the run with these settings, and its checkpoint.
    def compose_for_review(frozen: RunConfig, setting_words: list[str]) -> RunConfig:
        frozen.run.dir = None
        frozen.run.resume = "auto"
        return recompose(frozen, setting_words, SETTABLE_GROUPS)

    reading_verb = RunReader(command, _uses_outside_value, own_groups=SETTABLE_GROUPS)
    config = read_run(run, reading_verb, settings, compose_for_review)
    checkpoint = find_checkpoint(run, words.checkpoint, config.checkpoint)
    accepted = use_recorded_base(config, run, words.accept, teacher=True, start=True)

    # What the review compares, and where it is written.
    review = config.review
    arms, arm_problems = _read_arms(words.arms)
    problems = [*range_problems(review, "review"), *review.problems(), *arm_problems]
    to = words.to or run / "review"
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        problems.append(f"to={to}: exists and is not empty; a review is never written over: name a new directory")
    if problems:
        raise ConfigError(problems)

    model = {
        "run": str(run),
        "checkpoint": checkpoint.name,
        "artefact": None if accepted else fingerprint(checkpoint),  # on another base these are other weights
        "accepted": accepted,
    }
    return MakeRequest(
        run=run,
        prompts=words.prompts,
        arms=arms,
        to=to,
        checkpoint=checkpoint,
        model=model,
        review=review,
        settings=[word for word in settings if not word.startswith("review.")],
        allowing=allowing,
        command=command,
        accept=f"accept=[{','.join(words.accept)}]" if words.accept else "",
    )


def read_score_words(argv: list[str]) -> ScoreWords:
    """Read the arguments of `review score`, with the default of `review=` filled in. Raises ConfigError with every problem."""
    from launch.review.sheet import KEY_FILE

    words, problems = read_words("review score", ScoreWords, argv)
    if words.run is not None and not words.answers:
        problems.append(
            "name a run and the files that reviewers saved: shardtune review score runs/x ada.json bert.json"
        )
    if problems:
        raise ConfigError(problems)
    if not words.run.is_dir():
        raise ConfigError(f"{words.run}: there is no such run")
    missing_files = [str(path) for path in words.answers if not path.is_file()]
    if missing_files:
        raise ConfigError(f"{', '.join(missing_files)}: there is no such file")
    words.review = words.review or words.run / "review"
    if not (words.review / KEY_FILE).is_file():
        raise ConfigError(
            f"review={words.review}: holds no review; name the directory that review make wrote, as review=<directory>"
        )
    return words


def _uses_outside_value(value: OutsideValue, config: RunConfig) -> bool:
    """Whether letting a run's model answer prompts uses a value of its config that points outside of its directory."""
    from launch.config.read_run import uses_model_alone

    return uses_model_alone(value, config)


def _without_allowing_words(settings: list[str]) -> list[str]:
    """The settings without those that allow a run to use something outside its directory: each run needs its own permission."""
    from launch.config.read_run import is_allowing_word

    return [word for word in settings if not is_allowing_word(word)]


def _read_arms(arms: list[str]) -> tuple[dict[str, str | None], list[str]]:
    """({name of an arm: its directory}, error messages); the directory is None for the run under review and its base model.

    `arms` are the values of `arms=`: base, tuned, runs and model directories. A second directory of the same name gets an
    apostrophe.
    """
    from launch.review.sheet import BASE, TUNED

    argument = f"arms=[{','.join(arms)}]"
    directory_by_arm: dict[str, str | None] = {}
    problems = []
    for arm in arms:
        path = Path(arm).expanduser()
        if arm in (BASE, TUNED):
            directory_by_arm[arm] = None
        elif (path / "config.yaml").is_file() or (path / "config.json").is_file():
            name = path.name
            while name in directory_by_arm:
                name += "'"
            directory_by_arm[name] = str(path)
        else:
            problems.append(f"{argument}: {arm} is neither {BASE}, {TUNED}, a run nor a model directory")
    if not problems and (TUNED not in directory_by_arm or len(directory_by_arm) < 2):
        problems.append(f"{argument}: needs {TUNED}, and something to compare it with, as in arms=[{BASE},{TUNED}]")
    return directory_by_arm, problems


def arm_plan(request: MakeRequest, arm: str, directory: str | None) -> EvaluationPlan:
    """The plan of an evaluation in which one arm (compared model) answers the prompts of the review.

    `directory`: the arm's run or model; None for the run under review. The evaluation of that run also writes the answers of its
    base model, if this is among the arms.
    """
    from launch.evaluate.words import make_plan, parse_words
    from launch.review.sheet import BASE

    # The answers are what is wanted: the task scores them against a placeholder, and nobody reads the score.
    task = "evaluation.tasks.answers"
    is_run = directory is None or (Path(directory) / "config.yaml").is_file()
    arguments = [
        "evaluation.tasks=[]",
        f"{task}.kind=exact_match",
        f"{task}.path={request.to / 'answers' / 'prompts.jsonl'}",
        "evaluation.resamples=1",
        f"to={request.to / 'answers' / arm}",
    ]
    if directory is None:
        arguments += request.settings
    else:
        arguments += [*_without_allowing_words(request.settings), *request.allowing]
    if request.accept and is_run:
        arguments.append(request.accept)
    if directory is None:
        step = int(request.checkpoint.name.rpartition("-")[2])  # step-000040
        arguments += [str(request.run), f"checkpoint={step}"]
        if BASE in request.arms:
            arguments.append(f"against={BASE}")
    elif is_run:
        arguments.append(directory)
    else:
        arguments.append(f"model.path={directory}")

    evaluate_words = parse_words(arguments)
    evaluate_words.command = request.command
    evaluate_words.prefix = "" if directory is None else ARMS_PREFIX
    plan = make_plan(evaluate_words)
    plan.config.evaluation.tasks["answers"].write = copy.deepcopy(request.review.write)
    plan.job = replace(plan.job, kept=False)
    return plan
