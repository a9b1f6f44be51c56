"""The arguments of `shardtune evaluate`, and the configuration and job that follow from them."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config.verb_arguments import VerbArguments, flag, forwarded_settings, option, positional, read_arguments
from launch.evaluate.checks import check_plan, has_held_out, problems_of_test
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.config.outside_values import OutsideValue
    from trainer.config.run import RunConfig
    from trainer.evaluate import EvaluationJob

GROUPS_BESIDE_RUN = frozenset({"evaluation", "strategy", "parallel", "launcher", "run", "precision", "logging"})
"""Groups of settings that can be typed beside a run."""
AGAINST_PREFIX = "against."
"""Before a setting: it allows what the run of `against=` reaches out to."""
SERVER_GROUP = "evaluation.server"
"""The group whose address may be typed without `.url`."""
UNUSED_SETTINGS = {"model.download", "export.answers", "challenges.forgetting.data"}
"""Settings that an evaluation of a run does without: a model that is in the cache needs no download."""
DEFAULT_TASKS = ("loss", "bits_per_byte", "token_accuracy")
"""Tasks of a language model's run if the user sets none."""


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

    allowing: list[str] = field(default_factory=list)
    """Settings typed with `against.` before them: they allow what the other run reaches out to."""
    command: list[str] = field(default_factory=list)
    """All arguments as they were typed, the verb first, for messages."""
    prefix: str = ""
    """The prefix of words in `command` that allow something for this run."""
    main_plan: EvaluationPlan | None = None
    """The main evaluation, if this one runs for its comparison (`against=`) and so has its tasks; None: this is the main one."""


@dataclass(slots=True)
class EvaluationPlan:
    """An evaluation that was checked and can start: its configuration, its job, and what it is compared with."""

    config: RunConfig
    job: EvaluationJob
    other_plan: EvaluationPlan | None = None
    """The evaluation of another model, which runs first so that this one can be compared with it."""

    @property
    def directory(self) -> Path:
        """The directory in which the ranks of this evaluation keep their records."""
        return Path(self.job.to) / "evaluation"


def parse_arguments(argv: list[str]) -> EvaluateArguments:
    """Read the command line of `shardtune evaluate`, and check which arguments go together.

    `evaluation.server=URL` becomes `evaluation.server.url=URL`; arguments with `against.` before them go to `allowing`.
    Errors: ConfigError with every problem.
    """
    from launch.config.read_run import split_allowing_arguments

    allowing, argv_of_verb = split_allowing_arguments(argv, AGAINST_PREFIX)
    arguments, problems = read_arguments("evaluate", EvaluateArguments, argv_of_verb)
    arguments.allowing = allowing
    arguments.command = ["evaluate", *argv]
    for index, setting in enumerate(arguments.settings):
        if setting.startswith(f"{SERVER_GROUP}="):  # short for `evaluation.server.url=`
            arguments.settings[index] = setting.replace(SERVER_GROUP, f"{SERVER_GROUP}.url", 1)
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
        problems += problems_of_test(arguments.against, arguments.settings)
    if arguments.adapter is not None and "data" in arguments.accept:
        problems.append(
            f"accept={arguments.text_by_key['accept']}: an adapter brings no documents of a run; write accept=[base]"
        )
    if problems:
        raise ConfigError(problems)
    return arguments


def make_plan(evaluate_arguments: EvaluateArguments) -> EvaluationPlan:
    """Plan an evaluation, and check it as far as possible without loading a model. Errors: ConfigError, DataError."""
    run = evaluate_arguments.run
    if run is not None:
        config, job = _plan_for_run(run, evaluate_arguments)
    else:
        config, job = _plan_for_model(evaluate_arguments)
    if Path(job.to).is_file():
        raise ConfigError(f"to={job.to}: is a file; name a directory")
    job = replace(job, split=evaluate_arguments.split)
    evaluation_plan = EvaluationPlan(config, job)
    config.run.dir = str(evaluation_plan.directory)
    _set_evaluation_defaults(config, evaluate_arguments)

    names_training_data = any(
        argument.startswith(("data.path=", "data.sources")) for argument in evaluate_arguments.settings
    )
    has_training_data = run is not None or names_training_data
    try:
        check_plan(
            config, evaluate_arguments.settings, run=run, trained=has_training_data, split=evaluate_arguments.split
        )
    except ConfigError as error:
        raise ConfigError([*_missing_model(config), *error.problems]) from None
    if evaluate_arguments.against is not None:
        _add_comparison(evaluation_plan, evaluate_arguments.against, evaluate_arguments)
    return evaluation_plan


