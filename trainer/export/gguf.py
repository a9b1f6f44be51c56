"""Writes a GGUF file of a whole model by llama.cpp's own converter, in its own environment, and reads it back."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from strategies.errors import ConfigError, ShardtuneError
from trainer.export.end_tokens import GENERATION_FILE
from trainer.export.ollama import modelfile_of
from trainer.export.subprocesses import last_output_lines, run_in_own_environment

CONVERTER_COMMAND = "convert-hf-to-gguf"
"""Name of the converter where it is installed as a program."""
GGUF_DIR_NAME = "gguf"
"""Folder of the GGUF files inside an export."""
NAME_CONVERTER_REMEDY = (
    "name llama.cpp's convert_hf_to_gguf.py, or a program that is it, with gguf.converter=<file>, and the Python of its "
    "environment with gguf.python=<file> (docs/deployment.md)"
)


class GgufType(StrEnum):
    """Stored type of a GGUF file."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"


ALLOWED_DIFFERENCE_BY_TYPE = {GgufType.f32: 1e-4, GgufType.f16: 1e-2, GgufType.bf16: 5e-2, GgufType.q8_0: 5e-2}
"""Largest difference of a logit, relative to the largest, by stored type."""


@dataclass(frozen=True, slots=True)
class GgufConverter:
    """The command that runs llama.cpp's converter on this machine."""

    command: list[str]
    """The program and its first arguments: those of a conversion follow."""


def find_converter(converter: str | None, python: str | None) -> GgufConverter:
    """Find llama.cpp's converter on this machine, before anything is written: the file `converter`, else `convert-hf-to-gguf`.

    - a `.py` file: run by `python`, or by this Python;
    - another program: run by `python` if that is given, else by itself.

    Raises ConfigError if `python` or the converter is missing, or the converter cannot be run.
    """
    if python is not None and shutil.which(Path(python).expanduser()) is None:
        raise ConfigError(f"gguf.python={python}: there is no such program; {NAME_CONVERTER_REMEDY}")
    # Without the setting: the program of that name, if it is on PATH.
    file = converter or shutil.which(CONVERTER_COMMAND)
    if file is None:
        raise ConfigError(f"gguf: no {CONVERTER_COMMAND} is found on this machine; {NAME_CONVERTER_REMEDY}")
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f"gguf.converter={file}: there is no such file; {NAME_CONVERTER_REMEDY}")
    if path.suffix == ".py":
        return GgufConverter([python or sys.executable, str(path)])
    if not os.access(path, os.X_OK):
        raise ConfigError(f"gguf.converter={file}: is neither a .py nor a program; {NAME_CONVERTER_REMEDY}")
    if python:
        return GgufConverter([python, str(path)])
    return GgufConverter([str(path)])


class WrittenGguf(NamedTuple):
    """A GGUF file beside its export."""

    file: Path
    missing_part_note: str | None
    """What the Modelfile for Ollama beside it lacks, and why; None if nothing."""


def write_gguf(directory: Path, name: str, gguf_type: GgufType, converter: GgufConverter) -> WrittenGguf:
    """Convert an export to a GGUF file by llama.cpp's converter, and write a Modelfile for Ollama beside it.

    The file is `<directory>/gguf/<name>-<type>.gguf`. Raises ShardtuneError if the converter cannot be started, or fails. The
    export itself stays as it is.
    """
    from transformers import AutoTokenizer, GenerationConfig

    gguf_dir = directory / GGUF_DIR_NAME
    gguf_dir.mkdir(exist_ok=True)
    gguf_file = gguf_dir / f"{name}-{gguf_type}.gguf"
    staging_file = gguf_dir / f".{gguf_file.name}.writing"
    command = [*converter.command, str(directory), "--outfile", str(staging_file), "--outtype", str(gguf_type)]
    try:
        # The converter must not import our packages, whose versions may be others.
        process = run_in_own_environment(command)
        if process.returncode or not staging_file.is_file():
            raise ShardtuneError(
                f"gguf={gguf_type}: the converter failed ({process.returncode}: {last_output_lines(process)}); the export in "
                f"{directory} is whole. Mend the converter and repeat the command: it only converts then. The converter was "
                f"called as: {' '.join(command)}"
            )
        # Under its own name only once it is complete.
        staging_file.rename(gguf_file)
    except OSError as error:
        raise ShardtuneError(f"gguf={gguf_type}: the converter cannot be started ({error})") from error
    finally:
        staging_file.unlink(missing_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    generation_config = GenerationConfig()
    if (directory / GENERATION_FILE).is_file():
        generation_config = GenerationConfig.from_pretrained(directory)
    text, missing_part_note = modelfile_of(gguf_file.name, tokenizer, generation_config)
    (gguf_dir / "Modelfile").write_text(text, encoding="utf-8")
    return WrittenGguf(gguf_file, missing_part_note)


def verify_gguf(file: Path, gguf_type: GgufType) -> str:
    """Check that a GGUF file computes what the export computes that it was made from; returns a line for the screen.

    transformers reads the file. The line begins with "verified: ", or with "not verified: " if transformers cannot. Raises
    DriftError if logits differ by more than the type allows (`ALLOWED_DIFFERENCE_BY_TYPE`).
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trainer.export.load import load_export
    from trainer.export.verify import PROBE_SENTENCE, DriftError

    export_dir = file.parent.parent  # the file is in `gguf/` below the export
    try:
        gguf_model: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True
        ).eval()
    except Exception as error:  # noqa: BLE001 - its reader knows some architectures, and says so in several types
        return (
            f"not verified: transformers cannot read it ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
        )
    tokenizer = AutoTokenizer.from_pretrained(export_dir, local_files_only=True)
    ids = torch.tensor([tokenizer(PROBE_SENTENCE, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        export_output = load_export(export_dir)(ids, labels=ids)
        gguf_output = gguf_model(ids, labels=ids)
    difference = _relative_logit_difference(gguf_output.logits, export_output.logits)
    loss_change = float(gguf_output.loss - export_output.loss)
    allowed_difference = ALLOWED_DIFFERENCE_BY_TYPE[gguf_type]
    comparison = f"logits differ by at most {difference:.1e} of the largest (allowed {allowed_difference:.0e}), "
    comparison += f"loss by {loss_change:+.4f}"
    if not difference <= allowed_difference:  # a NaN fails too
        raise DriftError(f"{file}: computes something else than {export_dir}: {comparison}")
    return f"verified: {comparison}, on a sentence of {ids.shape[1]} tokens"


def _relative_logit_difference(logits: Any, reference: Any) -> float:
    """The largest difference of a logit, relative to the largest one of `reference`; 1, which is too much, for other shapes."""
    if logits.shape != reference.shape:
        return 1.0
    return float((reference - logits).abs().max()) / float(reference.abs().max())
