"""The words of `shardtune evaluate` become a configuration and a job: of a run's checkpoint, or of a model as it is."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launch.export.words import ACCEPT, accepted_kinds
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.config.outside_values import OutsideValue
    from trainer.config.run import RunConfig
    from trainer.evaluate import EvaluationJob

OWN = ("against", "checkpoint", "to", "adapter", "run.dir", ACCEPT)
"""Words that are no settings."""
ALLOWED = frozenset({"evaluation", "strategy", "launcher", "run", "precision", "logging"})
"""Groups of settings that can be typed beside a run."""
AGAINST = "against."
"""Before a setting: it allows what the run of `against=` reaches out to."""
SERVER = "evaluation.server"
"""The group whose address may be typed without `.url`."""
UNUSED = {"model.download", "export.answers", "challenges.forgetting.data"}
"""Settings that an evaluation of a run does without: a model that is in the cache needs no download."""
PLAIN = ("loss", "bits_per_byte", "token_accuracy")
"""Tasks of a language model's run where none are asked for."""


@dataclass(slots=True)
class EvaluationWords:
    """The command line, sorted."""

    run: Path | None
    own: dict[str, str]
    settings: list[str]
    allowing: list[str] = field(default_factory=list)
    """Settings typed with `against.` before them: they allow what the other run reaches out to."""
    command: list[str] = field(default_factory=list)
    """All words as they were typed, the verb first, for messages."""
    prefix: str = ""
    """What stands before a word of `command` that allows what this run reaches out to."""
    compared_with: EvaluationPlan | None = None
    """The evaluation that this one is for, if it is that of `against=`: the same tasks are asked."""


@dataclass(slots=True)
class EvaluationPlan:
    """What is to be evaluated."""

    config: RunConfig
    job: EvaluationJob
    other: EvaluationPlan | None = None
    """What is evaluated before, to be compared with."""

    @property
    def directory(self) -> Path:
        """Where the records of the processes go."""
        return Path(self.job.to) / "evaluation"


def sort(argv: list[str]) -> EvaluationWords:
    """The words. Errors: ConfigError with every problem."""
    from launch.config.read_run import take_words

    command = ["evaluate", *argv]
    allowing, argv = take_words(argv, AGAINST)
    runs, own, settings, problems = [], dict[str, str](), list[str](), []
    for word in argv:
        key, assigned, value = word.partition("=")
        key = ACCEPT if key == f"run.{ACCEPT}" else key  # the same words as of training
        if word.startswith("-"):
            problems.append(f"{word}: there is no such flag; evaluate takes --json, --print and --help")
        elif key in OWN and assigned:
            problems += [f"{word}: {key} is given twice"] if key in own else []
            problems += [] if value else [f"{word}: {key} needs a value"]
            own[key] = value
        elif assigned:
            settings.append(f"{SERVER}.url={value}" if key == SERVER else word)
        else:
            runs.append(word)
    if "run.dir" in own:
        runs.append(own.pop("run.dir"))
    if len(runs) > 1:
        problems.append(f"{' '.join(runs)}: one run is evaluated at a time; name another as against={runs[1]}")
    model = next((word for word in settings if word.startswith("model.path=")), None)
    if not runs and model is None:
        problems.append(
            "nothing to evaluate is named; give a run (shardtune evaluate runs/x) or model.path=<directory>"
        )
    elif runs and model is not None:
        problems.append(f"{model}: the run {runs[0]} has its model; give one of the two")
    if runs and any(word.startswith(SERVER) for word in settings):
        problems.append(
            f"{SERVER}: a server answers for files that were exported; name them: model.path={runs[0]}/export"
        )
    if (
        any(word.startswith(SERVER) for word in settings)
        and own.get("against")
        and not Path(own["against"]).expanduser().is_file()
    ):
        problems.append(
            f"against={own['against']}: one server answers for one model; evaluate the other first, and give its evaluation.json"
        )
    if runs and "adapter" in own:
        problems.append(f"adapter={own['adapter']}: goes with model.path; the run {runs[0]} has its own")
    if not runs and "checkpoint" in own:
        problems.append(f"checkpoint={own['checkpoint']}: is of a run; name the run, or leave it out")
    if problems:
        raise ConfigError(problems)
    return EvaluationWords(Path(runs[0]).expanduser() if runs else None, own, settings, allowing, command)