def _plan_for_run(run: Path, evaluate_arguments: EvaluateArguments) -> tuple[RunConfig, EvaluationJob]:
    """The configuration and job that evaluate a checkpoint of a run. Errors: ConfigError."""
    from launch.config.read_run import may_write_results
    from trainer.evaluate import EvaluationJob

    config, checkpoint, accepted = config_of_run(run, evaluate_arguments)
    # A run that may be somebody else's gets no files, and its metrics are not recorded in it.
    is_own_run = may_write_results(run)
    default_directory = run if is_own_run else Path("runs") / f"evaluate-{run.resolve().name}"
    job = EvaluationJob(
        to=evaluate_arguments.to or str(default_directory),
        run=str(run),
        checkpoint=checkpoint,
        data_run=str(run),
        accept_data="data" in evaluate_arguments.accept,
        accepted=accepted,
        recorded=is_own_run,
    )
    return config, job


def _plan_for_model(evaluate_arguments: EvaluateArguments) -> tuple[RunConfig, EvaluationJob]:
    """The configuration and job that evaluate the model of `model.path=`, which belongs to no run. Errors: ConfigError."""
    from trainer.evaluate import EvaluationJob

    path = next(
        argument.partition("=")[2] for argument in evaluate_arguments.settings if argument.startswith("model.path=")
    )
    default_directory = Path("runs") / f"evaluate-{Path(path).name}"
    job = EvaluationJob(to=evaluate_arguments.to or str(default_directory))
    config = _config_of_model(evaluate_arguments, path, Path(job.to) / "evaluation")
    if evaluate_arguments.adapter is not None:
        accepted = _accepted_base(evaluate_arguments.adapter, path, accept="base" in evaluate_arguments.accept)
        job = replace(job, accepted=accepted)
    return config, job


def _accepted_base(adapter: str, base: str, *, accept: bool) -> list[str]:
    """How the base model of an adapter differs from the one that it was trained on, as lines for the report.

    Errors: ConfigError if it differs and `accept` is not set.
    """
    from trainer.model.base_files import refuse_another_base
    from trainer.model.config import ModelConfig
    from trainer.model.loading import weights_directory

    try:
        directory = weights_directory(ModelConfig(path=base))
    except ConfigError:
        return []  # it is not on this machine, which is told with all else that is wrong
    return refuse_another_base(Path(adapter).expanduser(), directory, accept=accept)


def _missing_model(config: RunConfig) -> list[str]:
    """A problem if `model.path` is no directory here: a mistyped path may be the reason for the other problems. Else empty."""
    path = config.model.path or ""
    if Path(path).expanduser().exists():
        return []
    return [
        f"model.path={path}: there is no such directory here; a hub id is right only if this machine has downloaded it"
    ]


