"""The end of a run: a directory that plain transformers (and peft) loads, written aside and published by a rename.

A whole model is streamed tensor by tensor into safetensors files; rank 0 holds one file's worth at a time. Base values
that training never touched are copied from the base checkpoint, so that a bf16 run does not round them. Refuses a fold
that would change more than the adapted layers, and (with `verify`) an export that does not compute what was trained.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from strategies.errors import ConfigError, ShardtuneError, StorageError
from strategies.runtime import Runtime, first_error
from trainer.export.card import CardFacts, render_card
from trainer.model.weights import BaseWeights

if TYPE_CHECKING:
    from strategies.base import Engine
    from trainer.model.loading import Built


class ExportType(StrEnum):
    """Stored type of a whole model; `auto` is that of the base checkpoint."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """What is written for others when training ends."""

    at_end: bool = True
    """Write `export/` in the run directory after training."""
    merge: bool = False
    """LoRA: fold the adapter into the base and write a whole model instead of an adapter."""
    dtype: ExportType = ExportType.auto
    """Stored type of a whole model: `float32`, `bfloat16`, `float16`, or `auto` (that of the base checkpoint)."""
    max_shard_gib: float = 5.0
    """Largest safetensors file in GiB."""
    verify: bool = False
    """Reload the export afresh and compare its logits with the trained model's; a drift fails the run."""


def write_export(
    engine: Engine,
    built: Built,
    tokenizer: Any,
    *,
    base_path: str,
    destination: Path,
    config: ExportConfig,
    card: CardFacts,
    runtime: Runtime,
) -> Path:
    """Write `destination` and return it; an earlier export there is replaced. All ranks must call.

    Full tuning and `config.merge` give a whole model, adapters a peft directory beside the unchanged base in
    `base_path`. Errors, on every rank: StorageError (nothing half-written stays), ConfigError for a fold that is not
    possible, DriftError where `config.verify` finds that the export computes something else.
    """
    from trainer.export.verify import verify_written

    adapter = built.tuning.adapter and not config.merge
    aside = destination.with_name(f".{destination.name}.writing")
    error: BaseException | None = None
    tensors = _Gathered(engine, built, base_path, adapter=adapter)
    try:
        if config.merge and built.tuning.adapter:
            _check_mergeable(built)
        if runtime.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            if adapter:
                _write_adapter(built, tensors.trained(), aside, base_path)
            else:
                _write_model(built, tensors.whole(), aside, base_path, config, card)
            tokenizer.save_pretrained(str(aside))
            _with_added_tokens_note(built, tokenizer, card, adapter)
            (aside / "README.md").write_text(render_card(card, adapter=adapter, base_path=base_path), encoding="utf-8")
    except Exception as caught:  # noqa: BLE001 - safetensors and peft have error types of their own; all ranks are told
        error = caught
    tensors.exhaust()
    _agree(error, aside, destination, runtime)

    if config.verify:
        error = verify_written(engine, built, tokenizer, aside, base_path, adapter=adapter, runtime=runtime)
        _agree(error, aside, destination, runtime)
    try:
        if runtime.is_main:
            _publish(aside, destination)
    except OSError as caught:
        error = caught
    _agree(error, aside, destination, runtime)
    return destination


def _agree(error: BaseException | None, aside: Path, destination: Path, runtime: Runtime) -> None:
    """Raise on every rank what any rank met; nothing half-written stays."""
    if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
        cause = error
        error = StorageError(
            f"export: writing {destination} failed ({str(cause)[:300]}); free space and run `shardtune export`. "
            "The checkpoints of the run are intact."
        )
        error.__cause__ = cause
    message = first_error(error, runtime)
    if message is None:
        return
    if runtime.is_main:
        shutil.rmtree(aside, ignore_errors=True)
    if error is not None:
        raise error
    _, kind, text = message.split(": ", 2)
    raise {"StorageError": StorageError, "ConfigError": ConfigError}.get(kind, ShardtuneError)(text)


