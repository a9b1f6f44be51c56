"""Facts of one node: code, Python, libraries, directories, model, data and GPUs; in under a second, without torch."""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from strategies.small_files import read_object

LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "numpy",
    "pyarrow",
    "peft",
    "deepspeed",
    "flash-attn",
    "bitsandbytes",
    "triton",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)
"""Distributions that must be the same on all nodes."""
PACKAGES = ("launch", "trainer", "strategies", "conf")
VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
"""Variables that list the devices a process may use."""
VARIABLES = ("NCCL_", "GLOO_", "TORCH_", "HF_", "OMP_NUM_THREADS", *VISIBLE)
"""Beginnings of environment variables that change what a run does."""
KFD = Path("/sys/class/kfd/kfd/topology/nodes")
SLOWDOWN: tuple[tuple[str, ...], ...] = (
    ("clocks_event_reasons.hw_slowdown",),
    ("clocks_throttle_reasons.hw_slowdown",),
    (),
)
"""Whether the hardware slows a card down, as newer and older drivers call it; some know neither."""
VISIBLE_S = 5.0
"""Seconds after which a file that another host wrote must be seen; network file systems remember what was not there."""
GIB = 2**30


VARIABLE = "SHARDTUNE_PREFLIGHT"
"""The environment variable with what is asked."""


@dataclass(kw_only=True, slots=True)
class PreflightRequest:
    """What the nodes are to look at; travels as JSON in an environment variable."""

    nodes: int = 1
    processes: int = 1
    """Ranks of each node."""
    gpus: int = 0
    """GPUs that each node must show."""
    token: str = ""
    """Names this preflight in the run directory."""
    run_dir: str | None = None
    model: str | None = None
    """Directory or hub id; `models` of the run that must be there on every node, offline."""
    tokenizer: str | None = None
    revision: str | None = None
    paths: list[str] = field(default_factory=list)
    """Files, directories or patterns that every node must see."""
    exchange: bool = True
    """Whether the ranks meet, and their exchange is measured."""
    device: str = "auto"
    master: str | None = None
    """host:port at which they meet; None is found out from SLURM's variables."""
    timeout_s: float = 60.0
    """Seconds within which the ranks must have met, and each exchange must be over."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def told(cls) -> PreflightRequest:
        """What the environment says. Errors: KeyError where it says nothing."""
        return cls(**json.loads(os.environ[VARIABLE]))


def look(asked: PreflightRequest, node: int) -> dict[str, Any]:
    """Everything that node number `node` sees, as JSON; what is wrong is `judge`'s to say. Raises nothing for what is missing."""
    seen: dict[str, Any] = {
        "node": node,
        "host": socket.gethostname(),
        "time": time.time(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "clone": clone(),
        "packages": {name: version for name in LIBRARIES if (version := installed_version(name)) is not None},
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_free_gib": _memory_free(),
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith(VARIABLES)},
        "paths": {path: bool(glob.glob(str(Path(path).expanduser()), recursive=True)) for path in asked.paths},  # noqa: PTH207
    }
    if asked.run_dir is not None:
        seen["run_dir"] = shared(Path(asked.run_dir), asked.token, node)
    seen["models"] = {
        name: holdings(name, asked.revision)
        for name in dict.fromkeys((asked.model, asked.tokenizer))
        if name is not None
    }
    return seen | gpus()


def clone() -> dict[str, str]:
    """Where the code is, and a digest of what it says."""
    root = Path(__file__).resolve().parents[3]
    digest = hashlib.sha256()
    for package in PACKAGES:
        for file in sorted([*(root / package).rglob("*.py"), *(root / package).rglob("*.yaml")]):
            digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return {"path": str(root), "digest": digest.hexdigest()[:12]}