def config_of_run(run: Path, evaluate_arguments: EvaluateArguments) -> tuple[RunConfig, str, list[str]]:
    """Read the configuration of a run, with the settings of the command line on top, and find the checkpoint to evaluate.

    Returns (configuration, the checkpoint's path, lines on how the base model differs from that of the training, as accepted).
    Errors: ConfigError.
    """
    from launch.config.compose import recompose
    from launch.config.read_run import RunReader, read_run, use_trusted_copies
    from launch.export.command import find_checkpoint, warn_if_base_was_better
    from trainer.config.run import settled_matmul
    from trainer.session.base_files import use_recorded_base

    if not (run / "config.yaml").is_file():
        what = "not a run directory (it has no config.yaml)" if run.exists() else "there is no such directory"
        raise ConfigError(f"{run}: {what}; name a run, or a model with model.path={run}")
    main_plan = evaluate_arguments.main_plan

    def with_own_overrides(frozen: RunConfig, arguments: list[str]) -> RunConfig:
        """The frozen configuration with settings of this evaluation on top; `arguments`: those of the command line."""
        frozen.run.dir = None
        frozen.run.resume = "auto"
        frozen.run.matmul = settled_matmul(frozen)
        use_trusted_copies(frozen, run, evaluate_arguments.settings)
        if main_plan is not None:
            frozen.evaluation = copy.deepcopy(main_plan.config.evaluation)
        return recompose(frozen, arguments, GROUPS_BESIDE_RUN)

    # The tasks of an evaluation that the main one is compared with are the main one's, which were checked there.
    settled_groups = frozenset[str]() if main_plan is None else frozenset({"evaluation"})
    reader = RunReader(
        evaluate_arguments.command,
        uses=partial(_is_used_by_evaluation, split=evaluate_arguments.split),
        prefix=evaluate_arguments.prefix,
        own_groups=GROUPS_BESIDE_RUN,
        settled_groups=settled_groups,
    )
    config = read_run(run, reader, evaluate_arguments.settings, with_own_overrides)
    checkpoint = find_checkpoint(run, evaluate_arguments.checkpoint, config.checkpoint)
    if evaluate_arguments.checkpoint == "best":
        warn_if_base_was_better(run, checkpoint, config)
    accepted = use_recorded_base(
        config, run, evaluate_arguments.accept, teacher=True, start=evaluate_arguments.against == "base"
    )
    return config, str(checkpoint), accepted


def _is_used_by_evaluation(value: OutsideValue, config: RunConfig, *, split: str = "eval") -> bool:
    """Whether an evaluation uses a value of a run that reaches out of it: a path, an address or a tracker (`RunReader.uses`).

    `value.settings`: the keys that have this value. The first case that fits decides:
    - rewards: only without tasks, since the rewards themselves are tried then;
    - the judge: if a task asks it, or test answers are scored by rewards;
    - a tracker, or settings in `UNUSED_SETTINGS`: no;
    - access to remote data, the data cache, streaming: if the run's rows are read (remote data: also if a task's path is there);
    - the NVMe directory: if the strategy offloads to it;
    - anything else: yes.
    """
    from strategies.settings import Reach
    from trainer.evaluation.tasks.registry import asks_judge, reads_rows_of_run

    # split=test runs no tasks: the test documents are measured by the run's own objective.
    tasks = {} if split == "test" else config.evaluation.tasks
    # The rows of a task's own file are few, and are prepared in the cache of the user who evaluates.
    reads_data = not tasks or any(reads_rows_of_run(task) for task in tasks.values())
    if any(key.startswith("objective.rewards.") for key in value.settings):
        return not tasks  # then the rewards themselves are tried
    if any(key.startswith("evaluation.judge.") for key in value.settings):
        scores_rewards = split == "test" and bool(getattr(config.objective, "rewards", {}))
        return scores_rewards or any(asks_judge(task) for task in tasks.values())
    if value.reach is Reach.tracker or UNUSED_SETTINGS & value.settings.keys():
        return False
    if "data.remote" in value.settings:
        return reads_data or any(str(task.path) in str(value.identity) for task in tasks.values() if task.path)
    if "data.cache_dir" in value.settings or "data.streaming" in value.settings:
        return reads_data
    if "strategy.nvme_path" in value.settings:
        strategy: Any = config.strategy
        return "nvme" in (strategy.offload_optimizer, strategy.offload_parameters)
    return True


