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
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strategies import atomic_io, shared_files
from strategies.atomic_io import (
    disk_space_problem,
    error_summary,
    make_directories,
    publish_directory,
    size_text,
    sync_file,
)
from strategies.errors import ConfigError, ShardtuneError, StorageError
from strategies.runtime import (
    Runtime,
    call_on_main,
    first_rank_error,
    free_host_memory_bytes,
    gather_objects,
    longer_timeout,
)
from trainer.export.config import ExportConfig, ExportType
from trainer.export.end_tokens import write_end_tokens
from trainer.export.files import (
    ExportInUse,
    exclusive_export_lock,
    files_of_writer,
    is_file_complete,
    open_export_staging,
    remove_leftovers,
    remove_records,
    write_export_file,
)
from trainer.export.plan import INDEX_FILE, ExportPlan, plan_files
from trainer.export.tensors import hub_id_and_commit, stored_dtype
from trainer.export.trained_model import ModelValues, TrainedModel, one_thread, trained_shapes
from trainer.export.verify import ProbeReference, verify_against_reference
from trainer.model.architecture import TEXT_ONLY_MODEL_TYPES, text_model_config
from trainer.model.base_files import write_base_record
from trainer.model.compat import needs_own_class
from trainer.reporting.documents.card import write_documents
from trainer.reporting.documents.facts import ModelFacts

SMALL_FILES_BYTES = 2**22
"""Space that is set aside for the tokenizer, the model card and settings."""
SLOWEST_DISK_BYTES_PER_S = 10e6
"""Ranks wait for each other as long as a disk of this speed would take to write the export."""
_RUN_EXPORT_AGAIN = "run `shardtune export`. The checkpoints of the run are intact."
_FREE_SPACE_REMEDY = f"free space and {_RUN_EXPORT_AGAIN}"
_OTHER_DIRECTORY_REMEDY = f"choose another directory (to=) and {_RUN_EXPORT_AGAIN}"


def write_export(
    model: TrainedModel,
    *,
    destination: Path,
    config: ExportConfig,
    facts: ModelFacts,
    runtime: Runtime,
    reference: ProbeReference | None = None,
) -> Path:
    """Write the model that a run has trained into a directory that plain transformers (and peft) loads; all ranks must call.

    Full tuning and `config.merge` give a whole model, which several ranks write; else an adapter is written without its base.
    It is written aside, and renamed to `destination` at the end; an earlier export there is replaced. Returns `destination`.

    `facts`: what the model card and documents say; completed here. `reference`: what the trained model computes, to compare
    the export with; None: it is not compared.

    Raises, on every rank: StorageError (nothing half-written stays), ConfigError for a merge that is not possible or a base
    that cannot be read, ExportInUse if another process writes there. If the export computes something else than the trained
    model, rank 0 raises DriftError, and the others ShardtuneError.
    """
    writes_adapter = model.built.tuning.adapter and not config.merge
    staging_dir = destination.with_name(f".{destination.name}.writing")
    # Only a whole model has a plan and values: for an adapter both stay None.
    model_values: ModelValues | None = None
    plan: ExportPlan | None = None
    with _raising_on_all_ranks(destination, runtime):
        if config.merge and model.built.tuning.adapter:
            _check_adapter_mergeable(model)
        if not writes_adapter:
            model_values = ModelValues(model)
            dtype = _stored_dtype(config, model.base_path)
            plan = plan_files(model_values, dtype, max_file_bytes=int(config.max_shard_gib * 2**30))

    # Ranks wait for the slowest of them, and for rank 0, which loads what was written.
    wait_s = export_bytes(model, plan) / SLOWEST_DISK_BYTES_PER_S
    with longer_timeout(runtime, wait_s), _lock_destination(destination, runtime):
        if plan is not None and model_values is not None:
            _write_weights(plan, model_values, staging_dir, destination, runtime)
        with _raising_on_all_ranks(destination, runtime, staging_dir):
            if runtime.is_main and plan is None:
                _write_adapter(model, staging_dir, facts)
            if runtime.is_main:
                _write_small_files(model, plan, staging_dir, config, facts)
        with _raising_on_all_ranks(destination, runtime, staging_dir):
            # Before the export gets its name: one that computes something else is never published.
            if runtime.is_main and reference is not None:
                verify_against_reference(reference, model.built, staging_dir, model.base_path, adapter=writes_adapter)
        with _raising_on_all_ranks(destination, runtime, staging_dir, caught=OSError):
            if runtime.is_main:
                remove_records(staging_dir)
                _publish_export(staging_dir, destination)
        return destination


