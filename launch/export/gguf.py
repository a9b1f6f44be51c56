"""`shardtune export ... gguf=<type> bits=<type>`: also writes the whole model as GGUF, or in 4 or 8 bits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.export.arguments import ExportArguments
    from trainer.config.run import RunConfig
    from trainer.data.prepare import PreparedData
    from trainer.export.gguf import GgufConverter, GgufType
    from trainer.export.quantised import QuantisedFormat
    from trainer.session.run_data import ReasonToReadRows

CONVERTER_KEYS = ("gguf", "gguf.converter", "gguf.python")
"""Arguments that may be mended before an export goes on."""
PENDING_GGUF_FILE = ".waits-for-gguf.json"
"""In an export whose GGUF file could not be made: which export it is, so that the same command only converts it."""


@dataclass(frozen=True, slots=True)
class GgufRequest:
    """The GGUF file that `gguf=` asks for."""

    kind: GgufType
    """The type of its weights, such as q8_0."""
    converter: GgufConverter
    """llama.cpp's converter and the Python that runs it."""
    name: str
    """The name of the file and of the model in ollama."""


def gguf_request(arguments: ExportArguments, config: RunConfig) -> GgufRequest | None:
    """Read which GGUF file `gguf=` asks for, and check that it can be made, before anything is written; None without `gguf=`.

    Raises ConfigError for a LoRA that is not merged, or if there is no converter.
    """
    if arguments.gguf is None:
        return None
    from trainer.export.gguf import find_converter

    _refuse_adapter(f"gguf={arguments.gguf}", config)
    converter = find_converter(arguments.gguf_converter, arguments.gguf_python)
    return GgufRequest(arguments.gguf, converter, name=arguments.run.resolve().name)


