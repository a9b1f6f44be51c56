"""Plans an evaluation: the configuration and the job that follow from its arguments, and what it is compared with."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from launch.config.output_directory import require_output_directory
from launch.evaluate.checks import check_evaluation, has_held_out
from strategies.errors import ConfigError
from strategies.small_files import read_json_object

if TYPE_CHECKING:
    from launch.config.outside_values import ValueNeedingConsent
    from trainer.config.run import RunConfig
    from trainer.evaluation.job import EvaluationJob
from launch.evaluate.arguments import AGAINST_PREFIX, EvaluateArguments

GROUPS_BESIDE_RUN = frozenset({"evaluation", "strategy", "parallel", "launcher", "run", "precision", "logging"})
"""Groups of settings that can be typed beside a run."""
UNUSED_SETTINGS = {"model.download", "export.answers", "challenges.forgetting.data"}
"""Settings that an evaluation of a run does without: a model that is in the cache needs no download."""
DEFAULT_TASKS = ("loss", "bits_per_byte", "token_accuracy")
"""Tasks of a language model's run if the user sets none."""


@dataclass(slots=True)
class EvaluationPlan:
    """An evaluation that was checked and can start: its configuration, its job, and what it is compared with."""

    config: RunConfig
    job: EvaluationJob
    plan_of_compared_model: EvaluationPlan | None = None
    """The evaluation of another model, which runs first so that this one can be compared with it."""

    @property
    def job_dir(self) -> Path:
        """The directory in which the ranks of this evaluation keep their records."""
        return Path(self.job.report_dir) / "evaluation"

    def compare_with(self, other: EvaluationPlan, name_in_report: str) -> None:
        """Set that the evaluation `other` runs first, and that this one is compared with its report, under that name."""
        from trainer.evaluation.report.record import REPORT_FILE

        self.plan_of_compared_model = other
        self.job = replace(self.job, report=str(Path(other.job.report_dir) / REPORT_FILE), against=name_in_report)


def plan_evaluation(evaluate_arguments: EvaluateArguments) -> EvaluationPlan:
    """Turn the arguments of `shardtune evaluate` into a plan, checked as far as possible without loading a model.

    Also plans the evaluation of the model that it is compared with, if any. The job (`EvaluationJob`) says what is evaluated
    beside the configuration: the checkpoint, the directory of the report, what is compared. Raises ConfigError for settings,
    and DataError for rows of its tasks, that cannot be used.
    """
    run = evaluate_arguments.run
    if run is not None:
        config, job = _plan_for_run(run, evaluate_arguments)
    else:
        config, job = _plan_for_model(evaluate_arguments)
    require_output_directory(Path(job.report_dir))
    job = replace(job, split=evaluate_arguments.split)
    evaluation_plan = EvaluationPlan(config, job)
    # Where the ranks keep their records: in `evaluation/` beside the report, and not among those of the run.
    config.run.dir = str(evaluation_plan.job_dir)
    _set_evaluation_defaults(config, evaluate_arguments)

    settings = evaluate_arguments.settings
    has_training_data = run is not None or any(text.startswith(("data.path=", "data.sources")) for text in settings)
    try:
        check_evaluation(config, settings, run=run, has_training_data=has_training_data, split=evaluate_arguments.split)
    # First name that the model is missing, since a mistyped path may cause all other problems.
    except ConfigError as error:
        raise ConfigError([*_missing_model_problem(config), *error.problems]) from None
    if evaluate_arguments.against is not None:
        _add_comparison(evaluation_plan, evaluate_arguments.against, evaluate_arguments)
    return evaluation_plan


def _plan_for_run(run: Path, evaluate_arguments: EvaluateArguments) -> tuple[RunConfig, EvaluationJob]:
    """Plan the evaluation of a run's checkpoint: returns the configuration and the job.

    The report goes to `to=`, or else into the run's directory. A run that may be somebody else's gets no files, and its
    metrics are not recorded in it; its report goes to runs/evaluate-<name of the run>. Raises ConfigError if there is no such
    checkpoint, or it may not be read.
    """
    from launch.config.read_run import may_write_results
    from trainer.evaluation.job import EvaluationJob

    evaluated = read_run_to_evaluate(run, evaluate_arguments)
    is_own_run = may_write_results(run)
    default_output_dir = run if is_own_run else Path("runs") / f"evaluate-{run.resolve().name}"
    job = EvaluationJob(
        report_dir=evaluate_arguments.to or str(default_output_dir),
        run=str(run),
        checkpoint=evaluated.checkpoint,
        # Tasks on the run's documents read its own data.
        data_run=str(run),
        accept_data="data" in evaluate_arguments.accept,
        accepted=evaluated.base_differences,
        recorded=is_own_run,
    )
    return evaluated.config, job


