"""The words of `shardtune evaluate`, and the configuration and job that follow from them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launch.config.verb_words import VerbWords, bare_word, flag, read_words, setting_words, word
from strategies.errors import ConfigError, key_of_problem

if TYPE_CHECKING:
    from launch.config.outside_values import OutsideValue
    from trainer.config.run import RunConfig
    from trainer.evaluate import EvaluationJob

ALLOWED = frozenset({"evaluation", "strategy", "launcher", "run", "precision", "logging"})
"""Groups of settings that can be typed beside a run."""
AGAINST = "against."
"""Before a setting: it allows what the run of `against=` reaches out to."""
SERVER = "evaluation.server"
"""The group whose address may be typed without `.url`."""
UNUSED = {"model.download", "export.answers", "challenges.forgetting.data"}
"""Settings that an evaluation of a run does without: a model that is in the cache needs no download."""
PLAIN = ("loss", "bits_per_byte", "token_accuracy")
"""Tasks of a language model's run if the user sets none."""


@dataclass(kw_only=True)
class EvaluateWords(VerbWords):
    """What `shardtune evaluate` takes."""

    run: Path | None = bare_word("one run is evaluated at a time; name another as against=<run>", required=False)
    against: str | None = word(
        "what to compare with: base (the run's model before training), the directory of a run or model, or an "
        "evaluation.json; with an evaluation.json, the exit code is 69 if a metric got worse by more than its limit or "
        "its interval",
        like="base",
    )
    checkpoint: str = word("which checkpoint: last, best or a step", default="last", needs="run.dir")
    adapter: str | None = word("an adapter to load on top of model.path", like="<directory>", needs="model.path")
    accept: list[str] = word(
        "continue although the base model, or the run's documents, are not those of the training",
        default=[],
        like="[base,data]",
        choices=("base", "data"),
        also=("run.accept",),
    )
    to: str | None = word(
        "where to write evaluation.json, evaluation_rows.jsonl and evaluation.html; default: the run's directory",
        like="<directory>",
    )
    settings: list[str] = setting_words()
    as_json: bool = flag("print the report as JSON instead of tables", key="--json")
    print_only: bool = flag("with launcher=slurm: print the job's script and submit nothing", key="--print")

    allowing: list[str] = field(default_factory=list)
    """Settings typed with `against.` before them: they allow what the other run reaches out to."""
    command: list[str] = field(default_factory=list)
    """All words as they were typed, the verb first, for messages."""
    prefix: str = ""
    """The prefix of words in `command` that allow something for this run."""
    compared_with: EvaluationPlan | None = None
    """The main evaluation, if this one runs for its comparison (`against=`) and so has its tasks; None: this is the main one."""


@dataclass(slots=True)
class EvaluationPlan:
    """A checked configuration and job of an evaluation."""

    config: RunConfig
    job: EvaluationJob
    other_plan: EvaluationPlan | None = None
    """An evaluation that runs first, to be compared with."""

    @property
    def directory(self) -> Path:
        """Directory for the records of the processes."""
        return Path(self.job.to) / "evaluation"


def parse_words(argv: list[str]) -> EvaluateWords:
    """The words of the command line. Errors: ConfigError with every problem."""
    from launch.config.read_run import take_words

    allowing, argv_of_verb = take_words(argv, AGAINST)
    words, problems = read_words("evaluate", EvaluateWords, argv_of_verb)
    words.allowing = allowing
    words.command = ["evaluate", *argv]
    # `evaluation.server=URL` is short for `evaluation.server.url=URL`.
    words.settings = [_with_full_server_key(setting) for setting in words.settings]
    model = next((setting for setting in words.settings if setting.startswith("model.path=")), None)
    asks_server = any(setting.startswith(SERVER) for setting in words.settings)
    if words.run is None and model is None:
        problems.append("nothing to evaluate: give a run (shardtune evaluate runs/x) or model.path=<directory>")
    if words.run is not None and model is not None:
        problems.append(f"{model}: the run {words.run} has its model; give one of the two")
    if words.run is not None and asks_server:
        problems.append(
            f"{SERVER}: a server answers for files that were exported; name them: model.path={words.run}/export"
        )
    if asks_server and words.against is not None and not Path(words.against).expanduser().is_file():
        problems.append(
            f"against={words.against}: one server answers for one model; evaluate the other first, and give its evaluation.json"
        )
    if words.adapter is not None and "data" in words.accept:
        problems.append(f"accept={words.typed['accept']}: an adapter brings no documents of a run; write accept=[base]")
    if problems:
        raise ConfigError(problems)
    return words