@contextmanager
def _lock_destination(destination: Path, runtime: Runtime) -> Iterator[None]:
    """Inside the context no other process writes an export to `destination`. All ranks must call; rank 0 holds the lock.

    Raises, on every rank: ExportInUse if another process writes there, StorageError if it cannot be locked.
    """
    with ExitStack() as lock:
        with _raising_on_all_ranks(destination, runtime, caught=(ExportInUse, OSError)):
            if runtime.is_main:
                lock.enter_context(exclusive_export_lock(destination))
        yield


# -- the weights of a whole model, by all ranks ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Staging:
    """The state of the staging directory when rank 0 had opened it; the same on every rank."""

    may_have_complete_files: bool
    """Whether an earlier start of the same export was cut short, so that files which it completed are kept."""
    problem: str | None
    """Why nothing can be written; None if it can."""


def _write_weights(
    plan: ExportPlan, model_values: ModelValues, staging_dir: Path, destination: Path, runtime: Runtime
) -> None:
    """Write the weight files of a whole model, each writing rank its share, and close `model_values`. All ranks must call.

    Files that an earlier start of the same export completed are kept. Raises, on every rank: StorageError if there is too
    little space or the disk fails, ConfigError if the base cannot be read. The staging directory is removed then.
    """
    writer_ranks = _writer_ranks(plan, runtime)
    staging = _open_staging_on_main(plan, model_values.model, staging_dir, destination, runtime)
    if runtime.is_main:
        _print_writers(plan, writer_ranks, runtime)
    with _raising_on_all_ranks(destination, runtime, staging_dir), closing(model_values):
        if runtime.rank not in writer_ranks:
            return
        for file in files_of_writer(plan.files, writer_ranks.index(runtime.rank), len(writer_ranks)):
            if staging.may_have_complete_files and is_file_complete(staging_dir, file):
                print(f"export: {file.name} is kept from an earlier start", flush=True)
            else:
                write_export_file(plan, file, model_values, staging_dir)


def _open_staging_on_main(
    plan: ExportPlan, model: TrainedModel, staging_dir: Path, destination: Path, runtime: Runtime
) -> _Staging:
    """Open the directory that the export is written to before it gets its name, and check its free space, both on rank 0.

    Returns what was found, on every rank. All ranks must call. Raises StorageError on every rank if the directory cannot be
    opened, or if the export does not fit; in the second case the directory is removed.
    """
    # All that the files of the export depend on: only one of the same origin may keep files that it finished.
    origin = {**model.origin, "plan": plan.plan_sha256(), "torch": torch.__version__}

    def open_and_check_space() -> _Staging:
        may_have_complete_files = open_export_staging(staging_dir, plan, origin)
        kept_bytes = sum(file.stat().st_size for file in staging_dir.glob("*.safetensors"))
        problem = disk_space_problem(staging_dir, SMALL_FILES_BYTES + plan.num_bytes - kept_bytes)
        return _Staging(may_have_complete_files=may_have_complete_files, problem=problem)

    try:
        # On rank 0 alone; every rank gets what it returns, or the StorageError.
        staging = call_on_main(open_and_check_space, runtime)
    except StorageError as error:
        raise StorageError(f"writing the export {destination} failed ({error}): {_FREE_SPACE_REMEDY}") from error
    if staging.problem:
        if runtime.is_main:
            remove_leftovers(staging_dir)
        raise StorageError(f"{staging.problem}; {_FREE_SPACE_REMEDY}")
    return staging