def _plan_for_model(evaluate_arguments: EvaluateArguments) -> tuple[RunConfig, EvaluationJob]:
    """Plan the evaluation of the model of `model.path=`, which belongs to no run: returns the configuration and the job.

    Errors: ConfigError.
    """
    from trainer.evaluation.job import EvaluationJob

    path = next(
        argument.partition("=")[2] for argument in evaluate_arguments.settings if argument.startswith("model.path=")
    )
    default_output_dir = Path("runs") / f"evaluate-{Path(path).name}"
    job = EvaluationJob(report_dir=evaluate_arguments.to or str(default_output_dir))
    # Checked before a stand-in file is written below it.
    require_output_directory(Path(job.report_dir))
    config = _config_of_model(evaluate_arguments, path, Path(job.report_dir) / "evaluation")
    if evaluate_arguments.adapter is not None:
        base_differences = _base_differences(
            evaluate_arguments.adapter, path, accept_other_base="base" in evaluate_arguments.accept
        )
        job = replace(job, accepted=base_differences)
    return config, job


def _base_differences(adapter: str, base: str, *, accept_other_base: bool) -> list[str]:
    """Check that an adapter is evaluated on its own base: returns how `base` differs, as lines for the report.

    Raises ConfigError if it differs and the user does not accept that. A model that is not on this machine is not compared,
    and gives []: it is refused later, with all else that is wrong.
    """
    from trainer.model.base_files import check_adapter_base
    from trainer.model.config import ModelConfig
    from trainer.model.loading import find_weights_directory

    try:
        directory = find_weights_directory(ModelConfig(path=base))
    except ConfigError:
        return []
    return check_adapter_base(Path(adapter).expanduser(), directory, accept=accept_other_base)


def _missing_model_problem(config: RunConfig) -> list[str]:
    """A problem if `model.path` does not exist here, since a mistyped path may be the reason for the other problems; else []."""
    path = config.model.path or ""
    if Path(path).expanduser().exists():
        return []
    return [
        f"model.path={path}: there is no such directory here; a hub id is right only if this machine has downloaded it"
    ]


class RunToEvaluate(NamedTuple):
    """What is evaluated of a run."""

    config: RunConfig
    """The run's configuration, with the settings of the command line on top."""
    checkpoint: str
    """Directory of the checkpoint."""
    base_differences: list[str]
    """How the base model differs from that of the training, as lines for the report; empty if it does not."""


