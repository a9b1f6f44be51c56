"""What a configuration must satisfy before any process starts: ranges of single settings, and rules between settings.

`config_problems` returns one line a problem (key and value, the constraint, what to do), all of them; an empty list is a
configuration that may run. It reads the file system for paths and nothing else.
"""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from strategies.base import AutoConfig, StrategyConfig, StrategyName
from strategies.errors import ConfigError, DataError, StorageError, key_of_problem
from strategies.registry import every_strategy
from trainer.checkpoints.layout import checkpoint_dirs_of
from trainer.checkpoints.resume_selection import resolve_resume_setting, resume_setting_problem
from trainer.config.combinations import combination_problems, method_name_of, methods_by_name
from trainer.config.evaluation import evaluation_problems
from trainer.config.gates import document_problems, gate_problems
from trainer.config.launching import launcher_problems
from trainer.config.parallel import dp_size_of
from trainer.config.ranges import range_problems
from trainer.config.resuming import KINDS_OF_CHANGE, flatten_settings, settings_as_dict
from trainer.config.rewards import reward_problems
from trainer.config.rounds import answer_batch_problems, round_problems
from trainer.config.run import AUTO, Device, LauncherName, RunConfig
from trainer.config.sharding import sharding_problems
from trainer.data.read.paths import expand_paths, held_out_sets, is_hub_path, is_remote_address
from trainer.data.sources import data_problems
from trainer.model.config import ModelKind, Quantisation, may_be_hub_id
from trainer.model.rules import missing_package, position_problems, read_config
from trainer.objectives.registry import model_problems, objective_family, objective_problems
from trainer.optim.support import optimizer_problems
from trainer.reporting.energy import energy_problems
from trainer.reporting.numbers import format_dp_ranks
from trainer.reporting.profile import profile_problems
from trainer.reporting.trackers.registry import tracker_problems
from trainer.tuning.check import SettingsBesideTuning, tuning_combination_problems
from trainer.tuning.initial_adapter import merge_problems
from trainer.tuning.table import needs_padded_rows

OUTPUT_DIRECTORY_KEYS = (
    "run.dir",
    "data.cache_dir",
    "checkpoint.fallback_dir",
    "evaluation.judge.cache_dir",
    "strategy.nvme_path",
    "launcher.stage",
)
"""Settings that name a directory to write to."""
MAX_TRIED_MICRO_BATCH = 4096
"""Micro-batches up to which one is looked for that would do."""


def config_problems(config: RunConfig, *, world_size: int | None = None) -> list[str]:
    """Check a whole configuration before a run starts; returns every problem as an error message, [] if it can run.

    `world_size` is the number of ranks, None if it is not known. `strategy=auto` can run if one of the strategies that it
    stands for can. Batches and sharding are not checked if a number in `batch`, `launcher` or `strategy` is out of its range.
    """
    if isinstance(config.strategy, AutoConfig):  # checks each strategy by a call of this function
        return runnable_strategies(config, world_size).problems
    out_of_range = range_problems(config)
    problems = [
        *out_of_range,
        *_budget_problems(config),
        *_model_problems(config),
        *_data_problems(config),
        *evaluation_problems(config),
        *round_problems(config),
        *reward_problems(config),
        *gate_problems(config),
        *document_problems(config),
        *config.review.problems(),
        *_run_problems(config),
    ]
    problems += [*_base_problems(config), *_schedule_problems(config)]
    if not any(key_of_problem(problem).startswith(("batch.", "launcher.", "strategy.")) for problem in out_of_range):
        problems += [*_batch_problems(config, world_size), *sharding_problems(config, world_size)]
    runs_here = config.launcher.name is LauncherName.local  # else other machines decide which packages there are
    problems += optimizer_problems(config.optim, config.strategy, str(config.schedule.name), starts_here=runs_here)
    problems += combination_problems(config.tuning, config.strategy, config.optim)
    problems += tracker_problems(config.logging) if runs_here else []
    problems += energy_problems(config.logging, uses_this_host=runs_here)
    problems += profile_problems(config.profile, config.budget.steps)
    return [*problems, *_tuning_problems(config), *launcher_problems(config)]