def _config_of_model(evaluate_arguments: EvaluateArguments, path: str, directory: Path) -> RunConfig:
    """A configuration that evaluates the model at `path`, which has no run; its objective follows from the model's config.json.

    A configuration needs training data: if none is named, a stand-in file is written into `directory`. Errors: ConfigError.
    """
    from launch.config.compose import compose
    from trainer.model.rules import read_config
    from trainer.reporting.status import write_text_atomic

    model_config = read_config(path) or {}
    arguments = ["budget.steps=1", *evaluate_arguments.settings]
    # The objective: classification, seq2seq, or the default for a causal language model.
    architectures = model_config.get("architectures") or ()
    is_classifier = any(str(name).endswith("ForSequenceClassification") for name in architectures)
    labels: list[str] = []  # names of the classes, in the order of their ids
    if is_classifier:
        label_by_id = model_config.get("id2label") or {}
        labels = [label_by_id[key] for key in sorted(label_by_id, key=int)]
    if not any(argument.startswith("objective=") for argument in arguments):
        if is_classifier:
            arguments.append("objective=classification")
        elif model_config.get("is_encoder_decoder"):
            arguments.append("objective=seq2seq")
    if evaluate_arguments.adapter is not None:
        arguments.append(f"model.adapters=[{evaluate_arguments.adapter}]")

    config = compose(arguments, check=False).config
    # getattr's 0: an objective without `labels`. None: it has them, and none are set.
    if labels and getattr(config.objective, "labels", 0) is None:
        config.objective.labels = labels  # type: ignore[attr-defined]
    if config.data.path is None and not config.data.sources:
        rows = [{"text": "a text", "label": label} for label in labels]
        if not rows:
            rows = [{"source": "a text", "target": "another"}]
        stand_in = directory / "stand_in.jsonl"
        write_text_atomic(stand_in, "".join(f"{json.dumps(row)}\n" for row in rows))
        config.data.path = str(stand_in)
    return config


