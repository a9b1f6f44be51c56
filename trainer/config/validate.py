"""What a configuration must satisfy before any process starts: ranges of single settings, and rules between settings.

`problems_of` returns one line a problem (key and value, the constraint, what to do), all of them; an empty list is a
configuration that may run. It reads the file system for paths and nothing else.
"""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from strategies.base import AutoConfig, StrategyConfig, StrategyName
from strategies.errors import ConfigError, DataError, StorageError
from strategies.registry import every_strategy
from trainer.checkpoints.layout import places_of
from trainer.checkpoints.resume_selection import refused, settled
from trainer.config.combinations import problems as combination_problems
from trainer.config.combinations import row_of, rows
from trainer.config.evaluation import problems as evaluation_problems
from trainer.config.gates import paper_words
from trainer.config.gates import problems as gate_problems
from trainer.config.launching import problems as launcher_problems
from trainer.config.ranges import range_problems
from trainer.config.resuming import KINDS, flat, plain
from trainer.config.run import AUTO, Device, LauncherName, RunConfig
from trainer.config.sharding import problems as sharding_problems
from trainer.data.read.paths import expand, is_address, is_hub, sets_of
from trainer.data.sources import problems as data_problems
from trainer.model.config import ModelKind, Quantisation, may_be_hub_id
from trainer.model.rules import missing_package, read_config
from trainer.objectives.registry import family_of, model_problems
from trainer.objectives.registry import problems as objective_problems
from trainer.optim.support import problems as optimizer_problems
from trainer.reporting.energy import problems as energy_problems
from trainer.reporting.profile import profile_problems
from trainer.reporting.trackers.registry import problems as tracker_problems
from trainer.tuning.check import RunFacts
from trainer.tuning.check import problems as tuning_problems
from trainer.tuning.initial_adapter import fold_problems
from trainer.tuning.table import needs_own_rows

WRITTEN = (
    "run.dir",
    "data.cache_dir",
    "checkpoint.fallback_dir",
    "evaluation.judge.cache_dir",
    "strategy.nvme_path",
    "launcher.stage",
)
"""Settings that name a directory to write to."""
MOST_TRIED = 4096
"""Micro-batches up to which one is looked for that would do."""


def problems_of(config: RunConfig, *, world_size: int | None = None) -> list[str]:
    """Everything that is wrong, one line each. `world_size` is the number of ranks, None where it is not known.

    `strategy=auto` may run where one of those that it stands for may.
    """
    if isinstance(config.strategy, AutoConfig):
        return candidates(config, world_size)[1]
    out_of_range = range_problems(config)
    problems = [
        *out_of_range,
        *_budget(config),
        *_model(config),
        *_data(config),
        *evaluation_problems(config),
        *gate_problems(config),
        *paper_words(config),
        *config.review.problems(),
        *_run(config),
    ]
    problems += [*_base(config), *_schedule(config)]
    if not any(problem.startswith(("batch.", "launcher.", "strategy.")) for problem in out_of_range):
        problems += [*_batch(config, world_size), *sharding_problems(config, world_size)]
    here = config.launcher.name is LauncherName.local
    problems += optimizer_problems(config.optim, config.strategy, str(config.schedule.name), here=here)
    problems += combination_problems(config.tuning, config.strategy, config.optim)
    problems += tracker_problems(config.logging) if here else []
    problems += energy_problems(config.logging, here=here)
    problems += profile_problems(config.profile, config.budget.steps)
    return [*problems, *_tuning(config), *launcher_problems(config)]


def candidates(config: RunConfig, world_size: int | None) -> tuple[list[StrategyConfig], list[str]]:
    """(what `strategy=auto` may become on `world_size` ranks, what is wrong where that is nothing).

    One rank has nothing to share. What is wrong under every strategy is no reason against one of them.
    """
    every, one = every_strategy(config.strategy), world_size == 1
    asked = [each for each in every if world_size is None or (each.name is StrategyName.single) == one]
    found = [(each, problems_of(replace(config, strategy=each), world_size=world_size)) for each in asked]
    always = [line for line in found[0][1] if all(line in lines for _, lines in found)]
    legal = [each for each, lines in found if set(lines) <= set(always)]
    if always or legal:
        return legal, always
    return [], [
        "strategy=auto: no strategy can run this",
        *(f"under {each.name}: {said[0]}" for each, said in found),
    ]


