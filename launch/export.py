"""`shardtune export`: turn a checkpoint of a run into a model directory that plain transformers (and peft) loads.

    shardtune export runs/x [checkpoint=last|best|<step>] [to=<dir>] [merge=true] [dtype=bfloat16] [--verify]

    shardtune export adapters=[<dir>,<dir>] to=<dir> [weights=[..]] [combine=cat]     (launch/combine.py)

One process rebuilds the run from its frozen configuration, whatever strategy and number of ranks it trained with. `to`
defaults to `<run.dir>/export`, which is replaced; any other directory must be new or empty.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.export_words import destination, parse
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from strategies.runtime import Runtime
    from trainer.checkpoints.config import CheckpointConfig
    from trainer.config.run import RunConfig

KEYS = ("run.dir", "checkpoint", "to", "merge", "dtype", "max_shard_gib", "verify")


@dataclass(slots=True)
class Asked:
    """What the command line asks for."""

    run_dir: Path
    checkpoint: Path
    to: Path


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code. Errors: ConfigError, StorageError, DriftError."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    from launch import combine

    if combine.wanted(argv):
        return combine.main(argv)

    from launch.compose import load_frozen

    words, problems = parse(argv, KEYS)
    if problems:
        raise ConfigError(problems)
    if "run.dir" not in words:
        raise ConfigError("run.dir: not set; name the directory of a run, as in shardtune export runs/x")
    run_dir = Path(words["run.dir"]).expanduser()
    config = load_frozen(run_dir / "config.yaml")
    settle(config, words)
    asked = Asked(
        run_dir,
        find_checkpoint(run_dir, words.get("checkpoint", "last"), config.checkpoint),
        destination(run_dir, words.get("to")),
    )
    print(f"exporting {asked.checkpoint} to {asked.to}", flush=True)
    export(config, asked)
    print(f"model: {asked.to}")
    return 0


def settle(config: RunConfig, words: dict[str, str]) -> None:
    """Put what was asked for into the run's own export settings, and make it a run of one process."""
    from strategies.base import SingleConfig
    from trainer.config.run import Device
    from trainer.export.config import ExportType

    problems = []
    for key in ("merge", "verify"):
        if (value := words.get(key, "false").lower()) in ("true", "false"):
            setattr(config.export, key, value == "true" or (key not in words and getattr(config.export, key)))
        else:
            problems.append(f"{key}={words[key]}: must be true or false")
    if "dtype" in words:
        try:
            config.export.dtype = ExportType(words["dtype"])
        except ValueError:
            problems.append(f"dtype={words['dtype']}: must be one of {', '.join(ExportType)}")
    if "max_shard_gib" in words:
        try:
            config.export.max_shard_gib = float(words["max_shard_gib"])
        except ValueError:
            config.export.max_shard_gib = 0.0
        if not config.export.max_shard_gib > 0:
            problems.append(f"max_shard_gib={words['max_shard_gib']}: must be a number of GiB above 0")
    if problems:
        raise ConfigError(problems)
    config.strategy, config.run.device = SingleConfig(), Device.cpu  # the host has the room, and values are only copied


def find_checkpoint(run_dir: Path, asked: str, config: CheckpointConfig) -> Path:
    """The sealed directory of `last`, `best` or a step. Errors: ConfigError where there is none, or it is damaged."""
    from trainer.checkpoints.places import places_of, published
    from trainer.checkpoints.seal import verify

    there = dict(published(places_of(run_dir, config.fallback_dir)))
    if not there:
        raise ConfigError(
            f"run.dir={run_dir}: has no checkpoints; they are written at the end (checkpoint.save_final=true) and as "
            "checkpoint.every_steps or checkpoint.every_minutes say"
        )
    known = f"its checkpoints are {', '.join(map(str, there))}"
    if asked == "best":
        step = best_step(there)
        if step not in there:
            raise ConfigError(f"checkpoint=best: {run_dir} kept none (it needs evaluation.every_steps); {known}")
    elif asked == "last":
        step = max(there)
    elif asked.isdigit() and int(asked) in there:
        step = int(asked)
    else:
        raise ConfigError(f"checkpoint={asked}: must be last, best or a step; {known}")
    path = there[step]
    if problem := verify(path):
        raise ConfigError(f"checkpoint={asked}: {path} {problem}; {known}")
    return path


def best_step(there: dict[int, Path]) -> int | None:
    """The best step, as the newest checkpoint says that can be read; a line for each newer one. Errors: ConfigError."""
    from strategies.saving import PROGRESS
    from strategies.state import read_header
    from trainer.checkpoints.seal import verify

    problems = []
    for step in sorted(there, reverse=True):
        if (problem := verify(there[step], only=PROGRESS)) is None:
            return read_header(there[step]).progress.best_step
        problems.append(f"{there[step].name} {problem}")
        print(f"checkpoint=best: {problems[-1]}; asking the one before it", flush=True)
    raise ConfigError(f"checkpoint=best: no checkpoint can say which is the best ({'; '.join(problems[:3])})")


def export(config: RunConfig, asked: Asked) -> None:
    """Rebuild, load and write, as one process. Errors: those of building, loading and writing."""
    from strategies import runtime as processes

    runtime = processes.start("cpu", timeout_s=config.run.timeout_s, threads=config.run.threads)
    try:
        _export(config, asked, runtime)
    finally:
        processes.stop()


def _export(config: RunConfig, asked: Asked, runtime: Runtime) -> None:
    from strategies.base import Precision
    from trainer.build import build_engine, build_loader, prepare_data
    from trainer.export.card import CardFacts
    from trainer.export.write import write_export
    from trainer.model.loading import load_tokenizer, weights_directory

    tokenizer = load_tokenizer(config.model)
    record = _record(asked.run_dir)
    precision = Precision(record.get("precision", config.precision))
    if precision in (
        Precision.auto,
        Precision.fp16,
    ):  # fp16 cannot be computed on a CPU, and masters are float32 anyway
        precision = Precision.fp32
    data = prepare_data(config, tokenizer)
    engine, built, _ = build_engine(config, tokenizer, data, precision, runtime)
    if built.step_module.around_update is not None:
        build_loader(config, data, built, engine, runtime)  # tells it the length of the run
    progress = engine.load(asked.checkpoint)
    outcome = record.get("outcome") or {}
    same = (outcome.get("progress") or {}).get("step") == progress.step
    write_export(
        engine,
        built,
        tokenizer,
        base_path=str(weights_directory(config.model)),
        destination=asked.to,
        config=config.export,
        card=CardFacts(
            config_yaml=(asked.run_dir / "config.yaml").read_text(encoding="utf-8"),
            facts={**record, "label_names": data.label_names},
            # Only those of this very checkpoint.
            before=outcome.get("before") or {} if same else {},
            after=outcome.get("after") or {} if same else {},
            tokens_trained=progress.tokens,
            steps=progress.step,
        ),
        runtime=runtime,
    )


def _record(run_dir: Path) -> dict[str, Any]:
    try:
        return json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
