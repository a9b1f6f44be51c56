"""The end of a run: a directory that plain transformers (and peft) loads, written aside and published by a rename.

A whole model is read out of the checkpoint and written by several processes, each its own files, without an engine and
without exchanging a tensor. Base values that training never touched are copied from the base checkpoint, so that a bf16
run does not round them. Refuses a merge that would change more than the adapted layers, and (with `verify`) an export
that does not compute what was trained.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from strategies import atomic_io, shared_files
from strategies.atomic_io import error_summary, make_directories, publish_directory, size_text, space_problem, sync_file
from strategies.errors import ConfigError, ShardtuneError, StorageError
from strategies.runtime import Runtime, call_on_main, first_rank_error, free_host_memory, gather_objects, longer_timeout
from trainer.export.config import ExportConfig, ExportType
from trainer.export.end_tokens import write_endings
from trainer.export.files import (
    ExportInUse,
    clear,
    is_complete,
    open_staging,
    remove_records,
    share_of,
    sole_export,
    write_file,
)
from trainer.export.plan import INDEX_FILE, ExportPlan, plan_files
from trainer.export.tensors import hub_name, stored_type
from trainer.export.trained_model import ModelValues, TrainedModel, one_thread, trained_shapes
from trainer.export.verify import Reference, verify_written
from trainer.model.architecture import TEXT_MODEL_ONLY, text_settings
from trainer.model.base_files import write_record
from trainer.model.compat import needs_own_class
from trainer.reporting.documents.card import write_documents
from trainer.reporting.documents.facts import ModelFacts

SMALL_FILES_BYTES = 2**22
"""Space for the tokenizer, the card and settings."""
SLOWEST_DISK_BYTES_PER_S = 10e6
"""The slowest disk for which ranks wait while one of them writes."""
_REMEDY = "free space and run `shardtune export`. The checkpoints of the run are intact."


def write_export(
    model: TrainedModel,
    *,
    destination: Path,
    config: ExportConfig,
    facts: ModelFacts,
    runtime: Runtime,
    reference: Reference | None = None,
) -> Path:
    """Write `destination` and return it; an earlier export there is replaced. All ranks must call.

    Full tuning and `config.merge` give a whole model, adapters a peft directory beside the unchanged base. `reference`: what
    the trained model computes, to compare the export with; None: it is not compared. Errors, on every rank: StorageError
    (nothing half-written stays), ConfigError for a merge that is not possible, ExportInUse if another process writes there,
    DriftError for an export that computes something else.
    """
    writes_adapter = model.built.tuning.adapter and not config.merge
    staging_dir = destination.with_name(f".{destination.name}.writing")
    error: BaseException | None = None
    values: ModelValues | None = None
    plan: ExportPlan | None = None
    # Plan the files, if a whole model is written.
    try:
        if config.merge and model.built.tuning.adapter:
            _check_mergeable(model)
        if not writes_adapter:
            values = ModelValues(model)
            dtype = _dtype(config, model.base_path)
            plan = plan_files(values, dtype, max_bytes=int(config.max_shard_gib * 2**30))
    except Exception as caught:  # noqa: BLE001 - all ranks are told
        error = caught
    _raise_on_all_ranks(error, None, destination, runtime)

    # Ranks wait for the slowest of them, and for rank 0, which loads what was written.
    most_bytes = bytes_needed(model, plan)
    with longer_timeout(runtime, most_bytes / SLOWEST_DISK_BYTES_PER_S), _locked(destination, runtime):
        # Write the weights or the adapter, then the small files.
        if plan is not None and values is not None:
            _write_weights(plan, values, staging_dir, destination, runtime)
        try:
            if runtime.is_main and plan is None:
                _write_adapter(model, staging_dir, facts)
            if runtime.is_main:
                _write_small_files(model, plan, staging_dir, config, facts)
        except Exception as caught:  # noqa: BLE001 - safetensors and peft have error types of their own; all ranks are told
            error = caught
        _raise_on_all_ranks(error, staging_dir, destination, runtime)

        # Compare with the trained model, and put the directory in its place.
        try:
            if runtime.is_main and reference is not None:
                verify_written(reference, model.built, staging_dir, model.base_path, adapter=writes_adapter)
        except Exception as caught:  # noqa: BLE001 - transformers and peft have error types of their own; all ranks are told
            error = caught
        _raise_on_all_ranks(error, staging_dir, destination, runtime)
        try:
            if runtime.is_main:
                remove_records(staging_dir)
                _publish(staging_dir, destination)
        except OSError as caught:
            error = caught
        _raise_on_all_ranks(error, staging_dir, destination, runtime)
        return destination


@contextmanager
def _locked(destination: Path, runtime: Runtime) -> Iterator[None]:
    """Inside the context no other export is written to `destination`. All ranks must call.

    Errors, on every rank: ExportInUse, StorageError.
    """
    with ExitStack() as lock:
        error: BaseException | None = None
        try:
            if runtime.is_main:
                lock.enter_context(sole_export(destination))
        except (ExportInUse, OSError) as caught:
            error = caught
        _raise_on_all_ranks(error, None, destination, runtime)
        yield


# -- the weights of a whole model, by all ranks ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Staging:
    """What rank 0 found when it opened the staging directory."""

    keeps_files: bool
    problem: str | None
    """Why nothing can be written; None if it can."""


def _write_weights(
    plan: ExportPlan, values: ModelValues, staging_dir: Path, destination: Path, runtime: Runtime
) -> None:
    """Write the files of a plan, each rank its share. All ranks must call. Errors, on every rank: those of `write_export`."""
    writers = _writers(plan, runtime)
    origin = _origin(plan, values.model)

    def open_here() -> _Staging:
        """Make the staging directory, or keep its files from an earlier start of the same export; check the space. On rank 0."""
        keeps_files = open_staging(staging_dir, plan, origin)
        kept_bytes = sum(file.stat().st_size for file in staging_dir.glob("*.safetensors"))
        problem = space_problem(staging_dir, SMALL_FILES_BYTES + plan.size - kept_bytes)
        return _Staging(keeps_files, problem)

    error: BaseException | None = None
    try:
        staging = call_on_main(open_here, runtime)
    except StorageError as caught:
        raise StorageError(f"{caught}; writing the export {destination} failed: {_REMEDY}") from caught
    if staging.problem:
        if runtime.is_main:
            clear(staging_dir)
        raise StorageError(f"{staging.problem}; {_REMEDY}")
    if runtime.is_main:
        _print_writers(plan, writers, runtime)
    try:
        if runtime.rank in writers:
            for file in share_of(plan.files, writers.index(runtime.rank), len(writers)):
                if staging.keeps_files and is_complete(staging_dir, file):
                    print(f"export: {file.name} is kept from an earlier start", flush=True)
                    continue
                write_file(plan, file, values, staging_dir)
    except Exception as caught:  # noqa: BLE001 - safetensors has an error type of its own; all ranks are told
        error = caught
    values.close()
    _raise_on_all_ranks(error, staging_dir, destination, runtime)


def _writers(plan: ExportPlan, runtime: Runtime) -> list[int]:
    """The ranks that write: as many of each host as its memory has room for, at least one. All ranks must call."""
    free_bytes = free_host_memory()
    most_of_host = runtime.local_world_size
    if free_bytes is not None:
        most_of_host = max(1, min(most_of_host, free_bytes // max(1, plan.process_bytes)))
    is_able = gather_objects(runtime.local_rank < most_of_host, runtime)
    able = [rank for rank, able_here in enumerate(is_able) if able_here]
    return able[: len(plan.files)]


def _print_writers(plan: ExportPlan, writers: list[int], runtime: Runtime) -> None:
    """Say how much is written, and by whom, if it is more than one file."""
    num_files = len(plan.files)
    if num_files == 1:
        return
    line = f"export: {size_text(plan.size)} in {num_files} files"
    if runtime.world_size > 1:
        line += f", written by {len(writers)} of {runtime.world_size} processes"
    if len(writers) < min(num_files, runtime.world_size):
        line += f": each holds up to {size_text(plan.process_bytes)}, and the host has no room for more"
    print(line, flush=True)


def _origin(plan: ExportPlan, model: TrainedModel) -> dict[str, Any]:
    """All that the files of an export depend on, as JSON."""
    return {**model.origin, "plan": plan.digest(), "torch": torch.__version__}


def bytes_needed(model: TrainedModel, plan: ExportPlan | None) -> int:
    """About how many bytes an export takes: its tensors, and a little for all else. `plan`: of a whole model."""
    if plan is not None:
        return SMALL_FILES_BYTES + plan.size
    # Each element of an adapter takes at most 4 bytes.
    num_trained = sum(shape.numel() for shape in trained_shapes(model.built).values())
    return SMALL_FILES_BYTES + 4 * num_trained


def _dtype(config: ExportConfig, base_path: str) -> torch.dtype:
    """The type in which a whole model is stored."""
    if config.dtype is ExportType.auto:
        return stored_type(Path(base_path))
    return getattr(torch, str(config.dtype))  # type: ignore[no-any-return]


def _check_mergeable(model: TrainedModel) -> None:
    """Raise ConfigError if the adapter cannot be merged into the base."""
    from trainer.tuning.adapter_files import check_mergeable
    from trainer.tuning.table import method_of

    reason = method_of(model.built.tuning.config).no_merge  # type: ignore[attr-defined]
    if reason:
        raise ConfigError(f"export.merge=true: {reason}; use export.merge=false")
    check_mergeable(model.built.step_module.model, set(trained_shapes(model.built)))


# -- an adapter, and the small files of both, by rank 0 ----------------------------------------------------------------


def _write_adapter(model: TrainedModel, staging_dir: Path, facts: ModelFacts) -> None:
    """Write the adapter's files. One that started by rewriting the base (as PiSSA does) becomes a plain LoRA of double rank."""
    from trainer.tuning.adapter import Adapter
    from trainer.tuning.adapter_files import as_plain_lora, write_adapter

    clear(staging_dir)
    make_directories(staging_dir)
    too_little_space = space_problem(staging_dir, bytes_needed(model, None))
    if too_little_space:
        raise StorageError(f"{too_little_space}; {_REMEDY}")
    tuning: Any = model.built.tuning
    tuned = model.built.step_module.model
    trained = {name: model.trained[name] for name in model.trained}
    # peft's methods are written through peft, others by themselves.
    if isinstance(tuning, Adapter):
        tuning.seed = model.seed
        tuning.update_peft_settings(tuned, trained, model.trained.saved_tensor)
        if tuning.needs_conversion:
            with one_thread():
                trained = as_plain_lora(tuning, trained, model.base_weights())
        write_adapter(tuned, trained, staging_dir, *hub_name(model.base_path), double_rank=tuning.needs_conversion)
    else:
        tuning.write(tuned, trained, staging_dir, *hub_name(model.base_path))
    write_record(staging_dir, (facts.run.identity or {}).get("base") or {})
    if model.built.base_config is not None:
        # The base's own has other positions. Loaders of the adapter build the base by this one.
        model.built.base_config.save_pretrained(str(staging_dir))