def lacks_only_gguf(directory: Path, arguments: ExportArguments, checkpoints: list[Path]) -> bool:
    """Whether `directory` holds this very export already, and only its GGUF file is missing, so that it is only converted."""
    try:
        pending_export = json.loads((directory / PENDING_GGUF_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(pending_export == _export_identity(arguments, checkpoints))


def mark_gguf_missing(directory: Path, arguments: ExportArguments, checkpoints: list[Path]) -> None:
    """Record in an export that its GGUF file is missing, and which export it is: `lacks_only_gguf` reads that in a next start."""
    identity = _export_identity(arguments, checkpoints)
    (directory / PENDING_GGUF_FILE).write_text(json.dumps(identity), encoding="utf-8")


def unmark_gguf_missing(directory: Path) -> None:
    """Remove the record of `mark_gguf_missing`, once the GGUF file is there."""
    (directory / PENDING_GGUF_FILE).unlink(missing_ok=True)


def _export_identity(arguments: ExportArguments, checkpoints: list[Path]) -> dict[str, Any]:
    """What identifies an export, as JSON values: the names of its checkpoints, and the arguments that decide its files.

    The arguments of the converter do not count: they may be mended before the command is repeated.
    """
    deciding_texts = {key: text for key, text in arguments.text_by_key.items() if key not in CONVERTER_KEYS}
    return {"words": deciding_texts, "checkpoints": [path.name for path in checkpoints]}


def write_and_verify_gguf(request: GgufRequest, directory: Path, *, verify: bool) -> Path:
    """Convert an export to a GGUF file, verify it, and print how ollama uses it; returns the file.

    Raises ConfigError for an adapter, ShardtuneError if the converter fails, DriftError if the file computes something else.
    """
    from trainer.export.gguf import verify_gguf, write_gguf
    from trainer.tuning import bottleneck, initial_adapter

    # Not told by config.json: an adapter has one, too, if its training changed the base's positions.
    adapter_config_files = (initial_adapter.SETTINGS_FILE, bottleneck.CONFIG_FILE)
    is_adapter = any((directory / name).is_file() for name in adapter_config_files)
    if is_adapter:
        raise ConfigError(
            f"gguf={request.kind}: {directory} is an adapter, and this method cannot be merged into its base"
        )
    file, missing_part_note = write_gguf(directory, request.name, request.kind, request.converter)
    verdict = verify_gguf(file, request.kind) if verify else "not verified"
    print(f"gguf:   {file}, {file.stat().st_size:,} bytes; {verdict}")
    # What the Modelfile for Ollama lacks, and why.
    remark = f" ({missing_part_note})" if missing_part_note else ""
    print(f"ollama: cd {file.parent} && ollama create {request.name} -f Modelfile{remark}")
    return file


def _refuse_adapter(argument: str, config: RunConfig) -> None:
    """Refuse an argument such as "bits=nf4", which needs a whole model, for a LoRA that is not merged. Raises ConfigError.

    Adapters of other methods are refused when they are written (`write_and_verify_gguf`, `write_quantised`).
    """
    from trainer.tuning.base import LoraConfig

    if isinstance(config.tuning, LoraConfig) and not config.export.merge:
        raise ConfigError(f"{argument}: is of a whole model; merge the adapter with merge=true")


@dataclass(frozen=True, slots=True)
class QuantisedRequest:
    """The type that `bits=` asks for."""

    kind: QuantisedFormat
    python: str | None
    """Python of the environment that stores it, if that is not this one."""


def quantised_request(arguments: ExportArguments, config: RunConfig) -> QuantisedRequest | None:
    """Read which quantised copy `bits=` asks for, and check that it can be made; None without `bits=`.

    Called before anything is written. Some formats are computed by another Python, which is found here. Errors: ConfigError.
    """
    if arguments.bits is None:
        return None
    from trainer.export.llm_compressor import find_llm_compressor_python
    from trainer.export.quantised import parse_quantised_format

    quantised_format = parse_quantised_format(arguments.bits)
    _refuse_adapter(f"bits={arguments.bits}", config)
    # llm-compressor runs in an environment of its own.
    python = None
    if quantised_format.needs_other_python:
        python = find_llm_compressor_python(arguments.bits_python)
    return QuantisedRequest(quantised_format, python)


def refuse_unsupported_nf4_sizes(kind: QuantisedFormat, config: RunConfig) -> None:
    """Refuse nf4, before anything is written, for a model whose matrices bitsandbytes could not multiply on this machine.

    Does nothing for other formats. Errors: ConfigError.
    """
    if kind != "nf4":
        return
    import torch

    from trainer.model.architecture import transformers_class
    from trainer.model.config import ModelKind
    from trainer.model.loading import load_model_config
    from trainer.model.quantised_checkpoints import refuse_unsupported_4bit

    hf_config = load_model_config(config.model)
    try:
        with torch.device("meta"):  # shapes alone, without memory
            model = transformers_class(ModelKind.causal, hf_config).from_config(hf_config)
    except Exception:  # noqa: BLE001 - what cannot be built is told when the run's own model is
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refuse_unsupported_4bit(f"bits={kind}", model, device)


def reason_to_read_rows(request: QuantisedRequest) -> ReasonToReadRows:
    """Say what a quantised copy needs rows of the run for; the error shows it if the rows are gone."""
    from trainer.export.quantised import MAX_CALIBRATION_DOCUMENTS, MAX_MEASURED_DOCUMENTS
    from trainer.session.run_data import ReasonToReadRows

    purpose = (
        f"bits={request.kind} measures its loss on {MAX_MEASURED_DOCUMENTS} held-out documents of the run, or on as many of "
        "training"
    )
    is_calibrated = request.kind.needs_other_python  # by llm-compressor
    if is_calibrated:
        purpose += f", and fits its roundings to the first {MAX_CALIBRATION_DOCUMENTS} documents of training"
    return ReasonToReadRows(purpose, f"Leave bits={request.kind} out")


def write_quantised(request: QuantisedRequest, directory: Path, data: PreparedData) -> Path:
    """Write a quantised copy of an export, and print how much the quantisation raises the loss; returns its folder.

    The loss is that of held-out documents, or of training documents if there are none. A method that another Python computes
    (`request.python`) gets the first documents of training, to calibrate its rounding if it does. Errors: ConfigError for an
    adapter.
    """
    from launch.serve.exported import find_export
    from trainer.export.llm_compressor import Compressor
    from trainer.export.quantised import (
        MAX_CALIBRATION_DOCUMENTS,
        MAX_DOCUMENT_TOKENS,
        MAX_MEASURED_DOCUMENTS,
        write_quantised_model,
    )

    kind = request.kind
    # Only an adapter's export has a base.
    if find_export(str(directory)).base is not None:
        raise ConfigError(f"bits={kind}: {directory} is an adapter, and this method cannot be merged into its base")
    # What the loss is measured on.
    measured_split = data.train if data.evaluation is None else data.evaluation
    num_samples = min(len(measured_split), MAX_MEASURED_DOCUMENTS)
    samples = [measured_split.sample(index) for index in range(num_samples)]
    # What the method is calibrated on: token ids of training documents.
    compressor = None
    if request.python is not None:
        calibration_rows = []
        for index in range(min(len(data.train), MAX_CALIBRATION_DOCUMENTS)):
            calibration_rows.append(data.train.sample(index).input_ids[:MAX_DOCUMENT_TOKENS].tolist())
        compressor = Compressor(request.python, calibration_rows)
    split_name = "training" if data.evaluation is None else "held-out"
    folder, cost = write_quantised_model(directory, kind, samples, split_name, compressor)
    print(f"{kind}: {folder}, {_weights_bytes(folder):,} bytes of {_weights_bytes(directory):,}; {cost}")
    return folder


def _weights_bytes(directory: Path) -> int:
    """The size of the safetensors files in a directory, in bytes."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))
