"""The end of a run: a directory that plain transformers (and peft) loads, written aside and published by a rename.

A whole model is streamed tensor by tensor into safetensors files; rank 0 holds one file's worth at a time. Base values
that training never touched are copied from the base checkpoint, so that a bf16 run does not round them. Refuses a fold
that would change more than the adapted layers, and (with `verify`) an export that does not compute what was trained.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from strategies import atomic_io, shared_files
from strategies.atomic_io import error_summary, make_directories, missing_space, publish, sync_file
from strategies.compat.modules import persistent_buffers
from strategies.errors import ConfigError, ShardtuneError, StorageError
from strategies.parameters import element_counts, trainable_parameters
from strategies.runtime import Runtime, first_error, longer_timeout
from trainer.export.config import ExportConfig, ExportType
from trainer.export.end_tokens import write_endings
from trainer.export.tensors import hub_name, stored_type, write_tensors
from trainer.export.verify import verify_written
from trainer.model.architecture import TEXT_MODEL_ONLY, text_settings
from trainer.model.base_files import write_record
from trainer.model.weights import BaseWeights
from trainer.reporting.documents.card import write_documents
from trainer.reporting.documents.facts import ModelFacts

if TYPE_CHECKING:
    from strategies.base import Engine
    from trainer.step import Built

SMALL_FILES_BYTES = 2**22
"""Space for the tokenizer, the card and settings."""
SLOWEST_DISK_BYTES_PER_S = 10e6
"""The slowest disk for which ranks wait while one of them writes."""
_REMEDY = "free space and run `shardtune export`. The checkpoints of the run are intact."


def write_export(
    engine: Engine,
    built: Built,
    tokenizer: Any,
    *,
    base_path: str,
    destination: Path,
    config: ExportConfig,
    facts: ModelFacts,
    runtime: Runtime,
) -> Path:
    """Write `destination` and return it; an earlier export there is replaced. All ranks must call.

    Full tuning and `config.merge` give a whole model, adapters a peft directory beside the unchanged base in
    `base_path`. Errors, on every rank: StorageError (nothing half-written stays), ConfigError for a fold that is not
    possible, DriftError where `config.verify` finds that the export computes something else.
    """
    adapter = built.tuning.adapter and not config.merge
    # Rank 0 alone writes, syncs, and loads what it wrote, while the others wait. At most 4 bytes are written for each element.
    most_bytes = 4 * sum(element_counts(built.step_module).values())
    with longer_timeout(runtime, most_bytes / SLOWEST_DISK_BYTES_PER_S):
        staging_dir = destination.with_name(f".{destination.name}.writing")
        error: BaseException | None = None
        tensors = _GatheredTensors(engine, built, base_path, adapter=adapter)
        try:
            if config.merge and built.tuning.adapter:
                _check_mergeable(built)
            if runtime.is_main:
                clear(staging_dir)
                make_directories(staging_dir)
                too_little_space = missing_space(staging_dir, bytes_needed(built, config, base_path, adapter=adapter))
                if too_little_space:
                    raise StorageError(f"{too_little_space}; {_REMEDY}")
                if adapter:
                    _write_adapter(built, tensors.trained(), staging_dir, base_path)
                    write_record(staging_dir, (facts.run.identity or {}).get("base") or {})
                    if built.base_config is not None:
                        # The base's own has other positions. Loaders of the adapter build the base by this one.
                        built.base_config.save_pretrained(str(staging_dir))
                else:
                    _write_model(built, tensors.as_stored(), staging_dir, base_path, config, facts)
                tokenizer.save_pretrained(str(staging_dir))
                if built.two_sides is None and _model_without_adapter(built).can_generate():
                    write_endings(tokenizer, staging_dir, base_path)
                _note_added_tokens(built, tokenizer, facts, adapter)
                write_documents(staging_dir, config.papers, facts, adapter=adapter, base_path=base_path)
        except Exception as caught:  # noqa: BLE001 - safetensors and peft have error types of their own; all ranks are told
            error = caught
        tensors.exhaust()
        _raise_on_all_ranks(error, staging_dir, destination, runtime)

        if config.verify:
            error = verify_written(engine, built, tokenizer, staging_dir, base_path, adapter=adapter, runtime=runtime)
            _raise_on_all_ranks(error, staging_dir, destination, runtime)
        try:
            if runtime.is_main:
                _publish(staging_dir, destination)
        except OSError as caught:
            error = caught
        _raise_on_all_ranks(error, staging_dir, destination, runtime)
        return destination


def clear(directory: Path) -> None:
    """Remove what an earlier export left under this name, as far as that goes; of a link nothing but the link.

    A downloaded run can hold a link there, and the export would be written over the files that it leads to.
    """
    if directory.is_symlink():
        directory.unlink()
    shutil.rmtree(directory, ignore_errors=True)


def _raise_on_all_ranks(error: BaseException | None, staging_dir: Path, destination: Path, runtime: Runtime) -> None:
    """Raise on every rank what any rank met; nothing half-written stays. All ranks must call, those without an error too."""
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
    failure = first_error(error, runtime)
    if failure is None:
        return
    if runtime.is_main:
        shutil.rmtree(staging_dir, ignore_errors=True)
    if error is not None:
        raise error
    # Another rank met it: only the name of its type and its text are known here.
    error_types = {"StorageError": StorageError, "ConfigError": ConfigError}
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
    publish(staging_dir, destination)
    shutil.rmtree(old, ignore_errors=True)


def bytes_needed(built: Built, config: ExportConfig, base_path: str, *, adapter: bool) -> int:
    """About how many bytes an export takes: its tensors, and a little for all else."""
    counts = element_counts(built.step_module)
    if adapter:
        # Each element of an adapter takes at most 4 bytes.
        trainable_names = {name for name, _ in trainable_parameters(built.step_module)}
        num_trained = sum(count for name, count in counts.items() if name in trainable_names)
        return SMALL_FILES_BYTES + 4 * num_trained
    return SMALL_FILES_BYTES + _dtype(config, base_path).itemsize * sum(counts.values())


def _dtype(config: ExportConfig, base_path: str) -> torch.dtype:
    """The type in which a whole model is stored."""
    if config.dtype is ExportType.auto:
        return stored_type(Path(base_path))
    return getattr(torch, str(config.dtype))  # type: ignore[no-any-return]


class _GatheredTensors:
    """The engine's collective gathers in a fixed order. If rank 0 stops early, `exhaust` still joins the rest on all ranks."""

    def __init__(self, engine: Engine, built: Built, base_path: str, *, adapter: bool) -> None:
        self.built = built
        self.base_path = base_path
        self._trained: Iterator[tuple[str, Tensor | None]] = iter(())
        """Trainable tensors by name, where the tuning method is an adapter. Tensors are None on ranks other than 0."""
        self._all: Iterator[tuple[str, Tensor | None]] = iter(())
        """All tensors by name, where a whole model is written."""
        if built.tuning.adapter:
            self._trained = engine.gather(trainable_only=True)
        if not adapter:
            self._all = engine.gather(trainable_only=False)

    def trained(self) -> dict[str, Tensor]:
        """Full trainable tensors of an adapter method, by plain name."""
        return {name: tensor for name, tensor in self._trained if tensor is not None}

    def as_stored(self) -> Iterator[tuple[str, Tensor]]:
        """The whole model as the base's files name and shape it, with the weights that its architecture ignores."""
        base = self.built.base_weights(Path(self.base_path))
        conversions = base.conversions
        yield from conversions.stored_again(self._whole_model(base))
        for name in conversions.carried():
            yield name, conversions.files.rows(name)

    def _whole_model(self, base: BaseWeights) -> Iterator[tuple[str, Tensor]]:
        """The whole model under its base names, adapters folded in; frozen values exact, from the base checkpoint."""
        from trainer.tuning.adapter_files import AdapterMerger

        tuning = self.built.tuning
        model = self.built.step_module.model
        trainable_names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        merger: AdapterMerger | None = None
        if tuning.adapter:
            merger = AdapterMerger(tuning, model, self.trained(), base)  # type: ignore[arg-type]
        for name, tensor in self._all:
            assert tensor is not None
            if tuning.owns(name):
                continue
            if name in trainable_names:
                yield tuning.base_name(name), tensor
                continue
            weight: Tensor | None = _base_or_live_value(base, tuning.base_name(name), tensor)
            if merger is not None and weight is not None:
                weight = merger.tensor(name, weight)
            if weight is not None:
                yield tuning.base_name(name), weight
        for name, buffer in persistent_buffers(model):
            if not tuning.owns(name):
                yield tuning.base_name(name), buffer.detach().cpu()

    def exhaust(self) -> None:
        """Join what is left of the gathers. All ranks must call."""
        for gather in (self._trained, self._all):
            for _ in gather:
                pass