def _write_small_files(
    model: TrainedModel, plan: ExportPlan | None, staging_dir: Path, config: ExportConfig, facts: ModelFacts
) -> None:
    """Write the files beside the weights: settings, tokenizer, card and documents. `plan`: of a whole model; None: an adapter.

    Also completes `facts`, of which the documents are written (`own_class`, `resize_to`).
    """
    if plan is not None:
        index = plan.index_json()
        if index is not None:
            (staging_dir / INDEX_FILE).write_text(index, encoding="utf-8")
        _write_settings(model, plan.dtype, staging_dir, facts)
    model.tokenizer.save_pretrained(str(staging_dir))
    if model.built.two_sides is None and model.plain_model.can_generate():
        write_endings(model.tokenizer, staging_dir, model.base_path)
    _note_added_tokens(model, facts, adapter=plan is None)
    if needs_own_class(type(model.built.config)):
        facts.own_class = type(model.plain_model).__name__
    write_documents(staging_dir, config.papers, facts, adapter=plan is None, base_path=model.base_path)


def _write_settings(model: TrainedModel, dtype: torch.dtype, staging_dir: Path, facts: ModelFacts) -> None:
    """Write the `config.json` of a whole model, and the base's generation settings."""
    settings = copy.deepcopy(model.built.config)
    # Of the types in TEXT_MODEL_ONLY only the text part is in memory, but the files hold the whole model.
    if settings.model_type not in TEXT_MODEL_ONLY or not settings.architectures:
        settings.architectures = [type(model.plain_model).__name__]
    settings.dtype = dtype
    # What is written are the numbers that the quantised ones stood for.
    if getattr(settings, "quantization_config", None) is not None:
        del settings.quantization_config
    label_names = facts.run.label_names
    if label_names:
        settings.id2label = dict(enumerate(label_names))
        settings.label2id = {label: number for number, label in enumerate(label_names)}
    settings.save_pretrained(str(staging_dir))
    generation = Path(model.base_path) / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, staging_dir / generation.name)


