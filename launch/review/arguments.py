"""The arguments of `shardtune review make` and `review score`."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config.verb_arguments import (
    VerbArguments,
    flag,
    forwarded_settings,
    option,
    positional,
    positionals,
    read_arguments,
)
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.config.outside_values import ValueNeedingConsent
    from launch.evaluate.plan import EvaluationPlan
    from trainer.config.review import ReviewConfig
    from trainer.config.run import RunConfig

ARMS_PREFIX = "arms."
"""Prefix of settings that allow the runs among the arms to use files or hosts outside of their directories."""
GROUPS_SETTABLE_FOR_REVIEW = frozenset({"review", "evaluation", "strategy", "launcher", "run", "precision"})


@dataclass(kw_only=True)
class MakeArguments(VerbArguments):
    """What `shardtune review make` takes."""

    run: Path = positional("name one run, as in shardtune review make runs/x prompts=<file>")
    prompts: str = option(
        "the file that prompts are drawn from",
        example="prompts.jsonl",
        advice_if_missing="give a file of prompts, as in prompts=prompts.jsonl",
    )
    n: int | None = option("number of prompts to draw; the same as review.n", example="50")
    seed: int | None = option("seed of the drawing; the same as review.seed", example="0")
    arms: list[str] = option(
        "the models to compare: base, tuned, other runs, model directories", default=["base", "tuned"]
    )
    checkpoint: str = option(
        "which checkpoint: the one that the run exported at its end (auto), last, best or a step", default="auto"
    )
    accept: list[str] = option(
        "continue although the base model is not that of the training",
        default=[],
        example="[base]",
        choices=("base", "data"),
        aliases=("run.accept",),
    )
    to: Path | None = option("where to write the files; default: <run>/review", example="<directory>")
    settings: list[str] = forwarded_settings()


@dataclass(kw_only=True)
class ScoreArguments(VerbArguments):
    """What `shardtune review score` takes."""

    run: Path = positional(
        "name a run and the files that reviewers saved: shardtune review score runs/x ada.json bert.json"
    )
    answers: list[Path] = positionals()
    review: Path | None = option("the directory that make wrote; default: <run>/review", example="<directory>")
    drop: list[str] = option("reviewers whose votes do not count; the record names them", default=[], example="[name]")
    as_json: bool = flag("print the result as JSON instead of tables", key="--json")


@dataclass(slots=True)
class ReviewRequest:
    """The arguments of `review make`, checked and resolved."""

    run: Path
    prompts_path: str
    """The file or files that prompts are drawn from."""
    arms: dict[str, str | None]
    """The models to compare, by name: run or model directory; None for the run under review (`tuned`) and its base model."""
    output_dir: Path
    checkpoint: Path
    judged_model: dict[str, Any]
    """What is judged, for the key and the reports: run, checkpoint, its fingerprint, and what was accepted."""
    review_config: ReviewConfig
    settings: list[str]
    """Settings for the evaluation of the run, such as `precision=bf16`, without those of `review.`."""
    permission_arguments: list[str]
    """Arguments that allow the runs among the arms to use files or hosts outside of their directories, without `arms.`.

    For example ["model.trust_remote_code=true"]."""
    command: list[str]
    """The command line, the verb first, for messages."""
    accept_argument: str = ""
    """The argument `accept=[...]`, which allows another base model than the runs were trained on; empty if not given."""


def read_make_arguments(argv: list[str]) -> ReviewRequest:
    """Read the arguments of `review make`, find the checkpoint under review, and check the models to compare (arms).

    Raises ConfigError with every problem.
    """
    from launch.config.compose import recompose_frozen_config
    from launch.config.read_run import RunReader, read_run, split_allowing_arguments
    from launch.export.checkpoint_choice import find_checkpoint
    from trainer.checkpoints.manifest import manifest_sha256
    from trainer.config.ranges import range_problems
    from trainer.session.base_files import pin_and_check_recorded_base

    command = ["review", "make", *argv]
    permission_arguments, argv = split_allowing_arguments(argv, ARMS_PREFIX)
    arguments, problems = read_arguments("review make", MakeArguments, argv)
    if problems:
        raise ConfigError(problems)
    run = arguments.run
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: is no run directory (it has no config.yaml); name a run")
    # n= and seed= are short for settings of the group `review`.
    review_settings = [
        f"review.{key}={arguments.text_by_key[key]}" for key in ("n", "seed") if key in arguments.text_by_key
    ]
    settings = [*arguments.settings, *review_settings]

    # The configuration of the run with these settings, and its checkpoint.
    def compose_for_review(run_config: RunConfig, forwarded_settings: list[str]) -> RunConfig:
        run_config.run.dir = None
        run_config.run.resume = "auto"
        return recompose_frozen_config(run_config, forwarded_settings, GROUPS_SETTABLE_FOR_REVIEW)

    reader = RunReader(command, _uses_outside_value, own_groups=GROUPS_SETTABLE_FOR_REVIEW)
    config = read_run(run, reader, settings, compose_for_review)
    checkpoint = find_checkpoint(run, arguments.checkpoint, config.checkpoint)
    accepted_differences = pin_and_check_recorded_base(
        config, run, arguments.accept, with_teacher=True, needs_initial_model=True
    )

    # What the review compares, and where it is written.
    review = config.review
    arms, arm_problems = _read_arms(arguments.arms)
    problems = [*range_problems(review, "review"), *review.problems(), *arm_problems]
    output_dir = arguments.to or run / "review"
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        problems.append(
            f"to={output_dir}: exists and is not empty; a review is never written over: name a new directory"
        )
    if problems:
        raise ConfigError(problems)

    judged_model = {
        "run": str(run),
        "checkpoint": checkpoint.name,
        "artefact": None
        if accepted_differences
        else manifest_sha256(checkpoint),  # on another base these are other weights
        "accepted": accepted_differences,
    }
    return ReviewRequest(
        run=run,
        prompts_path=arguments.prompts,
        arms=arms,
        output_dir=output_dir,
        checkpoint=checkpoint,
        judged_model=judged_model,
        review_config=review,
        settings=[argument for argument in settings if not argument.startswith("review.")],
        permission_arguments=permission_arguments,
        command=command,
        accept_argument=f"accept=[{','.join(arguments.accept)}]" if arguments.accept else "",
    )


def read_score_arguments(argv: list[str]) -> ScoreArguments:
    """Read the arguments of `review score`, with the default `<run>/review` for `review`.

    Raises ConfigError for wrong ones, and if the run, a file of answers, or the review is not there.
    """
    from launch.review.sheet import KEY_FILE

    arguments, problems = read_arguments("review score", ScoreArguments, argv)
    if arguments.run is not None and not arguments.answers:
        problems.append(
            "name a run and the files that reviewers saved: shardtune review score runs/x ada.json bert.json"
        )
    if problems:
        raise ConfigError(problems)
    if not arguments.run.is_dir():
        raise ConfigError(f"{arguments.run}: there is no such run")
    file_problems = [problem for path in arguments.answers if (problem := _problem_of_answers_file(path)) is not None]
    if file_problems:
        raise ConfigError(file_problems)
    arguments.review = arguments.review or arguments.run / "review"
    if not (arguments.review / KEY_FILE).is_file():
        raise ConfigError(
            f"review={arguments.review}: holds no review; name the directory that review make wrote, as review=<directory>"
        )
    return arguments


def _uses_outside_value(value: ValueNeedingConsent, config: RunConfig) -> bool:
    """Whether letting a run's model answer prompts uses a value of its config that points outside of its directory."""
    from launch.config.read_run import uses_model_alone

    return uses_model_alone(value, config)