class RunnableStrategies(NamedTuple):
    """What `strategy=auto` may become."""

    strategies: list[StrategyConfig]
    problems: list[str]
    """Why none can run, or not yet; empty if the strategies can run."""


def runnable_strategies(config: RunConfig, world_size: int | None) -> RunnableStrategies:
    """Find out what `strategy=auto` may become on `world_size` ranks (None: not known yet), by checking the run under each.

    - Problems that every strategy has, such as a missing data file: they are returned, with the strategies that have no other.
    - Each strategy has a problem and they share none: no strategy, and the first problem under each.
    - Otherwise the strategies without a problem, and no problems.
    """
    strategies = every_strategy(config.strategy)
    if world_size == 1:  # one rank has nothing to share
        strategies = [strategy for strategy in strategies if strategy.name is StrategyName.single]
    elif world_size is not None:
        strategies = [strategy for strategy in strategies if strategy.name is not StrategyName.single]
    # The problems under each strategy, in the order of `strategies`.
    problem_lists = [
        config_problems(replace(config, strategy=strategy), world_size=world_size) for strategy in strategies
    ]
    shared_problems = []
    for problem in problem_lists[0]:
        if all(problem in problems for problems in problem_lists):
            shared_problems.append(problem)
    runnable = []
    first_problems = []
    for strategy, problems in zip(strategies, problem_lists, strict=True):
        if set(problems) <= set(shared_problems):
            runnable.append(strategy)
        else:
            first_problems.append(f"under {strategy.name}: {problems[0]}")
    if shared_problems or runnable:
        return RunnableStrategies(runnable, shared_problems)
    return RunnableStrategies([], ["strategy=auto: no strategy can run this", *first_problems])


def _budget_problems(config: RunConfig) -> Iterator[str]:
    """Check that the run's length is set exactly once: budget.steps, budget.epochs or budget.tokens; yields a message if not."""
    rule = "exactly one of budget.steps, budget.epochs and budget.tokens says how long to train"
    budgets = {name: getattr(config.budget, name) for name in ("steps", "epochs", "tokens")}
    set_names = [name for name, length in budgets.items() if length is not None]
    if not set_names:
        yield f"budget: not set: {rule}, as in budget.epochs=3"
    elif len(set_names) > 1:
        overrides = " ".join(f"budget.{name}={budgets[name]}" for name in set_names)
        yield f"{overrides}: {rule}; remove one, or set it to null (budget.{set_names[-1]}=null)"


