"""Runs llm-compressor in its own environment, since it pins an older transformers, and reads the stored model back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from strategies.errors import ConfigError, ShardtuneError
from trainer.export import compress
from trainer.export.subprocesses import last_output_lines, run_in_own_environment

NAME_PYTHON_REMEDY = "name the Python of its environment with bits.python=<file> (docs/reference/exports.md)"
_LIBRARY_CHECK = "import importlib.util, sys; sys.exit(importlib.util.find_spec('llmcompressor') is None)"
"""A program for the other Python, whose exit status is 0 if the library is there."""


@dataclass(frozen=True, slots=True)
class Compressor:
    """llm-compressor in its own Python environment, with the rows for calibration."""

    python: str
    """The program of that environment."""
    calibration_rows: list[list[int]]
    """Token ids of the rows that the rounding is calibrated on."""

    def quantise(self, directory: Path, output_dir: Path, scheme: str, probe_ids: list[int]) -> Tensor:
        """Quantise the model in `directory` by llm-compressor's own Python, and save it in `output_dir`.

        Returns its logits on the probe, float32 `[T, V]`: a fixed sentence (`probe_ids`), with which the stored model is
        compared. `scheme`: llm-compressor's name of the format, such as "W4A16". Raises ShardtuneError if the program cannot
        be started, or fails.
        """
        from safetensors.torch import load_file

        with TemporaryDirectory() as job_dir:
            job_file = Path(job_dir) / "job.json"
            # `compress.py` reads it in the other Python. It imports nothing of ours.
            job = {
                "model": str(directory.resolve()),
                "to": str(output_dir.resolve()),
                "scheme": scheme,
                "rows": self.calibration_rows,
                "probe": probe_ids,
            }
            job_file.write_text(json.dumps(job), encoding="utf-8")
            command = [self.python, compress.__file__, str(job_file)]
            try:
                process = run_in_own_environment(command, Path(job_dir))
            except OSError as error:
                raise ShardtuneError(f"bits.python={self.python}: cannot be started ({error})") from error
            if process.returncode:
                raise ShardtuneError(f"it failed with {process.returncode}: {last_output_lines(process)}")
            return load_file(job_file.with_name("probe.safetensors"))["logits"]


def find_llm_compressor_python(python: str | None) -> str:
    """Check that a Python program has llm-compressor, by starting it; returns its path. Nothing is installed.

    `python`: the setting `bits.python`. Raises ConfigError if it is None, is no program, cannot be started, or does not have
    it.
    """
    if python is None:
        raise ConfigError(
            f"bits: llm-compressor pins an older transformers, so it needs an environment of its own; {NAME_PYTHON_REMEDY}"
        )
    executable = shutil.which(Path(python).expanduser())
    if executable is None:
        raise ConfigError(f"bits.python={python}: there is no such program; {NAME_PYTHON_REMEDY}")
    try:
        # Only PATH: variables of this environment, such as PYTHONPATH, would show the other Python our packages.
        check = subprocess.run(
            [executable, "-c", _LIBRARY_CHECK], capture_output=True, check=False, env={"PATH": os.defpath}
        )
    except OSError as error:
        raise ConfigError(f"bits.python={python}: cannot be started ({error}); {NAME_PYTHON_REMEDY}") from error
    if check.returncode:
        raise ConfigError(f"bits.python={python}: is no Python that has llmcompressor; {NAME_PYTHON_REMEDY}")
    return executable