def _note_added_tokens(model: TrainedModel, facts: ModelFacts, *, adapter: bool) -> None:
    """Set `facts.resize_to` for the model card: how many tokens loaders of an adapter must resize the base to, or None."""
    # A base with spare rows holds the new tokens without a resize.
    num_tokens = len(model.tokenizer)
    has_grown = bool(model.built.new_token_ids) and text_settings(model.built.config).vocab_size == num_tokens
    facts.resize_to = num_tokens if adapter and has_grown else None


# -- errors, and the end -----------------------------------------------------------------------------------------------


def _raise_on_all_ranks(
    error: BaseException | None, staging_dir: Path | None, destination: Path, runtime: Runtime
) -> None:
    """Raise on every rank the error of any rank (`error`: this rank's, or None); return if no rank has one. All ranks must call.

    Before raising, rank 0 deletes `staging_dir`. Errors of reading the base become ConfigError, those of writing StorageError.
    """
    # This rank's error, with advice.
    if error is not None and _is_read_error(error):
        unreadable = ConfigError(
            f"writing the export {destination} failed: a weight file of the base cannot be read "
            f"({error_summary(error)}); bring it back"
        )
        unreadable.__cause__ = error
        error = unreadable
    elif error is not None and (isinstance(error, OSError) or type(error).__name__ == "SafetensorError"):
        cause = error
        remedy = _REMEDY
        if isinstance(cause, OSError) and cause.errno is not None and not shared_files.remedy(cause):
            # Space would not help, for example on a read-only disk.
            remedy = remedy.replace("free space", "choose another directory (to=)")
        error = StorageError(f"{error_summary(cause)}; writing the export {destination} failed: {remedy}")
        error.__cause__ = cause
    # Exchange it with the other ranks.
    failure = first_rank_error(error, runtime)
    if failure is None:
        return
    if runtime.is_main and staging_dir is not None:
        clear(staging_dir)
    if error is not None:
        raise error
    # Another rank met it: only the name of its type and its text are known here.
    error_types = {"StorageError": StorageError, "ConfigError": ConfigError, "ExportInUse": ExportInUse}
    raise error_types.get(failure.kind, ShardtuneError)(failure.text)


def _is_read_error(error: BaseException) -> bool:
    """Whether safetensors could not read a file, which is one of the base. Its errors of reading and writing have one type."""
    return type(error).__name__ == "SafetensorError" and "deserializ" in str(error)


def _publish(staging_dir: Path, destination: Path) -> None:
    """Rename the finished export into place. An earlier export there is moved away first, and deleted last."""
    # safetensors makes its files private, whatever the umask says. The card is written by us, so it has the umask's mode.
    mode = (staging_dir / "README.md").stat().st_mode
    for file in staging_dir.rglob("*"):
        if file.is_file():
            file.chmod(mode)
            sync_file(file)
    old = destination.with_name(f".{destination.name}.old")
    if destination.exists():
        shutil.rmtree(old, ignore_errors=True)
        atomic_io.disk.rename(destination, old)
    publish_directory(staging_dir, destination)
    shutil.rmtree(old, ignore_errors=True)