def _set_evaluation_defaults(config: RunConfig, evaluate_arguments: EvaluateArguments) -> None:
    """Overwrite settings of `config` that do not matter in an evaluation, and choose tasks if none are set.

    With split=test no task is chosen: it runs none.
    """
    from launch.config.compose import world_size_of
    from strategies.base import DdpConfig, Precision, SingleConfig
    from trainer.config.parallel import parallel_for_evaluation
    from trainer.config.run import Device
    from trainer.config.sharding import number_of_replicas
    from trainer.evaluation.base import TaskConfig
    from trainer.evaluation.tasks.prepared import TaskContext
    from trainer.export.config import ExportedCheckpoint
    from trainer.model.quantised_checkpoints import quantising_library
    from trainer.monitors.config import ChallengesConfig

    # Strategy and parallel settings: those of the command line, else what fits the number of ranks.
    ranks = world_size_of(config) or 1
    strategy_was_typed = any(
        argument.startswith(("strategy=", "strategy.")) for argument in evaluate_arguments.settings
    )
    if ranks == 1 and not strategy_was_typed:
        config.strategy = SingleConfig()
    elif quantising_library(config.model.path) is not None and not strategy_was_typed:
        config.strategy = DdpConfig()  # a quantised model cannot be sharded

    if not any(argument.startswith("parallel.") for argument in evaluate_arguments.settings):
        ranks_of_replica = max(1, ranks // number_of_replicas(config.strategy, config))
        config.parallel = parallel_for_evaluation(config.parallel, config.strategy, ranks_of_replica)

    # Nothing is trained, monitored or exported. A batch of a run with rewards counts answers, in whole groups.
    config.batch = {"global": ranks * getattr(config.objective, "group_size", 1), "micro": 1}
    config.export.at_end = False
    config.export.checkpoint = ExportedCheckpoint.last
    config.evaluation.watch = "eval/loss"
    config.evaluation.greater_is_better = None
    config.evaluation.every_steps = 0
    config.evaluation.patience = 0
    if evaluate_arguments.split == "test":  # answers are scored as the run scored them
        config.evaluation.tasks = {}
        config.challenges = ChallengesConfig()
        return
    config.evaluation.generate.samples = 0
    config.challenges = ChallengesConfig()
    if config.run.device is Device.cpu and config.precision is Precision.fp16:
        config.precision = Precision.fp32

    if not config.evaluation.tasks and has_held_out(config):
        context = TaskContext.from_settings(config.data, config.objective)
        if context.is_language_model:
            config.evaluation.tasks = {kind: TaskConfig(kind=kind) for kind in DEFAULT_TASKS}


def _add_comparison(evaluation_plan: EvaluationPlan, against: str, evaluate_arguments: EvaluateArguments) -> None:
    """Add to the plan what it is compared with, by `against`: one of these cases.

    - "base" for a run: its base model is evaluated in the same process;
    - "base" for a model with an adapter: the model without it is evaluated first;
    - a file: an earlier report (evaluation.json), and a metric that got worse makes the exit code 69;
    - the directory of a run or a model: it is evaluated first.
    Errors: ConfigError if `against` is none of them, or the report that this evaluation writes.
    """
    from trainer.evaluation.report.record import REPORT, read_report

    job = evaluation_plan.job
    path = Path(against).expanduser()
    if against == "base":
        if job.run is None and not evaluation_plan.config.model.adapters:
            raise ConfigError(
                "against=base: a model as it is has no base to compare with; add adapter=..., or name a run"
            )
        if job.run is not None:  # its base is evaluated in the same process
            evaluation_plan.job = replace(job, base=True, against="base")
            return
        model_without_adapters = replace(evaluation_plan.config.model, adapters=[])
        base_config = replace(evaluation_plan.config, model=model_without_adapters)
        evaluation_plan.other_plan = _other_model_plan(evaluation_plan, base_config, "base")
    elif path.is_file():
        own_report = Path(job.to) / REPORT
        if path.resolve() == own_report.resolve():
            raise ConfigError(
                f"against={against}: is the report that this evaluation writes; give to=<another directory>, or keep a copy of "
                "the old one in a directory of its own"
            )
        read_report(path, "against")
        evaluation_plan.job = replace(job, report=str(path), gate=True, against=against)
    elif (path / "config.yaml").is_file():
        run_plan = make_plan(_other_run_arguments(path, evaluation_plan, evaluate_arguments))
        evaluation_plan.other_plan = replace_evaluation(run_plan, evaluation_plan)
        evaluation_plan.job = replace(job, report=str(Path(run_plan.job.to) / REPORT), against=against)
    elif (path / "config.json").is_file():
        from trainer.model.config import ModelConfig
        from trainer.tuning.base import FullConfig

        model = ModelConfig(path=str(path), download=False)
        model_config = replace(copy.deepcopy(evaluation_plan.config), model=model, tuning=FullConfig())
        evaluation_plan.other_plan = _other_model_plan(evaluation_plan, model_config, against)
    else:
        what = "is neither a run, a model nor a report" if path.exists() else "there is no such file or directory"
        raise ConfigError(
            f"against={against}: {what}; it can be base, the directory of a run or of a model, or the {REPORT} of an evaluation"
        )


def _other_model_plan(evaluation_plan: EvaluationPlan, config: RunConfig, what: str) -> EvaluationPlan:
    """Plan the same evaluation, on the same rows, for another model, `config`'s; sets `evaluation_plan` to be compared with it.

    `what`: the other model's name in the report.
    """
    from trainer.evaluate import EvaluationJob
    from trainer.evaluation.report.record import REPORT

    job = evaluation_plan.job
    other_directory = Path(job.to) / "against"
    other_job = EvaluationJob(
        to=str(other_directory), data_run=job.data_run, accept_data=job.accept_data, asked_first=True
    )
    other_plan = EvaluationPlan(copy.deepcopy(config), other_job)
    other_plan.config.run.dir = str(other_plan.directory)
    evaluation_plan.job = replace(job, report=str(other_directory / REPORT), against=what)
    return other_plan


def _other_run_arguments(
    run: Path, evaluation_plan: EvaluationPlan, evaluate_arguments: EvaluateArguments
) -> EvaluateArguments:
    """Arguments that evaluate the run of `against=`: this evaluation's processes and strategy, and what was allowed for it."""
    config = evaluation_plan.config
    arguments = [f"launcher.processes={config.launcher.processes}", f"run.device={config.run.device}"]
    arguments += [f"strategy={config.strategy.name}", *evaluate_arguments.allowing]
    return EvaluateArguments(
        run=run,
        to=str(Path(evaluation_plan.job.to) / "against"),
        accept=evaluate_arguments.accept,
        settings=arguments,
        command=evaluate_arguments.command,
        prefix=AGAINST_PREFIX,
        main_plan=evaluation_plan,
    )


def replace_evaluation(other_plan: EvaluationPlan, evaluation_plan: EvaluationPlan) -> EvaluationPlan:
    """Give the plan of the run in `against=` the tasks of this evaluation; returns it."""
    other_plan.config.evaluation = copy.deepcopy(evaluation_plan.config.evaluation)
    other_plan.job = replace(other_plan.job, asked_first=True)
    return other_plan