def plan(asked: EvaluationWords) -> EvaluationPlan:
    """What to do, checked as far as that goes without a model. Errors: ConfigError with every problem, DataError."""
    from launch.config.read_run import is_own
    from trainer.evaluate import EvaluationJob
    from trainer.session.run_data import DATA

    to = asked.own.get("to")
    if asked.run is not None:
        config, checkpoint, accepted = _of_run(asked.run, asked)
        own = is_own(asked.run)
        job = EvaluationJob(
            to=to or str(asked.run if own else Path("runs") / f"evaluate-{asked.run.resolve().name}"),
            run=str(asked.run),
            checkpoint=checkpoint,
            data_run=str(asked.run),
            accept_data=DATA in accepted_kinds(asked.own),
            accepted=accepted,
            recorded=own,
        )
    else:
        path = next(word.partition("=")[2] for word in asked.settings if word.startswith("model.path="))
        job = EvaluationJob(to=to or str(Path("runs") / f"evaluate-{Path(path).name}"))
        config = _of_model(asked, path, Path(job.to) / "evaluation")
        if "adapter" in asked.own:
            job = replace(job, accepted=_accepted_base(asked, path))
    if (Path(job.to)).is_file():
        raise ConfigError(f"to={job.to}: is a file; name a directory")
    made = EvaluationPlan(config, job)
    config.run.dir = str(made.directory)
    _settle(config, asked)
    of_run = asked.run is not None
    has_training_data = any(word.startswith(("data.path=", "data.sources")) for word in asked.settings)
    try:
        _check(config, asked.settings, trained=of_run or has_training_data, run=asked.run)
    except ConfigError as error:
        raise ConfigError([*_missing_model(config), *error.problems]) from None
    if (against := asked.own.get("against")) is not None:
        _against(made, against, asked)
    return made


def _accepted_base(asked: EvaluationWords, base: str) -> list[str]:
    """How the base beside an adapter differs from that of its training, if that is accepted. Errors: ConfigError."""
    from trainer.model.base_files import refuse_another_base
    from trainer.model.config import ModelConfig
    from trainer.model.loading import weights_directory

    accept = bool(accepted_kinds(asked.own, reads_rows=False))
    try:
        directory = weights_directory(ModelConfig(path=base))
    except ConfigError:
        return []  # it is not on this machine, which is told with all else that is wrong
    return refuse_another_base(Path(asked.own["adapter"]).expanduser(), directory, accept=accept)


def _missing_model(config: RunConfig) -> list[str]:
    """A line about a model that is no directory here: with other problems it may be the first one, a mistyped path."""
    path = config.model.path or ""
    if Path(path).expanduser().exists():
        return []
    return [
        f"model.path={path}: there is no such directory here; a hub id is right only if this machine has downloaded it"
    ]


def _of_run(run: Path, asked: EvaluationWords) -> tuple[RunConfig, str, list[str]]:
    """The run's configuration with the words on top, the checkpoint, and how the base differs where that is accepted."""
    from launch.config.compose import recompose
    from launch.config.read_run import ReadingVerb, read_run
    from launch.export.command import find_checkpoint, tell_if_base_was_better
    from trainer.config.run import kept_matmul
    from trainer.session.base_files import use_recorded_base

    if not (run / "config.yaml").is_file():
        what = "not a run directory (it has no config.yaml)" if run.exists() else "there is no such directory"
        raise ConfigError(f"{run}: {what}; name a run, or a model with model.path={run}")

    def with_own_words(frozen: RunConfig, words: list[str]) -> RunConfig:
        frozen.run.dir, frozen.run.resume = None, "auto"
        frozen.run.matmul = kept_matmul(frozen)
        if asked.compared_with is not None:
            frozen.evaluation = copy.deepcopy(asked.compared_with.config.evaluation)
        return recompose(frozen, words, ALLOWED)

    # The tasks of an evaluation that another one is compared with are that one's.
    settled = frozenset[str]() if asked.compared_with is None else frozenset({"evaluation"})
    verb = ReadingVerb(asked.command, _needs, asked.prefix, ALLOWED, settled)
    config = read_run(run, verb, asked.settings, with_own_words)
    checkpoint = find_checkpoint(run, asked.own.get("checkpoint", "last"), config.checkpoint)
    if asked.own.get("checkpoint") == "best":
        tell_if_base_was_better(run, checkpoint, config)
    accepted = use_recorded_base(
        config, run, accepted_kinds(asked.own), teacher=True, start=asked.own.get("against") == "base"
    )
    return config, str(checkpoint), accepted


def _needs(value: OutsideValue, config: RunConfig) -> bool:
    """Whether an evaluation of a run uses a value that reaches out of it."""
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


