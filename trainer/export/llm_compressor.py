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

HOW = "name the Python of its environment with bits.python=<file> (docs/deployment.md)"
_IS_THERE = "import importlib.util, sys; sys.exit(importlib.util.find_spec('llmcompressor') is None)"


@dataclass(frozen=True, slots=True)
class Compressor:
    """llm-compressor in its own Python environment, with the rows for calibration."""

    python: str
    rows: list[list[int]]
    """Token ids of the rows that the rounding is calibrated on."""

    def store(self, directory: Path, to: Path, scheme: str, probe: list[int]) -> Tensor:
        """Store the model of `directory` in `to`; returns its logits on `probe`, float32 `[T, V]`. Raises ShardtuneError."""
        from safetensors.torch import load_file

        with TemporaryDirectory() as aside:
            job = Path(aside) / "job.json"
            about = {"model": str(directory.resolve()), "to": str(to.resolve()), "scheme": scheme}
            job.write_text(json.dumps({**about, "rows": self.rows, "probe": probe}), encoding="utf-8")
            env = {**os.environ, "HF_HUB_OFFLINE": "1"}
            env.pop("PYTHONPATH", None)  # our packages must not be imported there
            command = [self.python, compress.__file__, str(job)]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, errors="replace", env=env, cwd=aside, check=False
                )
            except OSError as error:
                raise ShardtuneError(f"bits.python={self.python}: cannot be started ({error})") from error
            if done.returncode:
                lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
                raise ShardtuneError(f"it failed with {done.returncode}: {' / '.join(lines[-2:])[:400]}")
            return load_file(job.with_name("probe.safetensors"))["logits"]


def find_python(python: str | None) -> str:
    """The Python that has llm-compressor. Raises ConfigError if it has not; nothing is installed."""
    if python is None:
        raise ConfigError(
            f"bits: llm-compressor pins an older transformers, so it needs an environment of its own; {HOW}"
        )
    executable = shutil.which(Path(python).expanduser())
    if executable is None:
        raise ConfigError(f"bits.python={python}: there is no such program; {HOW}")
    try:
        done = subprocess.run([executable, "-c", _IS_THERE], capture_output=True, check=False, env={"PATH": os.defpath})
    except OSError as error:
        raise ConfigError(f"bits.python={python}: cannot be started ({error}); {HOW}") from error
    if done.returncode:
        raise ConfigError(f"bits.python={python}: is no Python that has llmcompressor; {HOW}")
    return executable