def _without_permission_arguments(settings: list[str]) -> list[str]:
    """The settings without those that allow the run under review to use something outside its directory.

    For another run they do not count: each run needs its own permission.
    """
    from launch.config.read_run import is_allowing_argument

    return [argument for argument in settings if not is_allowing_argument(argument)]


def _read_arms(arms: list[str]) -> tuple[dict[str, str | None], list[str]]:
    """Read `arms=[...]`, the models whose answers are compared: ({name of an arm: its directory}, error messages).

    `arms`: `base`, `tuned`, directories of runs and of models. The directory of `base` and `tuned` is None: both come from
    the run under review. A second directory of the same name gets an apostrophe.
    """
    from launch.review.sheet import BASE_ARM, TUNED_ARM

    argument = f"arms=[{','.join(arms)}]"
    directory_by_arm: dict[str, str | None] = {}
    problems = []
    for arm in arms:
        path = Path(arm).expanduser()
        if arm in (BASE_ARM, TUNED_ARM):
            directory_by_arm[arm] = None
        elif (path / "config.yaml").is_file() or (path / "config.json").is_file():
            name = path.name
            while name in directory_by_arm:
                name += "'"
            directory_by_arm[name] = str(path)
        else:
            problems.append(f"{argument}: {arm} is neither {BASE_ARM}, {TUNED_ARM}, a run nor a model directory")
    if not problems and (TUNED_ARM not in directory_by_arm or len(directory_by_arm) < 2):
        problems.append(
            f"{argument}: needs {TUNED_ARM}, and something to compare it with, as in arms=[{BASE_ARM},{TUNED_ARM}]"
        )
    return directory_by_arm, problems