def _of_model(asked: EvaluationWords, path: str, directory: Path) -> RunConfig:
    """A configuration around a model, whose training data is a stand-in where none is named."""
    from launch.config.compose import compose
    from trainer.model.rules import read_config
    from trainer.reporting.status import write_text_atomic

    about = read_config(path) or {}
    words = ["budget.steps=1", *asked.settings]
    classifier = any(str(name).endswith("ForSequenceClassification") for name in about.get("architectures") or ())
    labels = [about["id2label"][key] for key in sorted(about.get("id2label") or {}, key=int)] if classifier else []
    if not any(word.startswith("objective=") for word in words) and (classifier or about.get("is_encoder_decoder")):
        words.append(f"objective={'classification' if classifier else 'seq2seq'}")
    if "adapter" in asked.own:
        words.append(f"model.adapters=[{asked.own['adapter']}]")
    config = compose(words, check=False).config
    if labels and getattr(config.objective, "labels", 0) is None:
        config.objective.labels = labels  # type: ignore[attr-defined]
    if config.data.path is None and not config.data.sources:
        rows = [{"text": "a text", "label": label} for label in labels] or [{"source": "a text", "target": "another"}]
        stand_in = directory / "stand_in.jsonl"
        write_text_atomic(stand_in, "".join(f"{json.dumps(row)}\n" for row in rows))
        config.data.path = str(stand_in)
    return config


def _settle(config: RunConfig, asked: EvaluationWords) -> None:
    """What an evaluation needs no choice for."""
    from launch.config.compose import world_size_of
    from strategies.base import DdpConfig, Precision, SingleConfig
    from trainer.config.run import Device
    from trainer.evaluation.base import TaskConfig
    from trainer.evaluation.tasks.prepared import TaskContext
    from trainer.model.quantised_checkpoints import stored_by
    from trainer.monitors.config import ChallengesConfig

    ranks = world_size_of(config) or 1
    typed = any(word.startswith(("strategy=", "strategy.")) for word in asked.settings)
    if ranks == 1 and not typed:
        config.strategy = SingleConfig()
    elif stored_by(config.model.path) is not None and not typed:
        config.strategy = DdpConfig()
    config.batch = {"global": ranks, "micro": 1}
    config.export.at_end, config.evaluation.watch = False, "eval/loss"
    config.evaluation.every_steps = config.evaluation.patience = config.evaluation.generate.samples = 0
    config.evaluation.greater_is_better = None
    config.challenges = ChallengesConfig()
    if config.run.device is Device.cpu and config.precision is Precision.fp16:
        config.precision = Precision.fp32
    if not config.evaluation.tasks and TaskContext.of(config.data, config.objective).language and _has_held_out(config):
        config.evaluation.tasks = {kind: TaskConfig(kind=kind) for kind in PLAIN}


def _has_held_out(config: RunConfig) -> bool:
    return config.data.eval_path is not None or config.data.eval_share > 0


def _check(config: RunConfig, typed: list[str], *, trained: bool, run: Path | None) -> None:
    """Everything that can be wrong before there is a model."""
    from launch.config.compose import load_frozen, refusals
    from trainer.evaluation.tasks.prepared import TaskContext, check
    from trainer.evaluation.tasks.registry import KINDS

    around = TaskContext.of(config.data, config.objective)
    if not config.evaluation.tasks:
        without = f"objective={config.objective.name} has no task by itself (what it measured is in metrics.jsonl)"
        if around.language:
            without = "there are no evaluation documents to ask about"
        raise ConfigError(
            f"evaluation.tasks: not set, and {without}; name a task with a file: evaluation.tasks.NAME.kind=KIND "
            f"evaluation.tasks.NAME.path=FILE; kinds are {', '.join(KINDS)}"
        )
    # Training data of a run is read only where a task asks for it, and then as the run recorded it.
    passed_over = ("evaluation.watch=",) if run is None else ("evaluation.watch=", "data.")
    written = None if run is None else load_frozen(run / "config.yaml")
    found = [problem for problem in refusals(config, written=written) if not problem.startswith(passed_over)]
    found += _few_bits(config, typed)
    if found:
        raise ConfigError(found)
    check(
        config.evaluation.tasks,
        around,
        held_out=_has_held_out(config),
        trained=trained,
    )