def _with_full_server_key(setting: str) -> str:
    if setting.startswith(f"{SERVER}="):
        return setting.replace(SERVER, f"{SERVER}.url", 1)
    return setting


def make_plan(evaluate_words: EvaluateWords) -> EvaluationPlan:
    """The plan of an evaluation, checked as far as possible without a model. Errors: ConfigError, DataError."""
    from launch.config.read_run import is_own
    from trainer.evaluate import EvaluationJob

    to = evaluate_words.to
    if evaluate_words.run is not None:
        config, checkpoint, accepted = _config_of_run(evaluate_words.run, evaluate_words)
        own = is_own(evaluate_words.run)
        job = EvaluationJob(
            to=to or str(evaluate_words.run if own else Path("runs") / f"evaluate-{evaluate_words.run.resolve().name}"),
            run=str(evaluate_words.run),
            checkpoint=checkpoint,
            data_run=str(evaluate_words.run),
            accept_data="data" in evaluate_words.accept,
            accepted=accepted,
            recorded=own,
        )
    else:
        path = next(word.partition("=")[2] for word in evaluate_words.settings if word.startswith("model.path="))
        job = EvaluationJob(to=to or str(Path("runs") / f"evaluate-{Path(path).name}"))
        config = _config_of_model(evaluate_words, path, Path(job.to) / "evaluation")
        if evaluate_words.adapter is not None:
            job = replace(
                job, accepted=_accepted_base(evaluate_words.adapter, path, accept="base" in evaluate_words.accept)
            )
    if (Path(job.to)).is_file():
        raise ConfigError(f"to={job.to}: is a file; name a directory")
    evaluation_plan = EvaluationPlan(config, job)
    config.run.dir = str(evaluation_plan.directory)
    _set_evaluation_defaults(config, evaluate_words)
    of_run = evaluate_words.run is not None
    has_training_data = any(word.startswith(("data.path=", "data.sources")) for word in evaluate_words.settings)
    try:
        _check(config, evaluate_words.settings, trained=of_run or has_training_data, run=evaluate_words.run)
    except ConfigError as error:
        raise ConfigError([*_missing_model(config), *error.problems]) from None
    if evaluate_words.against is not None:
        _add_comparison(evaluation_plan, evaluate_words.against, evaluate_words)
    return evaluation_plan


def _accepted_base(adapter: str, base: str, *, accept: bool) -> list[str]:
    """How the base beside an adapter differs from that of its training, if that is accepted. Errors: ConfigError."""
    from trainer.model.base_files import refuse_another_base
    from trainer.model.config import ModelConfig
    from trainer.model.loading import weights_directory

    try:
        directory = weights_directory(ModelConfig(path=base))
    except ConfigError:
        return []  # it is not on this machine, which is told with all else that is wrong
    return refuse_another_base(Path(adapter).expanduser(), directory, accept=accept)


def _missing_model(config: RunConfig) -> list[str]:
    """A line about a model that is no directory here: with other problems it may be the first one, a mistyped path."""
    path = config.model.path or ""
    if Path(path).expanduser().exists():
        return []
    return [
        f"model.path={path}: there is no such directory here; a hub id is right only if this machine has downloaded it"
    ]