def read_run_to_evaluate(run: Path, evaluate_arguments: EvaluateArguments) -> RunToEvaluate:
    """Read the configuration of a run, with the settings of the command line on top, and find the checkpoint to evaluate.

    Warns if checkpoint=best is no better than the model was before training.

    Raises ConfigError if there is no such run or checkpoint, if a setting cannot be used, or if the base model differs and the
    user does not accept that.
    """
    from launch.config.compose import recompose_frozen_config
    from launch.config.read_run import RunReader, read_run, use_trusted_reward_copies
    from launch.export.checkpoint_choice import find_checkpoint, warn_if_training_did_not_help
    from trainer.config.run import settled_matmul
    from trainer.session.base_files import pin_and_check_recorded_base

    if not (run / "config.yaml").is_file():
        raise ConfigError(_no_run_message(run))
    # The evaluation that this run is compared with (`against=`); None if this one is the main evaluation itself.
    main_plan = evaluate_arguments.main_plan

    def apply_settings_of_evaluation(run_config: RunConfig, overrides: list[str]) -> RunConfig:
        """Change the run's configuration into that of its evaluation, with the overrides of the command line."""
        run_config.run.dir = None
        run_config.run.resume = "auto"
        run_config.run.matmul = settled_matmul(run_config)
        use_trusted_reward_copies(run_config, run, evaluate_arguments.settings)
        if main_plan is not None:
            run_config.evaluation = copy.deepcopy(main_plan.config.evaluation)
        return recompose_frozen_config(run_config, overrides, GROUPS_BESIDE_RUN)

    # The run of `against=` gets the tasks of the main evaluation, whose values were checked there.
    settled_groups = frozenset[str]() if main_plan is None else frozenset({"evaluation"})
    reader = RunReader(
        evaluate_arguments.command,
        uses=partial(_is_used_by_evaluation, split=evaluate_arguments.split),
        prefix=evaluate_arguments.prefix,
        own_groups=GROUPS_BESIDE_RUN,
        settled_groups=settled_groups,
    )
    config = read_run(run, reader, evaluate_arguments.settings, apply_settings_of_evaluation)
    checkpoint = find_checkpoint(run, evaluate_arguments.checkpoint, config.checkpoint)
    if evaluate_arguments.checkpoint == "best":
        warn_if_training_did_not_help(run, checkpoint, config)
    base_differences = pin_and_check_recorded_base(
        config,
        run,
        evaluate_arguments.accept,
        with_teacher=True,
        needs_initial_model=evaluate_arguments.against == "base",
    )
    return RunToEvaluate(config, str(checkpoint), base_differences)


def _no_run_message(directory: Path) -> str:
    """The error for a first argument that is no run directory, with what to type in its place.

    An exported adapter is evaluated with its base: "exp0: an adapter, not a run directory; give its base too:
    model.path=models/a adapter=exp0". Raises ConfigError if the adapter's settings cannot be read.
    """
    adapter_settings_file = directory / "adapter_config.json"
    if adapter_settings_file.is_file():
        # Only a hint: the base may have moved since the export.
        base = read_json_object(adapter_settings_file).get("base_model_name_or_path") or "<its base>"
        return f"{directory}: an adapter, not a run directory; give its base too: model.path={base} adapter={directory}"
    what = "not a run directory (it has no config.yaml)" if directory.exists() else "there is no such directory"
    return f"{directory}: {what}; name a run, or a model with model.path={directory}"