def _budget(config: RunConfig) -> Iterator[str]:
    given = {name: getattr(config.budget, name) for name in ("steps", "epochs", "tokens")}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        text = " ".join(f"budget.{name}={value}" for name, value in given.items()) or "budget: not set"
        others = f"; unset the others with budget.{list(given)[-1]}=null" if given else ", as in budget.epochs=3"
        yield f"{text}: exactly one of budget.steps, budget.epochs and budget.tokens says how long to train{others}"


def _batch(config: RunConfig, world_size: int | None) -> Iterator[str]:
    size, micro = config.batch.get("global"), config.batch.get("micro")
    extra = sorted(set(config.batch) - {"global", "micro"})
    if extra:
        yield f"batch.{extra[0]}: there is no such setting; batch has global and micro (accumulation is derived)"
    if size is None or micro is None:
        yield "batch: needs both batch.global and batch.micro"
        return
    ranks = world_size or 1
    if micro == AUTO:
        if size % ranks:
            legal = " or ".join(f"batch.global={v}" for v in (size // ranks * ranks, -(-size // ranks) * ranks) if v)
            yield f"batch.global={size}: must be a multiple of the {ranks} ranks; set {legal}"
        return
    if size % (micro * ranks):
        step = micro * ranks
        below, above = size // step * step, (size // step + 1) * step
        legal = " or ".join(f"batch.global={value}" for value in (below, above) if value)
        micros = [m for m in range(1, min(micro, size // ranks, MOST_TRIED) + 1) if size % (m * ranks) == 0]
        other = f", or batch.micro={' or '.join(map(str, micros[-4:]))}" if micros else ""
        where = f"{ranks} rank{'s' * (ranks > 1)}" if world_size else "the ranks"
        yield f"batch.global={size}: must be a multiple of batch.micro={micro} x {where} = {step}; set {legal}{other}"


def _model(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.path is None:
        yield "model.path: not set; give a model directory or a hub id, as in model.path=models/smollm2"
    for key in ("path", "tokenizer"):
        value = getattr(model, key)
        path = Path(value or "").expanduser()
        if value is not None and not path.is_dir() and (path.is_file() or not may_be_hub_id(value)):
            what = "is a file" if path.is_file() else "does not exist"
            yield f"model.{key}={value}: {what}; give a model directory, or a hub id such as org/name"
    here = Path(model.path or "").expanduser()
    if model.path and not (here / "config.json").is_file() and (inside := sorted(here.glob("*/config.json"))):
        yield f"model.path={model.path}: holds models, and is none; give one of them, as in model.path={inside[0].parent}"
    yield from model_problems(config.objective, config, read_config(model.path))
    if model.neftune_alpha:
        yield from _noise(config)
    if model.chat_template is not None and not Path(model.chat_template).expanduser().is_file():
        yield f"model.chat_template={model.chat_template}: no such file; give a file with a Jinja template"


def _noise(config: RunConfig) -> Iterator[str]:
    """Where no noise can be added to embeddings."""
    key = f"model.neftune_alpha={config.model.neftune_alpha:g}"
    if family_of(config.objective).kind is ModelKind.encoder_decoder:
        yield f"{key}: is not for encoder-decoder models, whose two sides share embeddings; set it to 0"
    if needs_own_rows(config.tuning):
        yield f"{key}: tuning={config.tuning.name} puts tokens of its own before a document's; set it to 0, or use tuning=lora"


def _base(config: RunConfig) -> Iterator[str]:
    """What is done to the base as it is loaded."""
    model, here = config.model, config.launcher.name is LauncherName.local
    if model.quantisation is not Quantisation.none and here and (missing := missing_package()) is not None:
        yield f"model.quantisation={model.quantisation}: {missing}, or set model.quantisation=none"
    for directory in model.adapters:
        yield from fold_problems(directory)
    method = rows().get(row_of(config.tuning))
    if model.adapters and method is not None and method.adapter and config.export.at_end and not config.export.merge:
        merge = "" if method.no_merge else "set export.merge=true, or "
        yield (
            f"model.adapters={model.adapters}: an adapter trained on top of others does not belong to model.path alone; "
            f"{merge}write the merged base once (shardtune export adapters=... to=...) and tune that"
        )


def _data(config: RunConfig) -> Iterator[str]:
    data = config.data
    named = {"data.path": data.path}
    for split in ("eval", "test"):
        try:
            named.update(sets_of(getattr(data, f"{split}_path"), split).values())
        except ConfigError as error:
            yield from error.problems
    named |= {f"data.sources.{name}.path": source.path for name, source in data.sources.items()}
    named["data.decontamination.paths"] = data.decontamination.paths
    for key, value in named.items():
        for pattern in [] if value is None else value if isinstance(value, list) else [value]:
            path = Path(str(pattern)).expanduser()
            if data.remote and is_address(str(pattern)):
                continue  # found, or not, where it is read: composing reaches no network
            if not is_hub(str(pattern)) and not path.exists() and not glob.glob(str(path), recursive=True):  # noqa: PTH207
                try:
                    expand(pattern, key)
                except DataError as error:
                    reason = str(error).removeprefix(f"{key}={pattern}").lstrip(": ")
                    yield f"{key}={pattern}: {reason}; paths are relative to {Path.cwd()}"
    yield from data_problems(data)
    yield from objective_problems(config.objective, config)


def _resume(config: RunConfig) -> Iterator[str]:
    resume, run_dir = config.run.resume, config.run.dir
    try:
        if run_dir is not None and run_dir.strip():
            resume = settled(places_of(Path(run_dir).expanduser(), config.checkpoint.fallback_dir), resume)
        if resume in ("auto", "never"):
            return
        if problem := refused(resume, places_of(Path(resume).expanduser(), config.checkpoint.fallback_dir)):
            yield problem
    except StorageError as error:
        yield str(error)


def _written(config: RunConfig) -> Iterator[str]:
    """A line for each directory to write to that is an address: it would become a local directory called `s3:`."""
    settings = flat(plain(config))
    for key in WRITTEN:
        directory = settings.get(key)
        if directory is None or "://" not in directory:
            continue
        local = Path(directory)
        way_out = "name a directory, and copy it afterwards"
        if local.exists():  # an earlier version has written there
            way_out = f"the local directory {local} has what was written before: rename it (mv), and name it"
        yield f"{key}={directory}: is an address, and only local directories are written to; {way_out}"


def _run(config: RunConfig) -> Iterator[str]:
    yield from _resume(config)
    yield from _written(config)
    for kind in set(config.run.accept) - set(KINDS):
        near = difflib.get_close_matches(kind, KINDS, n=1)
        yield f"run.accept=[{kind}]: there is no such kind of change; {near[0] if near else 'one of ' + ', '.join(KINDS)}"
    if config.run.dir is not None and not config.run.dir.strip():
        yield "run.dir: is empty; name a directory, or null for the default"
    checkpoint = config.checkpoint
    if checkpoint.every_steps and checkpoint.every_minutes is not None:
        yield (
            f"checkpoint.every_minutes={checkpoint.every_minutes:g}: checkpoint.every_steps={checkpoint.every_steps} says "
            "already when; set one of the two"
        )
    spare, here = checkpoint.fallback_dir, config.launcher.name is LauncherName.local
    if spare is not None and not (spare.strip() and (not here or _writable(Path(spare).expanduser()))):
        yield f"checkpoint.fallback_dir={spare}: must be a directory on another disk that this user can write, or null"
    if config.run.must_fit and config.run.device is Device.cpu:
        yield "run.must_fit=true: asks for the memory of GPUs, and run.device=cpu has none; leave it out"
    if config.run.device is Device.cuda and config.launcher.name is LauncherName.local:
        import torch

        if not torch.cuda.is_available():
            yield "run.device=cuda: no CUDA device is visible here; set run.device=cpu, or check CUDA_VISIBLE_DEVICES"


def _writable(directory: Path) -> bool:
    """Whether it is a directory that can be written, or could be made."""
    try:
        there = next(each for each in (directory, *directory.absolute().parents) if each.exists())
        return there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    except OSError:
        return False


def _schedule(config: RunConfig) -> Iterator[str]:
    schedule, steps = config.schedule, config.budget.steps
    if schedule.name == "wsd" and not schedule.warmup_steps and schedule.warmup_share + schedule.decay_share > 1:
        yield (
            f"schedule.decay_share={schedule.decay_share:g}: with schedule.warmup_share="
            f"{schedule.warmup_share:g} it is more than the whole run; lower one of them"
        )
    if steps is not None and schedule.warmup_steps > steps:
        yield f"schedule.warmup_steps={schedule.warmup_steps}: more than budget.steps={steps}; lower it"


def _tuning(config: RunConfig) -> Iterator[str]:
    kind = family_of(config.objective).kind
    yield from tuning_problems(
        config.tuning,
        RunFacts(
            strategy=config.strategy,
            precision=config.precision,
            data=config.data,
            merge=bool(config.export.merge),
            new_head=kind is ModelKind.classifier,
            two_sides=kind is ModelKind.encoder_decoder,
            new_tokens=bool(config.model.add_tokens),
            quantisation=str(config.model.quantisation),
        ),
    )