def _config_of_run(run: Path, evaluate_words: EvaluateWords) -> tuple[RunConfig, str, list[str]]:
    """The run's configuration with the words on top, the checkpoint, and how the base differs if that is accepted."""
    from launch.config.compose import recompose
    from launch.config.read_run import ReadingVerb, read_run
    from launch.export.command import find_checkpoint, tell_if_base_was_better
    from trainer.config.run import kept_matmul
    from trainer.session.base_files import use_recorded_base

    if not (run / "config.yaml").is_file():
        what = "not a run directory (it has no config.yaml)" if run.exists() else "there is no such directory"
        raise ConfigError(f"{run}: {what}; name a run, or a model with model.path={run}")

    def with_own_words(frozen: RunConfig, words: list[str]) -> RunConfig:
        frozen.run.dir = None
        frozen.run.resume = "auto"
        frozen.run.matmul = kept_matmul(frozen)
        if evaluate_words.compared_with is not None:
            frozen.evaluation = copy.deepcopy(evaluate_words.compared_with.config.evaluation)
        return recompose(frozen, words, ALLOWED)

    # The tasks of an evaluation that another one is compared with are that one's.
    settled = frozenset[str]() if evaluate_words.compared_with is None else frozenset({"evaluation"})
    verb = ReadingVerb(evaluate_words.command, _needs, evaluate_words.prefix, ALLOWED, settled)
    config = read_run(run, verb, evaluate_words.settings, with_own_words)
    checkpoint = find_checkpoint(run, evaluate_words.checkpoint, config.checkpoint)
    if evaluate_words.checkpoint == "best":
        tell_if_base_was_better(run, checkpoint, config)
    accepted = use_recorded_base(
        config, run, evaluate_words.accept, teacher=True, start=evaluate_words.against == "base"
    )
    return config, str(checkpoint), accepted


def _needs(value: OutsideValue, config: RunConfig) -> bool:
    """Whether an evaluation uses a setting of the run that refers to something outside it (a path, an address, a tracker)."""
    from strategies.settings import Reach
    from trainer.evaluation.tasks.registry import asks_judge, reads_rows_of_run

    tasks = config.evaluation.tasks
    # The rows of a task's own file are few, and are prepared in the reader's cache.
    reads_data = not tasks or any(reads_rows_of_run(task) for task in tasks.values())
    if any(key.startswith("evaluation.judge.") for key in value.settings):
        return any(asks_judge(task) for task in tasks.values())
    if value.reach is Reach.tracker or UNUSED & value.settings.keys():
        return False
    if "data.remote" in value.settings:
        return reads_data or any(str(task.path) in str(value.identity) for task in tasks.values() if task.path)
    if "data.cache_dir" in value.settings or "data.streaming" in value.settings:
        return reads_data
    if "strategy.nvme_path" in value.settings:
        return "nvme" in (config.strategy.offload_optimizer, config.strategy.offload_parameters)  # type: ignore[attr-defined]
    return True


def _config_of_model(evaluate_words: EvaluateWords, path: str, directory: Path) -> RunConfig:
    """A configuration for a model without a run. If no training data is named, a stand-in file takes its place."""
    from launch.config.compose import compose
    from trainer.model.rules import read_config
    from trainer.reporting.status import write_text_atomic

    model_config = read_config(path) or {}
    words = ["budget.steps=1", *evaluate_words.settings]
    architectures = model_config.get("architectures") or ()
    is_classifier = any(str(name).endswith("ForSequenceClassification") for name in architectures)
    labels = []
    if is_classifier:
        label_by_id = model_config.get("id2label") or {}
        labels = [label_by_id[key] for key in sorted(label_by_id, key=int)]
    if not any(word.startswith("objective=") for word in words):
        if is_classifier:
            words.append("objective=classification")
        elif model_config.get("is_encoder_decoder"):
            words.append("objective=seq2seq")
    if evaluate_words.adapter is not None:
        words.append(f"model.adapters=[{evaluate_words.adapter}]")
    config = compose(words, check=False).config
    if labels and getattr(config.objective, "labels", 0) is None:
        config.objective.labels = labels  # type: ignore[attr-defined]
    if config.data.path is None and not config.data.sources:
        rows = [{"text": "a text", "label": label} for label in labels] or [{"source": "a text", "target": "another"}]
        stand_in = directory / "stand_in.jsonl"
        write_text_atomic(stand_in, "".join(f"{json.dumps(row)}\n" for row in rows))
        config.data.path = str(stand_in)
    return config