def _base_or_live_value(base: BaseWeights, name: str, live: Tensor) -> Tensor:
    """The base's own value, or the live one of a parameter that it does not have (a new head)."""
    if name in base.quantised:
        return base.full_tensor(name)
    if base.resolve(name) is None or base.shape(name) != tuple(live.shape):
        return live
    return base.read_slice(name, 0, math.prod(live.shape)).view(live.shape)


def _check_mergeable(built: Built) -> None:
    """Raise ConfigError if the adapter cannot be folded into the base."""
    from trainer.tuning.adapter_files import check_mergeable
    from trainer.tuning.table import method_of

    reason = method_of(built.tuning.config).no_merge  # type: ignore[attr-defined]
    if reason:
        raise ConfigError(f"export.merge=true: {reason}; use export.merge=false")
    model = built.step_module.model
    check_mergeable(model, {name for name, parameter in model.named_parameters() if parameter.requires_grad})


def _write_adapter(built: Built, trained: dict[str, Tensor], directory: Path, base_path: str) -> None:
    """Write the adapter's files. One that started by rewriting the base (as PiSSA does) becomes a plain LoRA of double rank."""
    from trainer.tuning.adapter import Adapter
    from trainer.tuning.adapter_files import as_plain_lora, write_adapter

    tuning = built.tuning
    if not isinstance(tuning, Adapter):
        tuning.write(built.step_module.model, trained, directory, *hub_name(base_path))  # type: ignore[attr-defined]
        return
    tuning.update_peft_settings(built.step_module.model, trained)
    if tuning.needs_conversion:
        trained = as_plain_lora(tuning, trained, built.base_weights(Path(base_path)))
    write_adapter(
        built.step_module.model, trained, directory, *hub_name(base_path), double_rank=tuning.needs_conversion
    )