def plan_arm_evaluation(request: ReviewRequest, arm: str, model_dir: str | None) -> EvaluationPlan:
    """Plan the evaluation in which one arm (compared model) answers the prompts of the review.

    `model_dir`: the directory of the arm's run or model; None for the run under review, whose evaluation also writes the
    answers of its base model if that is among the arms.

    A run may use values outside of its directory, such as a path, only with the user's permission. Another run needs an
    argument that begins with `arms.` for it; the run under review needs one without that prefix.
    """
    from launch.evaluate.arguments import parse_evaluate_arguments
    from launch.evaluate.plan import plan_evaluation

    is_run_under_review = model_dir is None
    # The task is there for its answers. It scores them against a placeholder, and nobody reads the score.
    task_key = "evaluation.tasks.answers"
    arguments = [
        "evaluation.tasks=[]",
        f"{task_key}.kind=exact_match",
        f"{task_key}.path={request.output_dir / 'answers' / 'prompts.jsonl'}",
        "evaluation.resamples=1",
        f"to={request.output_dir / 'answers' / arm}",
    ]
    if is_run_under_review:
        arguments += request.settings
    else:
        arguments += [*_without_permission_arguments(request.settings), *request.permission_arguments]
    arguments += _arm_model_arguments(request, model_dir)

    evaluate_arguments = parse_evaluate_arguments(arguments)
    evaluate_arguments.command = request.command
    evaluate_arguments.prefix = "" if is_run_under_review else ARMS_PREFIX  # for the messages
    plan = plan_evaluation(evaluate_arguments)
    plan.config.evaluation.tasks["answers"].write = copy.deepcopy(request.review_config.write)
    plan.job = replace(plan.job, kept=False)  # the report is no record of the run: only its answers are wanted
    return plan


def _arm_model_arguments(request: ReviewRequest, model_dir: str | None) -> list[str]:
    """The arguments of `evaluate` that say which model answers for an arm, and which other base model is accepted for it.

    - The run under review (`model_dir` is None): its checkpoint, with its base model if that is among the arms.
    - Another run: its directory.
    - A model: its directory, as `model.path`.
    """
    from launch.review.sheet import BASE_ARM

    accept_argument = [request.accept_argument] if request.accept_argument else []
    if model_dir is None:
        step = int(request.checkpoint.name.rpartition("-")[2])  # step-000040
        arguments = [*accept_argument, str(request.run), f"checkpoint={step}"]
        if BASE_ARM in request.arms:
            arguments.append(f"against={BASE_ARM}")
        return arguments
    is_run = (Path(model_dir) / "config.yaml").is_file()
    return [*accept_argument, model_dir] if is_run else [f"model.path={model_dir}"]


def _problem_of_answers_file(path: Path) -> str | None:
    """Why a path cannot be a file of answers: nothing is there, or something that is no file; None for a file."""
    if path.is_file():
        return None
    if not path.exists():
        return f"{path}: there is no such file"
    kind = "a directory" if path.is_dir() else "no ordinary file"
    return f"{path}: is {kind}; name the files that reviewers saved, such as ada.json or table.csv"
