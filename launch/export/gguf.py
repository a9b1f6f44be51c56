"""`shardtune export ... gguf=<type> bits=<type>`: also writes the whole model as GGUF, or in 4 or 8 bits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.export.words import ExportWords
    from trainer.config.run import RunConfig
    from trainer.data.prepare import PreparedData
    from trainer.export.gguf import Converter, GgufType
    from trainer.export.quantised import FewBits
    from trainer.session.run_data import RowsNeeded

OF_CONVERTER = ("gguf", "gguf.converter", "gguf.python")
"""Words that may be mended before an export goes on."""
MARKER = ".waits-for-gguf.json"
"""In an export whose GGUF file could not be made: which export it is, so that the same command only converts it."""


@dataclass(frozen=True, slots=True)
class GgufRequest:
    """The GGUF file that `gguf=` asks for."""

    kind: GgufType
    converter: Converter
    name: str


def gguf_request(words: ExportWords, config: RunConfig) -> GgufRequest | None:
    """The GGUF file of the words; None if they ask for none. Raises ConfigError before anything is written."""
    if words.gguf is None:
        return None
    from trainer.export.gguf import find_converter

    _refuse_adapter(f"gguf={words.gguf}", config)
    converter = find_converter(words.gguf_converter, words.gguf_python)
    return GgufRequest(words.gguf, converter, words.run.resolve().name)


def waits_for_gguf(directory: Path, words: ExportWords, checkpoints: list[Path]) -> bool:
    """Whether the directory holds this very export, whole, and only its GGUF file is lacking."""
    try:
        waiting_export = json.loads((directory / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(waiting_export == _export_key(words, checkpoints))


def note_waiting(directory: Path, words: ExportWords, checkpoints: list[Path]) -> None:
    """Write down which export is whole before it is converted."""
    (directory / MARKER).write_text(json.dumps(_export_key(words, checkpoints)), encoding="utf-8")


def note_converted(directory: Path) -> None:
    """Forget that, once the GGUF file is there."""
    (directory / MARKER).unlink(missing_ok=True)


def _export_key(words: ExportWords, checkpoints: list[Path]) -> dict[str, Any]:
    """What decides an export: the words but those of the converter, which may be mended, and the checkpoints."""
    deciding = {key: text for key, text in words.typed.items() if key not in OF_CONVERTER}
    return {"words": deciding, "checkpoints": [path.name for path in checkpoints]}


def write(request: GgufRequest, directory: Path, *, verify: bool) -> Path:
    """Convert the export to a GGUF file, verify it, print both, and return the file. Raises ShardtuneError, DriftError."""
    from trainer.export.gguf import verify_gguf, write_gguf

    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"gguf={request.kind}: {directory} is an adapter, and this method cannot be folded into its base"
        )
    file, missing = write_gguf(directory, request.name, request.kind, request.converter)
    verified = verify_gguf(file, request.kind) if verify else "not verified"
    print(f"gguf:   {file}, {file.stat().st_size:,} bytes; {verified}")
    remark = f" ({missing})" if missing else ""
    print(f"ollama: cd {file.parent} && ollama create {request.name} -f Modelfile{remark}")
    return file


def _refuse_adapter(word: str, config: RunConfig) -> None:
    from trainer.tuning.base import LoraConfig

    if isinstance(config.tuning, LoraConfig) and not config.export.merge:
        raise ConfigError(f"{word}: is of a whole model; fold the adapter in with merge=true")


@dataclass(frozen=True, slots=True)
class FewBitsRequest:
    """The type that `bits=` asks for."""

    kind: FewBits
    python: str | None
    """Python of the environment that stores it, if that is not this one."""


def few_bits_request(words: ExportWords, config: RunConfig) -> FewBitsRequest | None:
    """The type that `bits=` asks for. Raises ConfigError before anything is written."""
    if words.bits is None:
        return None
    from trainer.export.llm_compressor import find_python
    from trainer.export.quantised import check_few_bits

    kind = check_few_bits(words.bits)
    _refuse_adapter(f"bits={words.bits}", config)
    return FewBitsRequest(kind, find_python(words.bits_python) if kind.stored_by_other_python else None)


def refuse_sizes(kind: FewBits, config: RunConfig) -> None:
    """Raise ConfigError, before anything is written, if bitsandbytes could not multiply the matrices of the run's model here."""
    if kind != "nf4":
        return
    import torch

    from trainer.model.architecture import auto_class
    from trainer.model.config import ModelKind
    from trainer.model.loading import load_model_config
    from trainer.model.quantised_checkpoints import refuse_unsupported_4bit

    settings = load_model_config(config.model)
    try:
        with torch.device("meta"):
            model = auto_class(ModelKind.causal, settings).from_config(settings)
    except Exception:  # noqa: BLE001 - what cannot be built is told when the run's own model is
        return
    refuse_unsupported_4bit(f"bits={kind}", model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def rows_needed(request: FewBitsRequest) -> RowsNeeded:
    """Why the type needs rows of the run, for the error if they are gone."""
    from trainer.export.quantised import MAX_CALIBRATION_DOCUMENTS, MAX_DOCUMENTS
    from trainer.session.run_data import RowsNeeded

    purpose = f"bits={request.kind} measures its loss on {MAX_DOCUMENTS} held-out documents of the run, or on as many of training"
    if request.kind.stored_by_other_python:
        purpose += f", and fits its roundings to the first {MAX_CALIBRATION_DOCUMENTS} documents of training"
    return RowsNeeded(purpose, f"Leave bits={request.kind} out")


def write_bits(request: FewBitsRequest, directory: Path, data: PreparedData) -> Path:
    """Store the export in few bits, print what that costs in loss on held-out documents, and return its folder.

    If no documents were held out, the loss is that of training documents. Calibration uses the first documents of training.
    """
    from launch.serve.exported import find_export
    from trainer.export.llm_compressor import Compressor
    from trainer.export.quantised import MAX_CALIBRATION_DOCUMENTS, MAX_DOCUMENTS, MAX_TOKENS, write_few_bits

    kind = request.kind
    if find_export(str(directory)).base is not None:
        raise ConfigError(f"bits={kind}: {directory} is an adapter, and this method cannot be folded into its base")
    measured = data.train if data.evaluation is None else data.evaluation
    samples = [measured.sample(number) for number in range(min(len(measured), MAX_DOCUMENTS))]
    compressor = None
    if request.python is not None:
        rows = []
        for number in range(min(len(data.train), MAX_CALIBRATION_DOCUMENTS)):
            rows.append(data.train.sample(number).input_ids[:MAX_TOKENS].tolist())
        compressor = Compressor(request.python, rows)
    split = "training" if data.evaluation is None else "held-out"
    folder, cost = write_few_bits(directory, kind, samples, split, compressor)
    print(f"{kind}: {folder}, {_weights_bytes(folder):,} bytes of {_weights_bytes(directory):,}; {cost}")
    return folder


def _weights_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))