def _model_without_adapter(built: Built) -> Any:
    """The model without the adapter around it."""
    model: Any = built.step_module.model
    if hasattr(model, "get_base_model"):
        return model.get_base_model()
    return model


def _write_model(
    built: Built,
    tensors: Iterator[tuple[str, Tensor]],
    directory: Path,
    base_path: str,
    config: ExportConfig,
    facts: ModelFacts,
) -> None:
    """Write the whole model in transformers' format: weights in shards, `config.json` and the base's generation settings."""
    dtype = _dtype(config, base_path)
    write_tensors(tensors, directory, dtype=dtype, max_bytes=int(config.max_shard_gib * 2**30))
    settings = copy.deepcopy(built.config)
    # Of the types in TEXT_MODEL_ONLY only the text part is in memory, but the files hold the whole model.
    if settings.model_type not in TEXT_MODEL_ONLY or not settings.architectures:
        settings.architectures = [type(_model_without_adapter(built)).__name__]
    settings.dtype = dtype
    # What is written are the numbers that the quantised ones stood for.
    if getattr(settings, "quantization_config", None) is not None:
        del settings.quantization_config
    label_names = facts.run.label_names
    if label_names:
        settings.id2label = dict(enumerate(label_names))
        settings.label2id = {label: number for number, label in enumerate(label_names)}
    settings.save_pretrained(str(directory))
    generation = Path(base_path) / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, directory / generation.name)


def _note_added_tokens(built: Built, tokenizer: Any, facts: ModelFacts, adapter: bool) -> None:
    """Tell the card when loaders of an adapter must first give the base rows for the new vocabulary."""
    # A base with spare rows holds the new tokens without a resize.
    has_grown = bool(built.new_token_ids) and text_settings(built.config).vocab_size == len(tokenizer)
    facts.resize_to = len(tokenizer) if adapter and has_grown else None