def installed_version(name: str) -> str | None:
    """The version of a distribution; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _memory_free() -> float | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 / GIB for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def shared(run_dir: Path, token: str, node: int) -> dict[str, Any]:
    """Whether this node sees what the asker wrote into the run directory, and can write there; free space, and the clock.

    `behind_s`: seconds by which this host's clock is before that of the file system.
    """
    place = run_dir / "preflight" / token
    found: dict[str, Any] = {"sees": False, "problem": None}
    end = time.monotonic() + VISIBLE_S
    while not (place / "asked").exists():
        if time.monotonic() > end:
            return found
        time.sleep(0.2)
    found["sees"] = True
    try:
        own = place / str(node)
        own.write_text(socket.gethostname(), encoding="utf-8")
        found["behind_s"] = own.stat().st_mtime - time.time()
        found["free_gib"] = shutil.disk_usage(place).free / GIB
    except OSError as error:
        found["problem"] = error.strerror or str(error)
    return found


def holdings(name: str, revision: str | None) -> dict[str, Any]:
    """The files of a model that this node has, offline: how many, and a digest of their names and sizes."""
    directory = Path(name).expanduser()
    if not directory.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            directory = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError, OSError):
            return {"files": 0, "digest": None}
    files = sorted(
        (str(file.relative_to(directory)), file.stat().st_size) for file in directory.rglob("*") if file.is_file()
    )
    lacking: list[str] = []
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        present = {file for file, _ in files}
        weight_map = read_object(index).get("weight_map")
        if isinstance(weight_map, dict):  # else the model itself is refused when it is read
            lacking = sorted({str(file) for file in weight_map.values()} - present)
    return {"files": len(files), "digest": hashlib.sha256(repr(files).encode()).hexdigest()[:12], "lacking": lacking}


def gpus() -> dict[str, Any]:
    """The GPUs of this node, NVIDIA's with the processes on them, or else AMD's; none where neither driver lists any."""
    fields = ("index", "name", "memory.total", "memory.used", "ecc.errors.uncorrected.volatile.total", "clocks.max.sm")
    rows = next(filter(None, (nvidia_smi("gpu", (*fields, *slow)) for slow in SLOWDOWN)), [])
    keys = ("index", "name", "memory_mib", "used_mib", "ecc_errors", "clock_mhz", "slowed")
    found = [{key: _number(value) for key, value in zip(keys, row, strict=False)} for row in rows] or _of_amd()
    for gpu in found:
        gpu["slowed"] = gpu.get("slowed") == "Active"
    on_them = nvidia_smi("compute-apps", ("pid", "process_name", "used_memory")) or []
    lists = [value.split(",") for name in VISIBLE if (value := os.environ.get(name)) is not None]
    count = min([len(found), *(sum(bool(each.strip()) for each in listed) for listed in lists)])
    return {"gpus": found, "gpu_count": count, "gpu_processes": [" ".join(row) for row in on_them]}


def _of_amd() -> list[dict[str, Any]]:
    """AMD's GPUs as the kernel lists them; it says nothing of those that this process may not use."""
    found: list[dict[str, Any]] = []
    for node in sorted(KFD.glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            about = dict(
                line.split(maxsplit=1) for line in (node / "properties").read_text(encoding="utf-8").splitlines()
            )
            if int(about["simd_count"]):  # else a processor
                found.append({"index": len(found), "name": (node / "name").read_text(encoding="utf-8").strip()})
        except (OSError, ValueError, KeyError):
            continue
    return found


def nvidia_smi(of: str, fields: tuple[str, ...]) -> list[list[str]] | None:
    """Rows of `nvidia-smi --query-<of>`; None if it is not there, fails, or does not know one of the fields."""
    command = ["nvidia-smi", f"--query-{of}={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    return [[value.strip() for value in row] for row in csv.reader(done.stdout.splitlines()) if row]


def _number(text: str) -> int | str | None:
    """What a field says; None for what it says instead, such as [N/A], [Insufficient Permissions] or [Unknown Error]."""
    if text.startswith("[") or text in ("N/A", "ERR!", ""):
        return None
    return int(text) if text.isdecimal() else text