def _few_bits(config: RunConfig, typed: list[str]) -> Iterator[str]:
    """What does not go with a model that lies in 4 or 8 bits, one line each."""
    from strategies.base import StrategyName
    from trainer.evaluation.tasks.prepared import TaskContext
    from trainer.model.quantised_checkpoints import lacking, stored_by

    path = config.model.path
    if (kit := stored_by(path)) is None or config.evaluation.server.url is not None:
        return
    if lacks := lacking(kit):
        yield f"model.path={path}: {lacks}"
    if config.strategy.name not in (StrategyName.single, StrategyName.ddp):
        yield (
            f"strategy={config.strategy.name}: model.path={path} lies in few bits ({kit}), which every rank holds whole; set "
            "strategy=ddp, or launcher.processes=1"
        )
    if any(word.startswith("precision=") for word in typed):
        yield f"precision={config.precision}: model.path={path} computes in the types it is stored with; leave it out"
    if config.model.adapters:
        yield f"adapter={config.model.adapters[0]}: model.path={path} in few bits, nothing is folded into it; leave it out"
    if not TaskContext.of(config.data, config.objective).language:
        yield f"model.path={path}: lies in few bits ({kit}), of which only causal language models are evaluated"


def _against(made: EvaluationPlan, value: str, asked: EvaluationWords) -> None:
    """What `against` means: base, a report, a run, a model. Errors: ConfigError."""
    from trainer.evaluation.report.record import REPORT, read

    path = Path(value).expanduser()
    if value == "base":
        if made.job.run is None and not made.config.model.adapters:
            raise ConfigError(
                "against=base: a model as it is has no base to compare with; add adapter=..., or name a run"
            )
        if made.job.run is not None:
            made.job = replace(made.job, base=True, against="base")
            return
        made.other = _other(made, replace(made.config, model=replace(made.config.model, adapters=[])), "base")
    elif path.is_file():
        if path.resolve() == (Path(made.job.to) / REPORT).resolve():
            raise ConfigError(
                f"against={value}: is the report that this evaluation writes; give to=<another directory>, or keep a copy of "
                "the old one in a directory of its own"
            )
        read(path, "against")
        made.job = replace(made.job, report=str(path), gate=True, against=value)
    elif (path / "config.yaml").is_file():
        other = plan(_other_run(path, made, asked))
        made.other = replace_evaluation(other, made)
        made.job = replace(made.job, report=str(Path(other.job.to) / REPORT), against=value)
    elif (path / "config.json").is_file():
        from trainer.model.config import ModelConfig
        from trainer.tuning.base import FullConfig

        model = ModelConfig(path=str(path), download=False)
        made.other = _other(made, replace(copy.deepcopy(made.config), model=model, tuning=FullConfig()), value)
    else:
        what = "is neither a run, a model nor a report" if path.exists() else "there is no such file or directory"
        raise ConfigError(
            f"against={value}: {what}; it can be base, the directory of a run or of a model, or the {REPORT} of an evaluation"
        )


def _other(made: EvaluationPlan, config: RunConfig, what: str) -> EvaluationPlan:
    """The same evaluation of another model, without a checkpoint; this one is compared with its report."""
    from trainer.evaluation.report.record import REPORT

    to = Path(made.job.to) / "against"
    other = EvaluationPlan(copy.deepcopy(config), _first_job(made, to))
    other.config.run.dir = str(other.directory)
    made.job = replace(made.job, report=str(to / REPORT), against=what)
    return other


def _first_job(made: EvaluationPlan, to: Path) -> EvaluationJob:
    """The job of what is evaluated first, to be compared with: it is asked the rows that `made` is asked."""
    from trainer.evaluate import EvaluationJob

    return EvaluationJob(to=str(to), data_run=made.job.data_run, accept_data=made.job.accept_data, asked_first=True)


def _other_run(run: Path, made: EvaluationPlan, asked: EvaluationWords) -> EvaluationWords:
    """The words of the run that is compared with: started as this one is, and allowed what was typed for it."""
    config = made.config
    words = [f"launcher.processes={config.launcher.processes}", f"run.device={config.run.device}"]
    words += [f"strategy={config.strategy.name}", *asked.allowing]
    own = {"to": str(Path(made.job.to) / "against")}
    if ACCEPT in asked.own:
        own[ACCEPT] = asked.own[ACCEPT]
    return EvaluationWords(run, own, words, command=asked.command, prefix=AGAINST, compared_with=made)


def replace_evaluation(other: EvaluationPlan, made: EvaluationPlan) -> EvaluationPlan:
    """The other run asked what this one is asked."""
    other.config.evaluation = copy.deepcopy(made.config.evaluation)
    other.job = replace(other.job, asked_first=True)
    return other