def _writer_ranks(plan: ExportPlan, runtime: Runtime) -> list[int]:
    """Choose the ranks that write, at most one for each file: as many of each host as its memory has room for, at least one.

    `plan.process_bytes` is the most that a writer holds at a time. All ranks must call.
    """
    free_bytes = free_host_memory_bytes()
    # All of them if the free memory is not known.
    max_writers_of_host = runtime.local_world_size
    if free_bytes is not None:
        max_writers_of_host = max(1, min(max_writers_of_host, free_bytes // max(1, plan.process_bytes)))
    has_room_by_rank = gather_objects(runtime.local_rank < max_writers_of_host, runtime)
    ranks_with_room = [rank for rank, has_room in enumerate(has_room_by_rank) if has_room]
    return ranks_with_room[: len(plan.files)]


def _print_writers(plan: ExportPlan, writer_ranks: list[int], runtime: Runtime) -> None:
    """Tell the user how much is written, by how many processes, and why not by more; nothing for an export of one file."""
    num_files = len(plan.files)
    if num_files == 1:
        return
    line = f"export: {size_text(plan.num_bytes)} in {num_files} files"
    if runtime.world_size > 1:
        line += f", written by {len(writer_ranks)} of {runtime.world_size} processes"
    if len(writer_ranks) < min(num_files, runtime.world_size):
        line += f": each holds up to {size_text(plan.process_bytes)}, and the host has no room for more"
    print(line, flush=True)


def export_bytes(model: TrainedModel, plan: ExportPlan | None) -> int:
    """About how many bytes an export takes on the disk: its tensors, and `SMALL_FILES_BYTES` for the rest.

    `plan`: of a whole model; None for an adapter, whose parameters take at most 4 bytes each.
    """
    if plan is not None:
        return SMALL_FILES_BYTES + plan.num_bytes
    num_trained_parameters = sum(shape.numel() for shape in trained_shapes(model.built).values())
    return SMALL_FILES_BYTES + 4 * num_trained_parameters


def _stored_dtype(config: ExportConfig, base_path: str) -> torch.dtype:
    """The dtype in which a whole model is stored: that of the base if `export.dtype=auto`."""
    if config.dtype is ExportType.auto:
        return stored_dtype(Path(base_path))
    return getattr(torch, str(config.dtype))  # type: ignore[no-any-return]


def _check_adapter_mergeable(model: TrainedModel) -> None:
    """Refuse a merge that the adapter's method does not allow, or that would change other layers too.

    Raises ConfigError.
    """
    from trainer.tuning.adapter_files import check_adapters_mergeable
    from trainer.tuning.table import method_of

    reason = method_of(model.built.tuning.config).merge_refusal  # type: ignore[attr-defined]
    if reason:
        raise ConfigError(f"export.merge=true: {reason}; use export.merge=false")
    check_adapters_mergeable(model.built.step_module.model, set(trained_shapes(model.built)))


# -- an adapter, and the small files of both, by rank 0 ----------------------------------------------------------------


def _write_adapter(model: TrainedModel, staging_dir: Path, facts: ModelFacts) -> None:
    """Write the files of an adapter into a new staging directory; only rank 0 calls.

    Raises StorageError if there is too little space. If training changed the positions of the base, its config.json is written
    too: loaders of the adapter build the base by that.
    """
    from trainer.tuning.adapter import Adapter

    # An export that was cut short may have left the directory.
    remove_leftovers(staging_dir)
    make_directories(staging_dir)
    too_little_space = disk_space_problem(staging_dir, export_bytes(model, plan=None))
    if too_little_space:
        raise StorageError(f"{too_little_space}; {_FREE_SPACE_REMEDY}")
    tuning: Any = model.built.tuning
    # Reads all, which are few for an adapter.
    trained = {name: model.trained[name] for name in model.trained}
    # Methods that put adapters into layers, such as LoRA; others, such as virtual tokens, have a writer of their own.
    if isinstance(tuning, Adapter):
        _write_adapter_by_peft(model, tuning, trained, staging_dir)
    else:
        hub_id, commit = hub_id_and_commit(model.base_path)
        tuning.save_adapter(model.built.step_module.model, trained, staging_dir, hub_id, commit)
    base_identity = (facts.run.identity or {}).get("base") or {}
    # By it, loaders of the adapter can tell whether their base is that of the training.
    write_base_record(staging_dir, base_identity)
    if model.built.base_config is not None:
        model.built.base_config.save_pretrained(str(staging_dir))


def _write_adapter_by_peft(model: TrainedModel, tuning: Any, trained: dict[str, Tensor], staging_dir: Path) -> None:
    """Write an adapter's settings and tensors as peft does. `trained`: its tensors, by name in the run's module.

    An adapter that started by rewriting the base (as PiSSA does) is written as a plain LoRA of double rank, which works on the
    unchanged base: its initial values, which are computed again with the run's seed, are taken off.
    """
    from trainer.tuning.adapter_files import as_plain_lora, write_adapter

    tuned_model = model.built.step_module.model
    tuning.seed = model.seed  # which an engine sets when it asks for initial values
    tuning.update_peft_settings(tuned_model, trained, model.trained.saved_tensor)
    if tuning.needs_conversion:
        with one_thread():
            trained = as_plain_lora(tuning, trained, model.base_weights())
    hub_id, commit = hub_id_and_commit(model.base_path)
    write_adapter(tuned_model, trained, staging_dir, hub_id, commit, double_rank=tuning.needs_conversion)


def _write_small_files(
    model: TrainedModel, plan: ExportPlan | None, staging_dir: Path, config: ExportConfig, facts: ModelFacts
) -> None:
    """Write the files beside the weights: settings, tokenizer, model card and documents; only rank 0 calls.

    `plan`: of a whole model, which also gets its index, config.json and generation settings; None for an adapter. Sets
    `custom_auto_class` and `resize_to` of `facts`, which the documents then state.
    """
    is_adapter = plan is None  # only whole models are planned
    if plan is not None:
        index_json = plan.index_json()
        if index_json is not None:
            (staging_dir / INDEX_FILE).write_text(index_json, encoding="utf-8")
        _write_model_config(model, plan.dtype, staging_dir, facts)
    model.tokenizer.save_pretrained(str(staging_dir))
    # No encoder-decoder and no classifier.
    writes_chats = model.built.encoder_decoder is None and model.model_without_adapter.can_generate()
    if writes_chats:
        write_end_tokens(model.tokenizer, staging_dir, model.base_path)
    facts.resize_to = _num_tokens_to_resize_to(model) if is_adapter else None
    # The card then names the model's own class, since AutoModelForCausalLM finds it in no other program.
    if needs_own_class(type(model.built.config)):
        facts.custom_auto_class = type(model.model_without_adapter).__name__
    write_documents(staging_dir, config.papers, facts, adapter=is_adapter, base_path=model.base_path)


def _write_model_config(model: TrainedModel, dtype: torch.dtype, staging_dir: Path, facts: ModelFacts) -> None:
    """Write the `config.json` of a whole model, and copy the base's generation settings if it has any.

    The config is that of the run, with the stored type, the labels of a classifier, and without quantisation: the files hold
    dequantised numbers. `facts`: has the names of the labels.
    """
    model_config = copy.deepcopy(model.built.config)
    # Of the types in TEXT_ONLY_MODEL_TYPES only the text part is in memory, but the files hold the whole model, which the
    # base's `architectures` name.
    if model_config.model_type not in TEXT_ONLY_MODEL_TYPES or not model_config.architectures:
        model_config.architectures = [type(model.model_without_adapter).__name__]
    model_config.dtype = dtype
    if getattr(model_config, "quantization_config", None) is not None:
        del model_config.quantization_config
    label_names = facts.run.label_names
    if label_names:
        model_config.id2label = dict(enumerate(label_names))
        model_config.label2id = {label: index for index, label in enumerate(label_names)}
    model_config.save_pretrained(str(staging_dir))
    generation_file = Path(model.base_path) / "generation_config.json"
    if generation_file.is_file():
        shutil.copyfile(generation_file, staging_dir / generation_file.name)


def _num_tokens_to_resize_to(model: TrainedModel) -> int | None:
    """How many tokens loaders of an adapter must resize the base to, for the model card; None if they need not.

    A base with spare rows in its embeddings holds new tokens without a resize.
    """
    num_tokens = len(model.tokenizer)
    has_grown = bool(model.built.new_token_ids) and text_model_config(model.built.config).vocab_size == num_tokens
    return num_tokens if has_grown else None


# -- errors, and the end -----------------------------------------------------------------------------------------------


@contextmanager
def _raising_on_all_ranks(
    destination: Path,
    runtime: Runtime,
    staging_dir: Path | None = None,
    *,
    caught: type[Exception] | tuple[type[Exception], ...] = Exception,
) -> Iterator[None]:
    """Around work that may fail on one rank: its error is raised on every rank, so that no rank waits for one that has left.

    All ranks must call; a rank may have nothing to do. safetensors, transformers and peft have error types of their own, so by
    default every Exception is `caught`. What is raised, and when `staging_dir` is removed: see `raise_if_any_rank_failed`.
    """
    error: Exception | None = None
    try:
        yield
    except caught as raised:
        error = raised
    raise_if_any_rank_failed(error, staging_dir, destination, runtime)


def raise_if_any_rank_failed(
    error: BaseException | None, staging_dir: Path | None, destination: Path, runtime: Runtime
) -> None:
    """Raise on every rank the error of any rank; return if no rank has one. All ranks must call.

    - A rank with an error of its own (`error`) raises that. Errors of reading the base become ConfigError, those of writing
      StorageError.
    - Other ranks (`error` is None) raise one with the same text: of the same type for StorageError, ConfigError and
      ExportInUse, else a ShardtuneError.

    Before raising, rank 0 removes `staging_dir`; None: nothing is removed.
    """
    if error is not None:
        error = _as_user_error(error, destination)
    first_failure = first_rank_error(error, runtime)
    if first_failure is None:
        return
    if runtime.is_main and staging_dir is not None:
        remove_leftovers(staging_dir)
    if error is not None:
        raise error
    # Another rank met it: only the name of its type and its text are known here.
    error_types = {"StorageError": StorageError, "ConfigError": ConfigError, "ExportInUse": ExportInUse}
    raise error_types.get(first_failure.kind, ShardtuneError)(first_failure.text)


def _as_user_error(error: BaseException, destination: Path) -> BaseException:
    """Turn an error of reading the base or writing an export into one that tells the user what to do.

    - The base cannot be read: ConfigError.
    - The export cannot be written: StorageError. To free space is advised only if that would help.
    - Anything else: the error itself.
    """
    shown_error: BaseException
    if _is_error_of_reading_base(error):
        shown_error = ConfigError(
            f"writing the export {destination} failed: a weight file of the base cannot be read "
            f"({error_summary(error)}); bring it back"
        )
    elif isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
        remedy = _FREE_SPACE_REMEDY
        if isinstance(error, OSError) and error.errno is not None and not shared_files.free_space_advice(error):
            remedy = _OTHER_DIRECTORY_REMEDY  # space would not help, for example on a read-only disk
        shown_error = StorageError(f"writing the export {destination} failed ({error_summary(error)}): {remedy}")
    else:
        return error
    shown_error.__cause__ = error
    return shown_error


def _is_error_of_reading_base(error: BaseException) -> bool:
    """Whether safetensors could not read a file, which is one of the base. Its errors of reading and writing have one type."""
    return type(error).__name__ == "SafetensorError" and "deserializ" in str(error)


def _publish_export(staging_dir: Path, destination: Path) -> None:
    """Give the finished export its name, by a rename. An earlier export there is moved away first, and deleted last.

    If the process is killed between the two renames, the earlier one is in `.NAME.old`, and the finished one still in staging.
    """
    # safetensors makes its files private, whatever the umask says. The card is written by us, so it has the umask's mode.
    mode = (staging_dir / "README.md").stat().st_mode
    for file in staging_dir.rglob("*"):
        if file.is_file():
            file.chmod(mode)
            sync_file(file)
    earlier_export = destination.with_name(f".{destination.name}.old")
    if destination.exists():
        shutil.rmtree(earlier_export, ignore_errors=True)
        # Not synced here: `publish_directory` syncs the parent of both.
        atomic_io.disk.rename(destination, earlier_export)
    publish_directory(staging_dir, destination)
    shutil.rmtree(earlier_export, ignore_errors=True)