def _is_used_by_evaluation(value: ValueNeedingConsent, config: RunConfig, *, split: str = "eval") -> bool:
    """Whether an evaluation uses a saved setting of a run that reaches out of it: a path, an address or a tracker.

    Somebody else may have written these settings: the user must allow what is used, and what is not used is left out.
    `value.settings`: the keys that have this value. The first case that fits decides:
    - rewards: only without tasks, since the rewards themselves are tried then;
    - the judge: if a task asks it, or test answers are scored by rewards;
    - a tracker, or settings in `UNUSED_SETTINGS`: no;
    - access to remote data, the data cache, streaming: if the run's rows are read (remote data: also if a task's path is
      there);
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
    """A configuration that evaluates the model at `path`, which belongs to no run and so has no settings.

    Its objective follows from the model's config.json if the user sets none: classification, seq2seq, or the default for a
    causal language model. Every configuration needs training data, so if none is named, a stand-in file is written into
    `directory`.
    """
    from launch.config.compose import compose_config
    from trainer.model.rules import read_config as read_model_config
    from trainer.reporting.status import write_text_atomic

    model_config = read_model_config(path) or {}
    # None for a model without a classification head; [] if its labels have no names.
    labels = _labels_of_classifier(model_config)
    # A run needs a budget, though nothing is trained.
    arguments = ["budget.steps=1", *evaluate_arguments.settings]
    if not any(argument.startswith("objective=") for argument in arguments):
        if labels is not None:
            arguments.append("objective=classification")
        elif model_config.get("is_encoder_decoder"):
            arguments.append("objective=seq2seq")
    if evaluate_arguments.adapter is not None:
        arguments.append(f"model.adapters=[{evaluate_arguments.adapter}]")

    config = compose_config(arguments, check=False).config
    has_unset_labels = hasattr(config.objective, "labels") and config.objective.labels is None
    if labels and has_unset_labels:
        config.objective.labels = labels  # type: ignore[attr-defined]
    if config.data.path is None and not config.data.sources:
        stand_in_file = directory / "stand_in.jsonl"
        write_text_atomic(stand_in_file, _stand_in_rows_text(labels or []))
        config.data.path = str(stand_in_file)
    return config


def _labels_of_classifier(model_config: dict[str, Any]) -> list[str] | None:
    """The names of a classifier's labels by its config.json, in the order of their ids; [] if it has no names.

    None for a model without a classification head.
    """
    architectures = model_config.get("architectures") or ()
    if not any(str(name).endswith("ForSequenceClassification") for name in architectures):
        return None
    label_by_id = model_config.get("id2label") or {}
    return [label_by_id[key] for key in sorted(label_by_id, key=int)]


def _stand_in_rows_text(labels: list[str]) -> str:
    """Rows that stand in for training data, as lines of JSON: a labelled text for each label, or a prompt and an answer."""
    rows = [{"text": "a text", "label": label} for label in labels]
    if not rows:
        rows = [{"source": "a text", "target": "another"}]
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def _set_evaluation_defaults(config: RunConfig, evaluate_arguments: EvaluateArguments) -> None:
    """Change the settings of a run into those of its evaluation, in place.

    Sets strategy and parallelism, unless the user has set them; turns off what is only done in training; and chooses tasks if
    none are set. With split=test there are no tasks, because the run's own objective measures the test documents.
    """
    from launch.config.compose import world_size_of
    from strategies.base import Precision
    from trainer.config.run import Device
    from trainer.evaluation.base import TaskConfig
    from trainer.evaluation.tasks.prepared import TaskContext

    # The ranks that the settings ask for; unknown counts as one.
    world_size = world_size_of(config) or 1
    _set_strategy_for_evaluation(config, world_size, evaluate_arguments.settings)
    _turn_off_training(config, world_size)
    if evaluate_arguments.split == "test":
        config.evaluation.tasks = {}
        return
    # Not with split=test, where the run's own objective measures: answers and precision are those of its evaluations.
    config.evaluation.generate.samples = 0
    # A CPU cannot compute in fp16.
    if config.run.device is Device.cpu and config.precision is Precision.fp16:
        config.precision = Precision.fp32
    if not config.evaluation.tasks and has_held_out(config):
        context = TaskContext.from_settings(config.data, config.objective)
        if context.is_language_model:
            config.evaluation.tasks = {kind: TaskConfig(kind=kind) for kind in DEFAULT_TASKS}


def _set_strategy_for_evaluation(config: RunConfig, world_size: int, cli_settings: list[str]) -> None:
    """Set a strategy and parallel settings that fit `world_size` ranks, in place; the run may have trained on many more.

    What the user has set on the command line (`cli_settings`) stays.
    """
    from strategies.base import DdpConfig, SingleConfig
    from trainer.config.parallel import parallel_for_evaluation
    from trainer.config.sharding import num_replicas_of
    from trainer.model.quantised_checkpoints import quantising_library

    is_strategy_set_by_user = any(setting.startswith(("strategy=", "strategy.")) for setting in cli_settings)
    if world_size == 1 and not is_strategy_set_by_user:
        config.strategy = SingleConfig()
    elif quantising_library(config.model.path) is not None and not is_strategy_set_by_user:
        # A quantised model cannot be sharded.
        config.strategy = DdpConfig()

    is_parallel_set_by_user = any(setting.startswith("parallel.") for setting in cli_settings)
    if not is_parallel_set_by_user:
        ranks_per_replica = max(1, world_size // num_replicas_of(config.strategy, config))
        config.parallel = parallel_for_evaluation(config.parallel, config.strategy, ranks_per_replica)


def _turn_off_training(config: RunConfig, world_size: int) -> None:
    """Turn off what belongs to training, in place: export, early stopping, detectors (`challenges`), large batches.

    The watched metric becomes the loss, which every objective has, since the run's own may be of a task that is not asked now.
    """
    from trainer.export.config import ExportedCheckpoint
    from trainer.monitors.config import ChallengesConfig

    # The batch of a run with rewards counts answers, in whole groups of `group_size`.
    group_size = getattr(config.objective, "group_size", 1)
    config.batch = {"global": world_size * group_size, "micro": 1}
    config.export.at_end = False
    config.export.checkpoint = ExportedCheckpoint.last
    config.evaluation.watch = "eval/loss"
    config.evaluation.greater_is_better = None
    config.evaluation.every_steps = 0
    config.evaluation.patience = 0
    config.challenges = ChallengesConfig()


def _add_comparison(evaluation_plan: EvaluationPlan, against: str, evaluate_arguments: EvaluateArguments) -> None:
    """Plan what the evaluation is compared with, by the value of `against`: sets `plan_of_compared_model` and fields of `job`.

    - "base" for a run: its base model is evaluated in the same process;
    - "base" for a model with an adapter: the model without it is evaluated first;
    - a file: an earlier report (evaluation.json); a metric that got worse makes the exit code 69;
    - the directory of a run or a model: it is evaluated first;
    - anything else, also the report that this evaluation writes itself: ConfigError.
    """
    from trainer.evaluation.report.record import REPORT_FILE, read_report

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
        evaluation_plan.compare_with(_plan_of_compared_model(evaluation_plan, base_config), "base")
    elif path.is_file():
        own_report = Path(job.report_dir) / REPORT_FILE
        if path.resolve() == own_report.resolve():
            raise ConfigError(
                f"against={against}: is the report that this evaluation writes; give to=<another directory>, or keep a copy of "
                "the old one in a directory of its own"
            )
        # Refuses a file that is no report.
        read_report(path)
        evaluation_plan.job = replace(job, report=str(path), gate=True, against=against)
    elif (path / "config.yaml").is_file():
        run_plan = plan_evaluation(_other_run_arguments(path, evaluation_plan, evaluate_arguments))
        run_plan.config.evaluation = copy.deepcopy(evaluation_plan.config.evaluation)
        run_plan.job = replace(run_plan.job, is_opponent=True)
        evaluation_plan.compare_with(run_plan, against)
    elif (path / "config.json").is_file():
        from trainer.model.config import ModelConfig
        from trainer.tuning.base import FullConfig

        model = ModelConfig(path=str(path), download=False)
        model_config = replace(copy.deepcopy(evaluation_plan.config), model=model, tuning=FullConfig())
        evaluation_plan.compare_with(_plan_of_compared_model(evaluation_plan, model_config), against)
    else:
        what = "is neither a run, a model nor a report" if path.exists() else "there is no such file or directory"
        raise ConfigError(
            f"against={against}: {what}; it can be base, the directory of a run or of a model, or the {REPORT_FILE} of an "
            "evaluation"
        )


def _plan_of_compared_model(main_plan: EvaluationPlan, config: RunConfig) -> EvaluationPlan:
    """Plan the evaluation of the other model of a comparison, that of `config`: the same as `main_plan`, on the same rows.

    It is asked first, and has no opponent of its own: tasks that compare the answers of two models wait for the main
    evaluation.
    """
    from trainer.evaluation.job import EvaluationJob

    other_job = EvaluationJob(
        report_dir=str(Path(main_plan.job.report_dir) / "against"),
        data_run=main_plan.job.data_run,
        accept_data=main_plan.job.accept_data,
        is_opponent=True,
    )
    plan = EvaluationPlan(copy.deepcopy(config), other_job)
    plan.config.run.dir = str(plan.job_dir)
    return plan


def _other_run_arguments(
    run: Path, main_plan: EvaluationPlan, evaluate_arguments: EvaluateArguments
) -> EvaluateArguments:
    """The arguments that evaluate the run of `against=`, with the processes, device, strategy and tasks of `main_plan`.

    Messages name the arguments that allow values of that run with `against.` before them, as the user must type them.
    """
    config = main_plan.config
    settings = [
        f"launcher.processes={config.launcher.processes}",
        f"run.device={config.run.device}",
        f"strategy={config.strategy.name}",
        *evaluate_arguments.settings_for_other_run,
    ]
    return EvaluateArguments(
        run=run,
        to=str(Path(main_plan.job.report_dir) / "against"),
        accept=evaluate_arguments.accept,
        settings=settings,
        command=evaluate_arguments.command,
        prefix=AGAINST_PREFIX,
        # Its tasks are those of the main evaluation.
        main_plan=main_plan,
    )
