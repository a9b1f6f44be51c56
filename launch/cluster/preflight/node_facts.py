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
from typing import Any, NotRequired, TypedDict

from strategies.small_files import read_json_object

COMPARED_LIBRARIES = (
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
CODE_DIR_NAMES = ("launch", "trainer", "strategies", "conf")
DEVICE_VARIABLES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
"""Variables that list the devices a process may use."""
RELEVANT_VARIABLE_PREFIXES = ("NCCL_", "GLOO_", "TORCH_", "HF_", "OMP_NUM_THREADS", *DEVICE_VARIABLES)
"""Beginnings of environment variables that change what a run does."""
AMD_GPUS_DIRECTORY = Path("/sys/class/kfd/kfd/topology/nodes")
"""Where Linux lists AMD's GPUs, beside the processors."""
SLOWDOWN_FIELD_NAMES: tuple[tuple[str, ...], ...] = (
    ("clocks_event_reasons.hw_slowdown",),
    ("clocks_throttle_reasons.hw_slowdown",),
    (),
)
"""Field of nvidia-smi that says whether the hardware slows a GPU down: in newer drivers, in older ones, in those without."""
VISIBILITY_TIMEOUT_S = 5.0
"""Seconds after which a file that another host wrote must be seen; network file systems remember what was not there."""
COORDINATOR_FILE = "asked"
"""The file that the coordinator writes into the directory of a preflight."""
GIB = 2**30


REQUEST_VARIABLE = "SHARDTUNE_PREFLIGHT"
"""The environment variable with what is asked."""


@dataclass(kw_only=True, slots=True)
class PreflightRequest:
    """What each node of a preflight must have and check; travels to the nodes as JSON in an environment variable."""

    num_nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int = 0
    """GPUs that each node must show."""
    memory_gib: float = 0.0
    """GiB of each node that the run takes for what it keeps in host memory; 0 if it keeps nothing there."""
    token: str = ""
    """Names this preflight's directory in the run directory; random, so that two preflights of a run do not meet there."""
    run_dir: str | None = None
    model: str | None = None
    """Directory or hub id of the run's model, which must be there on every node, offline; None if the run downloads it."""
    tokenizer: str | None = None
    """The same of its tokenizer; None if the tokenizer is in the model's directory, or is downloaded."""
    revision: str | None = None
    data_paths: list[str] = field(default_factory=list)
    """Files, directories or patterns that every node must see."""
    wants_communication_test: bool = True
    """Whether the ranks meet, and their communication is measured."""
    device: str = "auto"
    """Of the ranks that test the communication: cpu, cuda or auto."""
    rendezvous: str | None = None
    """host:port at which they meet; None is found out from SLURM's variables."""
    timeout_s: float = 60.0
    """Seconds within which the ranks must have met, and each collective must be over."""

    @property
    def tests_communication(self) -> bool:
        """Whether the communication of the ranks is measured. A single rank has nobody to communicate with."""
        return self.wants_communication_test and self.num_nodes * self.ranks_per_node > 1

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_environment(cls) -> PreflightRequest:
        """The request in this process's environment. Errors: KeyError if there is none."""
        return cls(**json.loads(os.environ[REQUEST_VARIABLE]))


class NodeFacts(TypedDict):
    """What one node reports about itself, as JSON."""

    node: int
    host: str
    time: float
    """Seconds since the epoch, by the clock of this node."""
    python: str
    executable: str
    clone: dict[str, str]
    """By `code_facts`."""
    packages: dict[str, str]
    """Versions of the `COMPARED_LIBRARIES` that are installed."""
    cores: int | None
    memory_free_gib: float | None
    environment: dict[str, str]
    """Variables that change what a run does."""
    paths: dict[str, bool]
    """Whether each path of the request is visible."""
    run_dir: NotRequired[dict[str, Any]]
    """By `check_run_dir`; missing if the run has no directory."""
    models: dict[str, dict[str, Any]]
    """By `model_facts`, for each model and tokenizer of the request."""
    gpus: list[dict[str, Any]]
    gpu_count: int
    gpu_processes: list[str]
    """These three by `gpu_facts`."""
    heard_at: NotRequired[float]
    """Seconds since the epoch when the report came in, by the coordinator's clock; added by the coordinator."""


def node_facts(request: PreflightRequest, node: int) -> dict[str, Any]:
    """Describe this node for a preflight, in which all nodes of a job are asked whether they can run it: `NodeFacts`.

    `request`: what the nodes must have.
    `node`: the number of this one.
    Writes a file into the run directory, by which the coordinator sees this node.
    Nothing is judged here, and nothing that is missing raises an error. `heard_at` is left to the coordinator.
    """
    environment = {}
    for name, setting in sorted(os.environ.items()):
        if name.startswith(RELEVANT_VARIABLE_PREFIXES):
            environment[name] = setting
    visible_paths = {}
    for path in request.data_paths:
        pattern = str(Path(path).expanduser())
        visible_paths[path] = bool(glob.glob(pattern, recursive=True))  # noqa: PTH207 - absolute patterns too
    facts: dict[str, Any] = {
        "node": node,
        "host": socket.gethostname(),
        "time": time.time(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "clone": code_facts(),
        "packages": _versions_of_compared_libraries(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_free_gib": _memory_free_gib(),
        "environment": environment,
        "paths": visible_paths,
    }
    if request.run_dir is not None:
        facts["run_dir"] = check_run_dir(Path(request.run_dir), request.token, node)
    facts["models"] = {}
    for model in dict.fromkeys((request.model, request.tokenizer)):  # the same directory once
        if model is not None:
            facts["models"][model] = model_facts(model, request.revision)
    return facts | gpu_facts()


def _versions_of_compared_libraries() -> dict[str, str]:
    """The versions of the installed libraries that must be the same on all nodes: {"torch": "2.8.0", ...}."""
    versions = {}
    for name in COMPARED_LIBRARIES:
        version = installed_version(name)
        if version is not None:
            versions[name] = version
    return versions


def code_facts() -> dict[str, str]:
    """Where shardtune's code lies on this node, and a digest of its files, which must be the same on all nodes."""
    root = Path(__file__).resolve().parents[3]
    digest = hashlib.sha256()
    for package in CODE_DIR_NAMES:
        for file in sorted([*(root / package).rglob("*.py"), *(root / package).rglob("*.yaml")]):
            digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return {"path": str(root), "digest": digest.hexdigest()[:12]}


def installed_version(name: str) -> str | None:
    """The version of a distribution; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _memory_free_gib() -> float | None:
    """Memory of this host that is available, in GiB; None if the kernel does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 / GIB
    return None


def check_run_dir(run_dir: Path, preflight_id: str, node_number: int) -> dict[str, Any]:
    """Check the run directory from this node, and write a file there, by which the coordinator sees that they share a disk.

    `preflight_id`: names this preflight's directory in the run directory.
    The keys of the result:

    - sees: whether the coordinator's file is visible here, at the latest after `VISIBILITY_TIMEOUT_S` seconds. If False, only
      `problem` (None) is there besides;
    - problem: why this node cannot write there; None if it can;
    - behind_s: seconds by which this host's clock is behind that of the file system;
    - free_gib: free space.
    """
    directory = run_dir / "preflight" / preflight_id
    facts: dict[str, Any] = {"sees": False, "problem": None}
    deadline = time.monotonic() + VISIBILITY_TIMEOUT_S
    while not (directory / COORDINATOR_FILE).exists():
        if time.monotonic() > deadline:
            return facts
        time.sleep(0.2)
    facts["sees"] = True
    try:
        own_file = directory / str(node_number)
        own_file.write_text(socket.gethostname(), encoding="utf-8")
        facts["behind_s"] = own_file.stat().st_mtime - time.time()
        facts["free_gib"] = shutil.disk_usage(directory).free / GIB
    except OSError as error:
        facts["problem"] = error.strerror or str(error)
    return facts


def model_facts(path_or_hub_id: str, revision: str | None) -> dict[str, Any]:
    """Which files of a model this node has without the network, so that nodes can be compared: {"files": 12, ...}.

    A hub id is looked up in the hub's cache. The keys: files (how many), digest (of their names and sizes), lacking (weight files
    that the model's index names and that are missing). {"files": 0, "digest": None} if there are none.
    """
    directory = Path(path_or_hub_id).expanduser()
    if not directory.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            directory = Path(snapshot_download(path_or_hub_id, revision=revision, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError, OSError):
            return {"files": 0, "digest": None}
    size_by_name = {}
    for file in directory.rglob("*"):
        if file.is_file():
            size_by_name[str(file.relative_to(directory))] = file.stat().st_size
    # Sizes instead of contents: reading a large model takes minutes.
    digest = hashlib.sha256(repr(sorted(size_by_name.items())).encode()).hexdigest()[:12]
    missing_files: list[str] = []
    index_file = directory / "model.safetensors.index.json"
    if index_file.is_file():
        file_by_tensor = read_json_object(index_file).get("weight_map")
        if isinstance(file_by_tensor, dict):  # else the model itself is refused when it is read
            weight_files = {str(file) for file in file_by_tensor.values()}
            missing_files = sorted(weight_files - size_by_name.keys())
    return {"files": len(size_by_name), "digest": digest, "lacking": missing_files}


def gpu_facts() -> dict[str, Any]:
    """Describe the GPUs of this node: NVIDIA's with the processes on them, or else AMD's; none if neither driver lists any.

    The result's keys: gpus (a dictionary each: {"index": 0, "name": "NVIDIA H100", "memory_mib": 81559, ...}), gpu_count (how
    many of them a process may use), gpu_processes (a text each: "pid name MiB").
    """
    # Keys for the columns of `_nvidia_smi_rows`, in order: their names there depend on the driver. A row lacks the last column
    # if the driver does not know it.
    keys = ("index", "name", "memory_mib", "used_mib", "ecc_errors", "clock_mhz", "slowed")
    gpus = []
    for row in _nvidia_smi_rows():
        gpus.append({key: _parse_cell(cell) for key, cell in zip(keys, row, strict=False)})
    if not gpus:
        gpus = _amd_gpus()
    for gpu in gpus:
        gpu["slowed"] = gpu.get("slowed") == "Active"
    process_rows = nvidia_smi("compute-apps", ("pid", "process_name", "used_memory")) or []
    # A variable such as CUDA_VISIBLE_DEVICES leaves a process at most as many devices as it lists.
    num_usable_gpus = len(gpus)
    for variable in DEVICE_VARIABLES:
        devices = os.environ.get(variable)
        if devices is not None:
            listed_devices = [device for device in devices.split(",") if device.strip()]
            num_usable_gpus = min(num_usable_gpus, len(listed_devices))
    return {"gpus": gpus, "gpu_count": num_usable_gpus, "gpu_processes": [" ".join(row) for row in process_rows]}


def _nvidia_smi_rows() -> list[list[str]]:
    """Ask nvidia-smi about each GPU: a row of texts with the fields below; empty without NVIDIA's GPUs.

    The last field says whether the GPU is slowed down. Its name depends on the driver, and nvidia-smi refuses all fields if it
    does not know one. So the names are tried in turn (`SLOWDOWN_FIELD_NAMES`), last without the field.
    """
    fields = ("index", "name", "memory.total", "memory.used", "ecc.errors.uncorrected.volatile.total", "clocks.max.sm")
    for slowdown_fields in SLOWDOWN_FIELD_NAMES:  # tuples of one name, the last one empty
        rows = nvidia_smi("gpu", (*fields, *slowdown_fields))
        if rows:
            return rows
    return []


def _amd_gpus() -> list[dict[str, Any]]:
    """The AMD GPUs of this node as the Linux kernel lists them: [{"index": 0, "name": ...}]; empty if there are none."""
    gpus: list[dict[str, Any]] = []
    for node in sorted(AMD_GPUS_DIRECTORY.glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            lines = (node / "properties").read_text(encoding="utf-8").splitlines()
            properties = dict(line.split(maxsplit=1) for line in lines)
            is_gpu = int(properties["simd_count"]) > 0  # a processor has none
            if is_gpu:
                gpus.append({"index": len(gpus), "name": (node / "name").read_text(encoding="utf-8").strip()})
        except (OSError, ValueError, KeyError):
            continue
    return gpus


def nvidia_smi(query: str, fields: tuple[str, ...]) -> list[list[str]] | None:
    """Ask nvidia-smi for some fields: "gpu", ("name", "memory.total") -> [["NVIDIA H100", "81559"]], a row for each GPU.

    `query`: "gpu", or "compute-apps" for a row for each process on them.
    None if the tool is not there, fails, or does not know one of the fields.
    """
    command = ["nvidia-smi", f"--query-{query}={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if process.returncode:
        return None
    rows = []
    for row in csv.reader(process.stdout.splitlines()):
        if row:
            rows.append([cell.strip() for cell in row])
    return rows


def _parse_cell(text: str) -> int | str | None:
    """A cell of nvidia-smi as a number or text; None if it holds no value: [N/A], [Insufficient Permissions] and the like."""
    if text.startswith("[") or text in ("N/A", "ERR!", ""):
        return None
    return int(text) if text.isdecimal() else text
