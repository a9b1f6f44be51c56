"""The arguments of `shardtune evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.config.verb_arguments import VerbArguments, flag, forwarded_settings, option, positional, read_arguments
from launch.evaluate.checks import test_split_problems
from strategies.errors import ConfigError

AGAINST_PREFIX = "against."
"""Before a setting: it allows what the run of `against=` reaches out to."""
SERVER_GROUP = "evaluation.server"
"""The group whose address may be typed without `.url`."""


@dataclass(kw_only=True)
class EvaluateArguments(VerbArguments):
    """The command-line arguments of `shardtune evaluate`."""

    run: Path | None = positional("one run is evaluated at a time; name another as against=<run>", required=False)
    against: str | None = option(
        "what to compare with: base (the run's model before training), the directory of a run or model, or an "
        "evaluation.json; with an evaluation.json, the exit code is 69 if a metric got worse by more than its limit or "
        "its interval",
        example="base",
    )
    checkpoint: str = option(
        "which checkpoint: the one that the run exported at its end (auto), last, best or a step",
        default="auto",
        needs="run.dir",
    )
    split: str = option(
        "eval runs tasks. test measures the run's test documents instead (test/loss ...), and counts the look: choose nothing "
        "by them",
        default="eval",
        choices=("eval", "test"),
        needs="run.dir",
    )
    adapter: str | None = option("an adapter to load on top of model.path", example="<directory>", needs="model.path")
    accept: list[str] = option(
        "continue although the base model, or the run's documents, are not those of the training",
        default=[],
        example="[base,data]",
        choices=("base", "data"),
        aliases=("run.accept",),
    )
    to: str | None = option(
        "where to write evaluation.json, evaluation_rows.jsonl and evaluation.html; default: the run's directory",
        example="<directory>",
    )
    settings: list[str] = forwarded_settings()
    as_json: bool = flag("print the report as JSON instead of tables", key="--json")
    print_only: bool = flag("with launcher=slurm: print the job's script and submit nothing", key="--print")

    settings_for_other_run: list[str] = field(default_factory=list)
    """Settings that were typed with `against.` before them, which allow values of the other run. Without that prefix."""
    command: list[str] = field(default_factory=list)
    """The verb and all arguments as they were typed, for messages."""
    prefix: str = ""
    """What arguments that allow a value of this run begin with in `command`: `against.` for the other run of a comparison."""
    main_plan: Any = None
    """The main evaluation, if this one runs for its comparison (`against=`) and so has its tasks; None: this is the main one.

    An `EvaluationPlan`, whose file imports this one. The type of each field is looked up while arguments are read.
    """


def parse_evaluate_arguments(argv: list[str]) -> EvaluateArguments:
    """Read the command line of `shardtune evaluate`, and check which arguments go together.

    `evaluation.server=URL` becomes `evaluation.server.url=URL`. If another run is compared with (`against=runs/x`), arguments
    with `against.` before them allow what that run's settings reach out to (paths, addresses); they go to
    `settings_for_other_run`. Raises ConfigError with every problem.
    """
    from launch.config.read_run import split_allowing_arguments

    settings_for_other_run, argv_of_verb = split_allowing_arguments(argv, AGAINST_PREFIX)
    arguments, problems = read_arguments("evaluate", EvaluateArguments, argv_of_verb)
    arguments.settings_for_other_run = settings_for_other_run
    arguments.command = ["evaluate", *argv]
    for index, setting in enumerate(arguments.settings):
        if setting.startswith(f"{SERVER_GROUP}="):  # short for `evaluation.server.url=`
            arguments.settings[index] = setting.replace(SERVER_GROUP, f"{SERVER_GROUP}.url", 1)
    problems += _conflicts(arguments)
    if problems:
        raise ConfigError(problems)
    return arguments


def _conflicts(arguments: EvaluateArguments) -> list[str]:
    """Problems with arguments that do not go together, such as a run beside `model.path`, or that name nothing to evaluate."""
    problems: list[str] = []
    # What is evaluated: either a run or model.path=, and a server only with model.path=.
    model_arguments = [setting for setting in arguments.settings if setting.startswith("model.path=")]
    asks_server = any(setting.startswith(SERVER_GROUP) for setting in arguments.settings)
    if arguments.run is None and not model_arguments:
        problems.append("nothing to evaluate: give a run (shardtune evaluate runs/x) or model.path=<directory>")
    if arguments.run is not None and model_arguments:
        problems.append(f"{model_arguments[0]}: the run {arguments.run} has its model; give one of the two")
    if arguments.run is not None and asks_server:
        problems.append(
            f"{SERVER_GROUP}: a server answers for files that were exported; name them: model.path={arguments.run}/export"
        )
    # Other arguments that exclude each other.
    if asks_server and arguments.against is not None and not Path(arguments.against).expanduser().is_file():
        problems.append(
            f"against={arguments.against}: one server answers for one model; evaluate the other first, and give its "
            "evaluation.json"
        )
    if arguments.split == "test":
        problems += test_split_problems(arguments.against, arguments.settings)
    if arguments.adapter is not None and "data" in arguments.accept:
        problems.append(
            f"accept={arguments.text_by_key['accept']}: an adapter brings no documents of a run; write accept=[base]"
        )
    return problems