def _publish(aside: Path, destination: Path) -> None:
    mode = (aside / "README.md").stat().st_mode
    for file in aside.iterdir():
        file.chmod(mode)  # safetensors makes its files private, whatever the umask says
    if destination.exists():
        old = destination.with_name(f".{destination.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        destination.rename(old)
        aside.rename(destination)
        shutil.rmtree(old)
    else:
        aside.rename(destination)


class _Gathered:
    """The engine's collective gathers in a fixed order, of which rank 0 may leave off and still be joined to the end."""

    def __init__(self, engine: Engine, built: Built, base_path: str, *, adapter: bool) -> None:
        self.built, self.base_path = built, base_path
        self._trained = engine.gather(trainable_only=True) if built.tuning.adapter else iter(())
        self._all = iter(()) if adapter else engine.gather(trainable_only=False)

    def trained(self) -> dict[str, Tensor]:
        """Full trainable tensors of an adapter method, by plain name."""
        return {name: tensor for name, tensor in self._trained if tensor is not None}

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """The whole model under its base names, adapters folded in; frozen values exact, from the base checkpoint."""
        from trainer.tuning.adapter_files import Folding

        tuning, model = self.built.tuning, self.built.step_module.model
        trains = {name for name, p in model.named_parameters() if p.requires_grad}
        base = self.built.base_weights(Path(self.base_path))
        folding = Folding(tuning, model, self.trained(), base) if tuning.adapter else None  # type: ignore[arg-type]
        for name, tensor in self._all:
            assert tensor is not None
            if tuning.owns(name):
                continue
            if name in trains:
                yield tuning.base_name(name), tensor
                continue
            value: Tensor | None = _base_or(base, tuning.base_name(name), tensor)
            if folding is not None and value is not None:
                value = folding.tensor(name, value)
            if value is not None:
                yield tuning.base_name(name), value
        for name, buffer in _persistent_buffers(model):
            if not tuning.owns(name):
                yield tuning.base_name(name), buffer

    def exhaust(self) -> None:
        """Join what is left of the gathers. All ranks must call."""
        for rest in (self._trained, self._all):
            for _ in rest:
                pass


def _base_or(base: BaseWeights, name: str, live: Tensor) -> Tensor:
    """The base's own value, or the live one of a parameter that it does not have (a new head)."""
    if name in base.quantised:
        return base.whole(name)
    stored = base.resolve(name)
    if stored is None or base.shape(stored) != tuple(live.shape):
        return live
    return base.run(stored, 0, math.prod(live.shape)).view(live.shape)


def _persistent_buffers(model: Any) -> Iterator[tuple[str, Tensor]]:
    for owner_name, owner in model.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                yield f"{owner_name}.{name}".removeprefix("."), buffer.detach().cpu()


def _check_mergeable(built: Built) -> None:
    from trainer.tuning.adapter_files import check_mergeable
    from trainer.tuning.table import method_of

    if reason := method_of(built.tuning.config).no_merge:  # type: ignore[attr-defined]
        raise ConfigError(f"export.merge=true: {reason}; use export.merge=false")
    model = built.step_module.model
    check_mergeable(model, {name for name, p in model.named_parameters() if p.requires_grad})


def _write_adapter(built: Built, trained: dict[str, Tensor], directory: Path, base_path: str) -> None:
    from trainer.tuning.adapter import Adapter
    from trainer.tuning.adapter_files import as_plain_lora, write_adapter

    tuning = built.tuning
    if not isinstance(tuning, Adapter):
        tuning.write(built.step_module.model, trained, directory, *hub_name(base_path))  # type: ignore[attr-defined]
        return
    tuning.settle_files(built.step_module.model, trained)
    if tuning.converts:
        trained = as_plain_lora(tuning, trained, built.base_weights(Path(base_path)))
    write_adapter(tuning, built.step_module.model, trained, directory, *hub_name(base_path))


def hub_name(base_path: str) -> tuple[str, str | None]:
    """(hub id, commit) of a snapshot in the hub's cache, or (the directory itself, None)."""
    path = Path(base_path)
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/"), path.name
    return base_path, None


def _write_model(
    built: Built,
    tensors: Iterator[tuple[str, Tensor]],
    directory: Path,
    base_path: str,
    config: ExportConfig,
    card: CardFacts,
) -> None:
    dtype = stored_type(Path(base_path)) if config.dtype is ExportType.auto else getattr(torch, str(config.dtype))
    write_tensors(tensors, directory, dtype=dtype, max_bytes=int(config.max_shard_gib * 2**30))
    plain: Any = built.step_module.model
    plain = plain.get_base_model() if hasattr(plain, "get_base_model") else plain
    settings = copy.deepcopy(built.config)
    settings.architectures, settings.dtype = [type(plain).__name__], dtype
    if labels := card.facts.get("label_names"):
        settings.id2label = dict(enumerate(labels))
        settings.label2id = {label: number for number, label in enumerate(labels)}
    settings.save_pretrained(str(directory))
    generation = Path(base_path) / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, directory / generation.name)


def stored_type(directory: Path) -> torch.dtype:
    """The floating-point type that most tensors of a checkpoint's first file have."""
    from safetensors import safe_open

    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    with safe_open(str(min(directory.glob("*.safetensors"))), framework="pt") as handle:
        types = [handle.get_slice(key).get_dtype() for key in handle.keys()]  # noqa: SIM118 - no mapping
    return names.get(max(sorted(set(types)), key=types.count), torch.float32)


def write_tensors(
    tensors: Iterator[tuple[str, Tensor]], directory: Path, *, dtype: torch.dtype, max_bytes: int
) -> None:
    """Stream tensors to `model.safetensors`, or to numbered files of at most `max_bytes` (or one tensor) and an index.

    Floating-point tensors are stored as `dtype`. Holds one file's worth. Errors: OSError, SafetensorError.
    """
    from safetensors.torch import save_file

    files: list[list[str]] = []
    held: dict[str, Tensor] = {}
    sizes = [0]

    def flush() -> None:
        files.append(list(held))
        save_file(held, directory / f"part-{len(files)}", {"format": "pt"})
        held.clear()
        sizes.append(0)

    for name, tensor in tensors:
        tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if held and sizes[-1] + tensor.nbytes > max_bytes:
            flush()
        tensor = tensor.contiguous()
        # A view into a larger buffer would be refused, or written whole.
        held[name] = tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
        sizes[-1] += tensor.nbytes
    flush()
    if len(files) == 1:
        (directory / "part-1").rename(directory / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        (directory / f"part-{number}").rename(directory / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _with_added_tokens_note(built: Built, tokenizer: Any, card: CardFacts, adapter: bool) -> None:
    """Tell the card when loaders of an adapter must first give the base rows for the new vocabulary."""
    grown = bool(built.new_token_ids) and built.config.vocab_size == len(tokenizer)  # spare rows need no resize
    card.resize_to = len(tokenizer) if adapter and grown else None