def _batch_problems(config: RunConfig, world_size: int | None) -> Iterator[str]:
    """Check that the ranks can share the global batch: it must be a multiple of a micro-batch on each data-parallel rank.

    Yields error messages, also if a size is missing or unknown. `world_size` is None if the number of ranks is not known;
    then one rank counts. With batch.global=30 and batch.micro=4 on 2 ranks: "must be a multiple of batch.micro=4 x 2 ranks =
    8; set batch.global=24 or batch.global=32, or ...".
    """
    global_batch = config.batch.get("global")
    micro_batch = config.batch.get("micro")
    unknown = sorted(set(config.batch) - {"global", "micro"})
    if unknown:
        yield f"batch.{unknown[0]}: there is no such setting; batch has global and micro (accumulation is derived)"
    if global_batch is None or micro_batch is None:
        yield "batch: needs both batch.global and batch.micro"
        return
    if world_size is not None and world_size % config.parallel.sequence:
        return  # reported by itself; the number of data-parallel ranks is not known until it is mended
    if objective_family(config.objective).rollout is not None:
        yield from answer_batch_problems(config)
        return

    # Ranks that share their rows (`parallel.sequence`) count as one data-parallel rank.
    dp_size = max(1, dp_size_of(config, world_size or 1))
    dp_ranks_text = "ranks" if world_size is None else format_dp_ranks(dp_size, config.parallel.sequence)
    if micro_batch == AUTO:  # a legal one is chosen later, if there can be any
        if global_batch % dp_size:
            legal = _nearest_multiples_text(global_batch, dp_size)
            yield f"batch.global={global_batch}: must be a multiple of the {dp_ranks_text}; set {legal}"
        return
    documents_per_pass = micro_batch * dp_size
    if global_batch % documents_per_pass:
        legal = _nearest_multiples_text(global_batch, documents_per_pass)
        largest = min(micro_batch, global_batch // dp_size, MAX_TRIED_MICRO_BATCH)
        legal_micros = [str(micro) for micro in range(1, largest + 1) if global_batch % (micro * dp_size) == 0]
        if legal_micros:
            legal += f", or batch.micro={' or '.join(legal_micros[-4:])}"
        if world_size is not None and dp_size == world_size:
            legal += _fitting_ranks_text(global_batch, micro_batch, world_size)
        yield (
            f"batch.global={global_batch}: must be a multiple of batch.micro={micro_batch} x {dp_ranks_text} = "
            f"{documents_per_pass}; set {legal}"
        )


def _fitting_ranks_text(global_batch: int, micro_batch: int, world_size: int) -> str:
    """The next smaller and larger numbers of ranks on which the batches fit: `, or train on 2 or 4 ranks`; empty without one.

    A run that resumes with other ranks needs no permission. Another global batch must be accepted (`run.accept`).
    """
    smaller = [ranks for ranks in range(1, world_size) if global_batch % (micro_batch * ranks) == 0]
    larger = [ranks for ranks in range(world_size + 1, 2 * world_size + 1) if global_batch % (micro_batch * ranks) == 0]
    fitting = [str(ranks) for ranks in (*smaller[-1:], *larger[:1])]
    return f", or train on {' or '.join(fitting)} ranks" if fitting else ""


def _nearest_multiples_text(global_batch: int, divisor: int) -> str:
    """The overrides for the next smaller and the next larger multiple of `divisor`: `batch.global=24 or batch.global=32`.

    Only for the larger one, if there is no smaller one above 0.
    """
    below = global_batch // divisor * divisor
    sizes = [below, below + divisor] if below else [divisor]
    return " or ".join(f"batch.global={size}" for size in sizes)


def _model_problems(config: RunConfig) -> Iterator[str]:
    """Check the model settings: that model and tokenizer exist here, and fit the objective; yields error messages.

    Only files of this machine are looked at. Whether a hub id exists shows when the model is loaded.
    """
    model = config.model
    if model.path is None:
        yield "model.path: not set; give a model directory or a hub id, as in model.path=models/smollm2"
    for key in ("path", "tokenizer"):
        name = getattr(model, key)
        if name is None:
            continue
        path = Path(name).expanduser()
        remedy = "give a model directory, or a hub id such as org/name"
        if path.is_file():
            yield f"model.{key}={name}: is a file; {remedy}"
        elif not path.is_dir() and not may_be_hub_id(name):
            yield f"model.{key}={name}: does not exist; {remedy}"

    # A directory that is no model, but holds some.
    directory = Path(model.path or "").expanduser()
    if model.path and not (directory / "config.json").is_file():
        models_inside = [config_file.parent for config_file in sorted(directory.glob("*/config.json"))]
        if models_inside:
            yield (
                f"model.path={model.path}: holds models, and is none; give one of them, as in model.path={models_inside[0]}"
            )

    yield from model_problems(config.objective, config, read_config(model.path))
    yield from position_problems(model)
    if model.neftune_alpha:
        yield from _noise_problems(config)
    if model.chat_template is not None and not Path(model.chat_template).expanduser().is_file():
        yield f"model.chat_template={model.chat_template}: no such file; give a file with a Jinja template"


def _noise_problems(config: RunConfig) -> Iterator[str]:
    """Error messages for `model.neftune_alpha` (noise on embeddings) with a model or a tuning method that cannot have it."""
    key = f"model.neftune_alpha={config.model.neftune_alpha:g}"
    if objective_family(config.objective).kind is ModelKind.encoder_decoder:
        yield f"{key}: is not for encoder-decoder models, whose two sides share embeddings; set it to 0"
    if needs_padded_rows(config.tuning):
        yield f"{key}: tuning={config.tuning.name} puts tokens of its own before a document's; set it to 0, or use tuning=lora"


def _base_problems(config: RunConfig) -> Iterator[str]:
    """Check what is done to the base model when it is loaded: quantisation, and adapters that are merged into it first.

    Yields error messages. An adapter that is trained on top of merged ones would not fit the base alone, so that a run may
    not export such an adapter.
    """
    model = config.model
    runs_here = config.launcher.name is LauncherName.local
    if model.quantisation is not Quantisation.none and runs_here:
        missing_text = missing_package()  # `needs the package bitsandbytes (pip install ...)`
        if missing_text is not None:
            yield f"model.quantisation={model.quantisation}: {missing_text}, or set model.quantisation=none"
    for directory in model.adapters:
        yield from merge_problems(directory)
    method = methods_by_name().get(method_name_of(config.tuning))
    exports_adapter = method is not None and method.adapter and config.export.at_end and not config.export.merge
    if model.adapters and method is not None and exports_adapter:
        merge = "" if method.merge_refusal else "set export.merge=true, or "
        yield (
            f"model.adapters={model.adapters}: an adapter trained on top of others does not belong to model.path alone; "
            f"{merge}write the merged base once (shardtune export adapters=... to=...) and tune that"
        )


def _data_problems(config: RunConfig) -> Iterator[str]:
    """Check the data settings before a run starts: files that are missing, settings that conflict or do not fit the objective.

    Yields error messages. Reaches no network: whether an address exists shows when it is read.
    """
    data = config.data
    paths = {"data.path": data.path}  # by setting: a path or glob, a list of them, or None
    for split in ("eval", "test"):
        try:
            paths.update(held_out_sets(getattr(data, f"{split}_path"), split).values())
        except ConfigError as error:
            yield from error.problems
    paths |= {f"data.sources.{name}.path": source.path for name, source in data.sources.items()}
    paths["data.decontamination.paths"] = data.decontamination.paths
    for key, path_or_list in paths.items():
        if path_or_list is None:
            continue
        for pattern in path_or_list if isinstance(path_or_list, list) else [path_or_list]:
            # Composing reaches no network: whether an address or a data set of the hub exists shows when it is read. Addresses
            # are only read with `data.remote`; without it, they are missing files.
            if not (data.remote and is_remote_address(str(pattern))) and not is_hub_path(str(pattern)):
                yield from _missing_file_problems(key, pattern)
    yield from data_problems(data)
    yield from objective_problems(config.objective, config)


def _missing_file_problems(key: str, pattern: object) -> Iterator[str]:
    """Check that some file here matches a path or glob, the value of the setting `key`; yields a message if none does."""
    path = Path(str(pattern)).expanduser()
    if path.exists() or glob.glob(str(path), recursive=True):  # noqa: PTH207
        return
    try:
        expand_paths(pattern, key)  # says what is wrong; a file that appeared meanwhile is no problem
    except DataError as error:
        reason = str(error).removeprefix(f"{key}={pattern}").lstrip(": ")
        yield f"{key}={pattern}: {reason}; paths are relative to {Path.cwd()}"


def _resume_problems(config: RunConfig) -> Iterator[str]:
    """Check that the checkpoint that `run.resume` names can be used; yields an error message if not.

    Nothing is checked with `run.resume=auto` (the newest checkpoint of the run's directory, if there is one) or `never`, or if
    the run began from the named checkpoint before and goes on from newer ones of its own.
    """
    resume = config.run.resume
    run_dir = config.run.dir
    try:
        # The run may have begun from that checkpoint before; then it resumes as with `auto`.
        if run_dir is not None and run_dir.strip():
            resume = resolve_resume_setting(
                checkpoint_dirs_of(Path(run_dir).expanduser(), config.checkpoint.fallback_dir), resume
            )
        if resume in ("auto", "never"):
            return
        problem = resume_setting_problem(
            resume, checkpoint_dirs_of(Path(resume).expanduser(), config.checkpoint.fallback_dir)
        )
        if problem:
            yield problem
    except StorageError as error:
        yield str(error)


def _output_directory_problems(config: RunConfig) -> Iterator[str]:
    """Refuse addresses such as s3://bucket as directories to write to: each would become a local directory called `s3:`.

    Yields an error message for each.
    """
    settings = flatten_settings(settings_as_dict(config))
    for key in OUTPUT_DIRECTORY_KEYS:
        directory = settings.get(key)
        if directory is None or "://" not in directory:
            continue
        local = Path(directory)
        remedy = "name a directory, and copy it afterwards"
        if local.exists():  # an earlier version has written there
            remedy = f"the local directory {local} has what was written before: rename it (mv), and name it"
        yield f"{key}={directory}: is an address, and only local directories are written to; {remedy}"


def _run_problems(config: RunConfig) -> Iterator[str]:
    """Check the settings of the run itself: its directory, its checkpoints, what it resumes from, its device; yields messages."""
    yield from _resume_problems(config)
    yield from _output_directory_problems(config)
    # `run.accept` names kinds of changes, such as `data`, with which a resumed run may go on.
    for kind in set(config.run.accept) - set(KINDS_OF_CHANGE):
        closest = difflib.get_close_matches(kind, KINDS_OF_CHANGE, n=1)
        remedy = closest[0] if closest else f"one of {', '.join(KINDS_OF_CHANGE)}"
        yield f"run.accept=[{kind}]: there is no such kind of change; {remedy}"
    if config.run.dir is not None and not config.run.dir.strip():
        yield "run.dir: is empty; name a directory, or null for the default"
    yield from _checkpoint_problems(config)
    if config.run.must_fit and config.run.device is Device.cpu:
        yield "run.must_fit=true: asks for the memory of GPUs, and run.device=cpu has none; leave it out"


def _checkpoint_problems(config: RunConfig) -> Iterator[str]:
    """Check the checkpoint settings: one setting alone says when they are due, and the fallback directory can be written.

    Yields error messages. The fallback takes checkpoints that cannot be written to the run's own disk.
    """
    checkpoint = config.checkpoint
    if checkpoint.every_steps and checkpoint.every_minutes is not None:
        yield (
            f"checkpoint.every_minutes={checkpoint.every_minutes:g}: checkpoint.every_steps={checkpoint.every_steps} says "
            "already when; set one of the two"
        )
    runs_here = config.launcher.name is LauncherName.local  # else the disks are those of other machines
    fallback_dir = checkpoint.fallback_dir
    if fallback_dir is not None:
        is_usable = bool(fallback_dir.strip()) and (not runs_here or _is_writable(Path(fallback_dir).expanduser()))
        if not is_usable:
            yield (
                f"checkpoint.fallback_dir={fallback_dir}: must be a directory on another disk that this user can write, or null"
            )


def _is_writable(directory: Path) -> bool:
    """Whether this user can write a directory, or create it."""
    try:
        nearest = next(path for path in (directory, *directory.absolute().parents) if path.exists())
        return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    except OSError:
        return False


def _schedule_problems(config: RunConfig) -> Iterator[str]:
    """Check that the warm-up and the decay of the learning rate fit into the run; yields error messages."""
    schedule = config.schedule
    steps = config.budget.steps
    if schedule.name == "wsd" and not schedule.warmup_steps and schedule.warmup_share + schedule.decay_share > 1:
        yield (
            f"schedule.decay_share={schedule.decay_share:g}: with schedule.warmup_share="
            f"{schedule.warmup_share:g} it is more than the whole run; lower one of them"
        )
    if steps is not None and schedule.warmup_steps > steps:
        yield f"schedule.warmup_steps={schedule.warmup_steps}: more than budget.steps={steps}; lower it"


def _tuning_problems(config: RunConfig) -> Iterator[str]:
    """Check the tuning method (LoRA, say) against all settings that not every method works with; yields error messages.

    Those are strategy, precision, data, objective, export, added tokens, quantisation, and ranks that share rows or experts.
    """
    kind = objective_family(config.objective).kind
    other_settings = SettingsBesideTuning(
        strategy=config.strategy,
        precision=config.precision,
        data=config.data,
        merges_adapter=bool(config.export.merge),
        has_new_head=kind is ModelKind.classifier,
        is_encoder_decoder=kind is ModelKind.encoder_decoder,
        has_new_tokens=bool(config.model.add_tokens),
        quantisation=str(config.model.quantisation),
        sequence_ranks=config.parallel.sequence,
        expert_ranks=config.parallel.experts,
    )
    yield from tuning_combination_problems(config.tuning, other_settings)