def _set_evaluation_defaults(config: RunConfig, evaluate_words: EvaluateWords) -> None:
    """Overwrite training settings that do not matter in an evaluation, and choose tasks if none are set."""
    from launch.config.compose import world_size_of
    from strategies.base import DdpConfig, Precision, SingleConfig
    from trainer.config.parallel import ParallelConfig
    from trainer.config.run import Device
    from trainer.evaluation.base import TaskConfig
    from trainer.evaluation.tasks.prepared import TaskContext
    from trainer.model.quantised_checkpoints import quantising_library
    from trainer.monitors.config import ChallengesConfig

    ranks = world_size_of(config) or 1
    typed = any(word.startswith(("strategy=", "strategy.")) for word in evaluate_words.settings)
    if ranks == 1 and not typed:
        config.strategy = SingleConfig()
    elif quantising_library(config.model.path) is not None and not typed:
        config.strategy = DdpConfig()
    # Each rank generates answers for prompts of its own. Only the held-out loss of long documents needs a shared row.
    if not any(word.startswith("parallel.") for word in evaluate_words.settings):
        config.parallel = ParallelConfig()
    config.batch = {"global": ranks, "micro": 1}
    config.export.at_end = False
    config.evaluation.watch = "eval/loss"
    config.evaluation.greater_is_better = None
    config.evaluation.every_steps = 0
    config.evaluation.patience = 0
    config.evaluation.generate.samples = 0
    config.challenges = ChallengesConfig()
    if config.run.device is Device.cpu and config.precision is Precision.fp16:
        config.precision = Precision.fp32
    if not config.evaluation.tasks and _has_held_out(config):
        context = TaskContext.from_settings(config.data, config.objective)
        if context.is_language_model:
            config.evaluation.tasks = {kind: TaskConfig(kind=kind) for kind in PLAIN}


def _has_held_out(config: RunConfig) -> bool:
    return config.data.eval_path is not None or config.data.eval_share > 0


def _check(config: RunConfig, typed: list[str], *, trained: bool, run: Path | None) -> None:
    """Check everything that can be checked before a model is loaded. Errors: ConfigError, DataError."""
    from launch.config.compose import load_frozen, refusals
    from trainer.evaluation.tasks.prepared import TaskContext, check_tasks
    from trainer.evaluation.tasks.registry import TASK_KINDS

    context = TaskContext.from_settings(config.data, config.objective)
    if not config.evaluation.tasks:
        without = f"objective={config.objective.name} has no task by itself (what it measured is in metrics.jsonl)"
        if context.is_language_model:
            without = "there are no evaluation documents to ask about"
        raise ConfigError(
            f"evaluation.tasks: not set, and {without}; name a task with a file: evaluation.tasks.NAME.kind=KIND "
            f"evaluation.tasks.NAME.path=FILE; kinds are {', '.join(TASK_KINDS)}"
        )
    # Training data of a run is read only where a task asks for it, and then as the run recorded it.
    written = None if run is None else load_frozen(run / "config.yaml")
    problems = []
    for problem in refusals(config, written=written):
        key = key_of_problem(problem)
        is_of_training = key == "evaluation.watch" or (run is not None and key.startswith("data."))
        if not is_of_training:
            problems.append(problem)
    problems += _few_bits_problems(config, typed)
    if problems:
        raise ConfigError(problems)
    check_tasks(
        config.evaluation.tasks,
        context,
        held_out=_has_held_out(config),
        trained=trained,
    )


def _few_bits_problems(config: RunConfig, typed: list[str]) -> Iterator[str]:
    """Settings that do not work with a model that is stored in 4 or 8 bits, one line each."""
    from strategies.base import StrategyName
    from trainer.evaluation.tasks.prepared import TaskContext
    from trainer.model.quantised_checkpoints import missing_library, quantising_library

    path = config.model.path
    kit = quantising_library(path)
    if kit is None or config.evaluation.server.url is not None:
        return
    missing = missing_library(kit)
    if missing:
        yield f"model.path={path}: {missing}"
    if config.strategy.name not in (StrategyName.single, StrategyName.ddp):
        yield (
            f"strategy={config.strategy.name}: model.path={path} lies in few bits ({kit}), which every rank holds whole; set "
            "strategy=ddp, or launcher.processes=1"
        )
    if any(word.startswith("precision=") for word in typed):
        yield f"precision={config.precision}: model.path={path} computes in the types it is stored with; leave it out"
    if config.model.adapters:
        yield f"adapter={config.model.adapters[0]}: model.path={path} in few bits, nothing is folded into it; leave it out"
    if not TaskContext.from_settings(config.data, config.objective).is_language_model:
        yield f"model.path={path}: lies in few bits ({kit}), of which only causal language models are evaluated"


