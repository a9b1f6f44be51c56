"""`shardtune export ... gguf=<type> bits=<type>`: a whole model once more, as a GGUF file, or in 4 or 8 bits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError

if TYPE_CHECKING:
    from trainer.config.run import RunConfig
    from trainer.data.prepare import Prepared
    from trainer.export.gguf import Converter, GgufType
    from trainer.export.quantised import FewBits
    from trainer.session.run_data import RowsNeeded

WORDS = ("gguf", "gguf.converter", "gguf.python")
BITS, BITS_PYTHON = "bits", "bits.python"


MARKER = ".waits-for-gguf.json"
"""In an export whose GGUF file could not be made: which export it is, so that the same command only converts it."""


@dataclass(frozen=True, slots=True)
class GgufRequest:
    """What is to be written."""

    kind: GgufType
    converter: Converter
    name: str


def wanted(words: dict[str, str], config: RunConfig) -> GgufRequest | None:
    """What the words ask for; None where they ask for none. Raises ConfigError before anything is written."""
    if "gguf" not in words:
        if given := [word for word in WORDS if word in words]:
            raise ConfigError(f"{given[0]}={words[given[0]]}: goes with gguf=<type>")
        return None
    from trainer.export.gguf import GgufType, find_converter

    _whole(words, "gguf", config)
    if words["gguf"] not in [*GgufType]:
        raise ConfigError(f"gguf={words['gguf']}: must be one of {', '.join(GgufType)}")
    found = find_converter(words.get("gguf.converter"), words.get("gguf.python"))
    return GgufRequest(GgufType(words["gguf"]), found, Path(words["run.dir"]).expanduser().resolve().name)


def waits(directory: Path, words: dict[str, str], checkpoints: list[Path]) -> bool:
    """Whether the directory holds this very export, whole, and only its GGUF file is lacking."""
    try:
        kept = json.loads((directory / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(kept == _export_key(words, checkpoints))


def note_waiting(directory: Path, words: dict[str, str], checkpoints: list[Path]) -> None:
    """Write down which export is whole before it is converted."""
    (directory / MARKER).write_text(json.dumps(_export_key(words, checkpoints)), encoding="utf-8")


def note_converted(directory: Path) -> None:
    """Forget that, once the GGUF file is there."""
    (directory / MARKER).unlink(missing_ok=True)


def _export_key(words: dict[str, str], checkpoints: list[Path]) -> dict[str, Any]:
    """What decides an export: the words but those of the converter, which may be mended, and the checkpoints."""
    deciding = {key: value for key, value in words.items() if key not in WORDS}
    return {"words": deciding, "checkpoints": [path.name for path in checkpoints]}


def write(asked: GgufRequest, directory: Path, *, verify: bool) -> Path:
    """Write it, and say how it went; the file. Raises ShardtuneError, DriftError."""
    from trainer.export.gguf import verify_gguf, write_gguf

    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"gguf={asked.kind}: {directory} is an adapter, and this method cannot be folded into its base"
        )
    file, lacking = write_gguf(directory, asked.name, asked.kind, asked.converter)
    print(
        f"gguf:   {file}, {file.stat().st_size:,} bytes; {verify_gguf(file, asked.kind) if verify else 'not verified'}"
    )
    print(f"ollama: cd {file.parent} && ollama create {asked.name} -f Modelfile" + (f" ({lacking})" if lacking else ""))
    return file


def _whole(words: dict[str, str], key: str, config: RunConfig) -> None:
    from trainer.tuning.base import LoraConfig

    if isinstance(config.tuning, LoraConfig) and not config.export.merge:
        raise ConfigError(f"{key}={words[key]}: is of a whole model; fold the adapter in with merge=true")


@dataclass(frozen=True, slots=True)
class Few:
    """The type that `bits=` asks for."""

    kind: FewBits
    python: str | None
    """Of the environment that stores it, where that is another one."""


def wanted_bits(words: dict[str, str], config: RunConfig) -> Few | None:
    """The type that `bits=` asks for. Raises ConfigError before anything is written."""
    named = words.get(BITS_PYTHON)
    if BITS not in words:
        if named is not None:
            raise ConfigError(f"{BITS_PYTHON}={named}: goes with bits=llmcompressor_...")
        return None
    from trainer.export.llm_compressor import find_python
    from trainer.export.quantised import check_few_bits

    kind = check_few_bits(words[BITS])
    if named is not None and not kind.apart:
        raise ConfigError(f"{BITS_PYTHON}={named}: goes with bits=llmcompressor_...; bits={kind} is stored here")
    _whole(words, BITS, config)
    return Few(kind, find_python(named) if kind.apart else None)


def refuse_sizes(kind: FewBits, config: RunConfig) -> None:
    """Raise ConfigError, before anything is written, if bitsandbytes could not multiply the matrices of the run's model here."""
    if kind != "nf4":
        return
    import torch

    from trainer.model.architecture import auto_class
    from trainer.model.config import ModelKind
    from trainer.model.loading import load_model_config
    from trainer.model.quantised_checkpoints import refuse_unmultiplied

    settings = load_model_config(config.model)
    try:
        with torch.device("meta"):
            model = auto_class(ModelKind.causal, settings).from_config(settings)
    except Exception:  # noqa: BLE001 - what cannot be built is told when the run's own model is
        return
    refuse_unmultiplied(f"bits={kind}", model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def rows_needed(asked: Few) -> RowsNeeded:
    """Which rows of the run the type reads, and what for."""
    from trainer.export.quantised import CALIBRATING, DOCUMENTS
    from trainer.session.run_data import RowsNeeded

    purpose = (
        f"bits={asked.kind} measures its loss on {DOCUMENTS} held-out documents of the run, or on as many of training"
    )
    if asked.kind.apart:
        purpose += f", and fits its roundings to the first {CALIBRATING} documents of training"
    return RowsNeeded(purpose, f"Leave bits={asked.kind} out")


def write_bits(asked: Few, directory: Path, data: Prepared) -> Path:
    """Write it, and say what it costs on held-out documents, or on those of the training where none were held out; the folder.

    What is fitted to rows is fitted to the first ones of the training.
    """
    from launch.serve.exported import find_export
    from trainer.export.llm_compressor import Compressor
    from trainer.export.quantised import CALIBRATING, DOCUMENTS, TOKENS, write_few_bits

    kind = asked.kind
    if find_export(str(directory)).base is not None:
        raise ConfigError(f"bits={kind}: {directory} is an adapter, and this method cannot be folded into its base")
    measured = data.train if data.evaluation is None else data.evaluation
    samples = [measured.sample(number) for number in range(min(len(measured), DOCUMENTS))]
    compressor = None
    if asked.python is not None:
        seen = [data.train.sample(number) for number in range(min(len(data.train), CALIBRATING))]
        compressor = Compressor(asked.python, [sample.input_ids[:TOKENS].tolist() for sample in seen])
    folder, cost = write_few_bits(
        directory, kind, samples, "training" if data.evaluation is None else "held-out", compressor
    )
    whole, few = (sum(file.stat().st_size for file in of.glob("*.safetensors")) for of in (directory, folder))
    print(f"{kind}: {folder}, {few:,} bytes of {whole:,}; {cost}")
    return folder