def _add_comparison(evaluation_plan: EvaluationPlan, against: str, evaluate_words: EvaluateWords) -> None:
    """Put into the plan what `against` names: base, a report, a run or a model. The last two run first. Errors: ConfigError."""
    from trainer.evaluation.report.record import REPORT, read_report

    path = Path(against).expanduser()
    if against == "base":
        if evaluation_plan.job.run is None and not evaluation_plan.config.model.adapters:
            raise ConfigError(
                "against=base: a model as it is has no base to compare with; add adapter=..., or name a run"
            )
        if evaluation_plan.job.run is not None:
            evaluation_plan.job = replace(evaluation_plan.job, base=True, against="base")
            return
        evaluation_plan.other_plan = _other_model_plan(
            evaluation_plan,
            replace(evaluation_plan.config, model=replace(evaluation_plan.config.model, adapters=[])),
            "base",
        )
    elif path.is_file():
        if path.resolve() == (Path(evaluation_plan.job.to) / REPORT).resolve():
            raise ConfigError(
                f"against={against}: is the report that this evaluation writes; give to=<another directory>, or keep a copy of "
                "the old one in a directory of its own"
            )
        read_report(path, "against")
        evaluation_plan.job = replace(evaluation_plan.job, report=str(path), gate=True, against=against)
    elif (path / "config.yaml").is_file():
        run_plan = make_plan(_other_run_words(path, evaluation_plan, evaluate_words))
        evaluation_plan.other_plan = replace_evaluation(run_plan, evaluation_plan)
        evaluation_plan.job = replace(evaluation_plan.job, report=str(Path(run_plan.job.to) / REPORT), against=against)
    elif (path / "config.json").is_file():
        from trainer.model.config import ModelConfig
        from trainer.tuning.base import FullConfig

        model = ModelConfig(path=str(path), download=False)
        evaluation_plan.other_plan = _other_model_plan(
            evaluation_plan, replace(copy.deepcopy(evaluation_plan.config), model=model, tuning=FullConfig()), against
        )
    else:
        what = "is neither a run, a model nor a report" if path.exists() else "there is no such file or directory"
        raise ConfigError(
            f"against={against}: {what}; it can be base, the directory of a run or of a model, or the {REPORT} of an evaluation"
        )


def _other_model_plan(evaluation_plan: EvaluationPlan, config: RunConfig, what: str) -> EvaluationPlan:
    """A plan for the same evaluation of another model, without a checkpoint; this one will be compared with its report."""
    from trainer.evaluation.report.record import REPORT

    to = Path(evaluation_plan.job.to) / "against"
    other_plan = EvaluationPlan(copy.deepcopy(config), _other_job(evaluation_plan, to))
    other_plan.config.run.dir = str(other_plan.directory)
    evaluation_plan.job = replace(evaluation_plan.job, report=str(to / REPORT), against=what)
    return other_plan


def _other_job(evaluation_plan: EvaluationPlan, to: Path) -> EvaluationJob:
    """The job of what is evaluated first, to be compared with: it is asked the rows that `evaluation_plan` is asked."""
    from trainer.evaluate import EvaluationJob

    return EvaluationJob(
        to=str(to), data_run=evaluation_plan.job.data_run, accept_data=evaluation_plan.job.accept_data, asked_first=True
    )


def _other_run_words(run: Path, evaluation_plan: EvaluationPlan, evaluate_words: EvaluateWords) -> EvaluateWords:
    """Words that evaluate the other run: with this one's processes and strategy, and with what was allowed for it."""
    config = evaluation_plan.config
    words = [f"launcher.processes={config.launcher.processes}", f"run.device={config.run.device}"]
    words += [f"strategy={config.strategy.name}", *evaluate_words.allowing]
    return EvaluateWords(
        run=run,
        to=str(Path(evaluation_plan.job.to) / "against"),
        accept=evaluate_words.accept,
        settings=words,
        command=evaluate_words.command,
        prefix=AGAINST,
        compared_with=evaluation_plan,
    )


def replace_evaluation(other_plan: EvaluationPlan, evaluation_plan: EvaluationPlan) -> EvaluationPlan:
    """The plan of the other run, with the tasks of this evaluation."""
    other_plan.config.evaluation = copy.deepcopy(evaluation_plan.config.evaluation)
    other_plan.job = replace(other_plan.job, asked_first=True)
    return other_plan
