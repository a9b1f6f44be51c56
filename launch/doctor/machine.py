"""Facts of this machine: packages, cores, memory, GPUs, directories, SLURM. Changes nothing."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from launch.cluster.preflight.node_facts import GIB, installed_version, nvidia_smi

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

DISTRIBUTION = "shardtune"
EXTRAS = {
    "gpu": "FlashAttention",
    "hybrid": "kernels for linear attention and short convolutions",
    "mamba": "kernels for state-space layers",
    "tensorboard": "TensorBoard",
    "report": "the pages with plots, report.html of a run and compare.html",
    "evaluate": "metrics of classifiers, and answers checked by a JSON schema",
    "maths": "rewards that compare mathematical results, by math-verify",
    "lm_eval": "tasks of lm-evaluation-harness",
    "endpoint": "models behind an OpenAI-compatible address that judge or write answers",
    "serve": "the server of shardtune serve, where vLLM is not installed",
    "search": "hyper-parameter search by Optuna",
    "workspace": "the workspace and report of a comparison in W&B",
    "trackio": "runs in trackio",
    "energy": "energy of the hosts, by codecarbon",
    "mlflow": "runs in MLflow",
    "pii": "names and places in the search for personal data",
    "remote": "https://, s3:// and gs:// paths",
    "schedule_free": "the schedule-free optimizer",
    "torchao": "exports in 4 and 8 bits by torchao",
    "compressed": "exports in 4 and 8 bits by llm-compressor, read back",
    "qlora": "bases and exports in 4 and 8 bits by bitsandbytes, 8-bit AdamW",
}
"""Extras that users ask for, and what each brings."""
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "WANDB_MODE")
"""Variables that keep libraries from the network."""
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "SHARDTUNE_RUN_DIR")
"""Variables that a launcher sets for a rank."""
LOW_SHARED_MEMORY_GIB = 1.0
"""Free shared memory below which a note says so."""
LOW_FREE_SPACE_GIB = 5.0
"""Free space of a directory below which a note says so."""


class RequiredPackage(NamedTuple):
    """A package that shardtune needs, always or for one of its extras."""

    name: str
    allowed_versions: SpecifierSet
    """Such as `>=2.8,<3`."""


@dataclass(slots=True)
class Machine:
    """What doctor knows about this machine; it is filled step by step."""

    facts: dict[str, Any] = field(default_factory=dict)
    """What `doctor --json` prints, beside the problems and notes: {"host": "gpu1", "cores": 64, "gpus": [...], ...}."""
    problems: list[str] = field(default_factory=list)
    """What keeps runs from starting."""
    notes: list[str] = field(default_factory=list)
    """What is worth knowing."""


def examine(env: Mapping[str, str]) -> Machine:
    """Collect facts, problems and notes about this machine. What is missing raises nothing, but is a problem or a note.

    `env`: the environment variables.
    """
    machine = Machine()
    machine.facts["host"] = socket.gethostname()
    machine.facts["system"] = platform.platform()
    _add_packages(machine)
    _add_hardware(machine)
    _add_directories(machine, env)
    _add_slurm(machine)
    _add_environment(machine, env)
    return machine


def _add_packages(machine: Machine) -> None:
    """Check the packages that shardtune needs: adds their versions to the machine's facts, and a problem for each unmet one.

    facts["packages"]: {"torch": "2.8.0"}. facts["extras"]: {"gpu": {"brings": "FlashAttention", "lacks": [messages]}}. If
    shardtune is not installed, its requirements are not known: a note says so, and these facts are not set.
    """
    machine.facts["python"] = platform.python_version()
    try:
        own_metadata = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        machine.notes.append(
            f"{DISTRIBUTION} is not installed, so what it needs was not looked up: pip install -e . in the clone"
        )
        return
    machine.facts[DISTRIBUTION] = metadata.version(DISTRIBUTION)
    required, required_by_extra = _required_packages(own_metadata.get_all("Provides-Extra") or [])
    machine.facts["packages"] = {package.name: installed_version(package.name) for package in required}
    for package in required:
        problem = _package_problem(package)
        if problem:
            machine.problems.append(f"{problem}: pip install '{package.name}{package.allowed_versions}'")
    machine.facts["extras"] = {}
    for extra, brings in EXTRAS.items():
        problems = [_package_problem(package) for package in required_by_extra.get(extra, [])]
        machine.facts["extras"][extra] = {"brings": brings, "lacks": [problem for problem in problems if problem]}


def _required_packages(extras: list[str]) -> tuple[list[RequiredPackage], dict[str, list[RequiredPackage]]]:
    """Read what shardtune needs from its installed metadata: (the packages that every run needs, the further ones by extra).

    Such as ([torch >=2.8], {"gpu": [flash-attn >=2.7]}). `extras`: the names in the metadata.
    """
    from packaging.requirements import Requirement

    required: list[RequiredPackage] = []
    required_by_extra: dict[str, list[RequiredPackage]] = {}
    for requirement_text in metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(requirement_text)
        package = RequiredPackage(requirement.name, requirement.specifier)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):  # needed without any extra
            required.append(package)
            continue
        for extra in extras:
            if requirement.marker.evaluate({"extra": extra}):
                # Metadata may spell an extra with dashes, setup.py has underscores.
                required_by_extra.setdefault(extra.replace("-", "_"), []).append(package)
    return required, required_by_extra


def _package_problem(package: RequiredPackage) -> str | None:
    """What is wrong with a package that is needed: not installed, or another version; None if nothing is."""
    version = installed_version(package.name)
    if version is None:
        return f"{package.name} is not installed"
    if package.allowed_versions.contains(version, prereleases=True):
        return None
    return f"{package.name} is {version}, and {package.allowed_versions} is needed"


def _add_hardware(machine: Machine) -> None:
    """Add cores, memory and GPUs to the machine's facts, and problems with torch to its problems.

    Without torch, or with one that cannot be imported, there is the problem alone.
    """
    driver = _nvidia_driver_version()
    try:
        import torch

        from strategies.hardware import best_precision
        from strategies.runtime import cgroup_memory_limit, num_usable_cores
    except Exception as error:  # noqa: BLE001 - a broken build raises whatever its libraries do
        machine.problems.append(f"torch cannot be imported: {' '.join(str(error).split())[:200]}")
        return
    import psutil

    # Memory: of the host, or less if a container limits it. What a container uses itself is not known here.
    memory = psutil.virtual_memory()
    limit = cgroup_memory_limit()
    machine.facts["cores"] = num_usable_cores()
    machine.facts["memory_gib"] = min(memory.total, limit or memory.total) / GIB
    machine.facts["memory_free_gib"] = min(memory.available, limit or memory.available) / GIB
    machine.facts["torch_cuda"] = torch.version.cuda or torch.version.hip
    machine.facts["driver"] = driver
    machine.facts["gpus"] = []
    if torch.cuda.is_available():
        _add_gpus(machine)
        machine.facts["precision"] = machine.facts["gpus"][0]["precision"]
        return
    # No GPU for torch, although the driver has one.
    if driver is not None:
        reason = "is built without CUDA: install a CUDA build of torch"
        if torch.version.cuda:
            reason = f"is built for CUDA {torch.version.cuda}, which driver {driver} may be too old for"
        machine.problems.append(
            f"there are GPUs (nvidia-smi names them), and torch sees none: torch {torch.__version__} {reason}"
        )
    machine.facts["precision"] = str(best_precision(None))


def _add_gpus(machine: Machine) -> None:
    """Add each GPU that torch sees to the machine's facts, and a note if other processes use its memory.

    {"name": "NVIDIA H100", "memory_gib": 79.2, "free_gib": 78.5, "precision": "bf16"}
    """
    import torch

    from strategies.hardware import best_precision, gpu_of_device

    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        machine.facts["gpus"].append(
            {
                "name": torch.cuda.get_device_name(device),
                "memory_gib": total_bytes / GIB,
                "free_gib": free_bytes / GIB,
                "precision": str(best_precision(gpu_of_device(device))),
            }
        )
        if free_bytes < 0.9 * total_bytes:
            used_gib = (total_bytes - free_bytes) / GIB
            machine.notes.append(f"GPU {number}: other processes use {used_gib:.1f} of its {total_bytes / GIB:.1f} GiB")


def _nvidia_driver_version() -> str | None:
    """The version of NVIDIA's driver; None if no GPU has one."""
    rows = nvidia_smi("gpu", ("driver_version",))
    return rows[0][0] if rows else None


def _add_directories(machine: Machine, env: Mapping[str, str]) -> None:
    """Check the directories that runs use, and add them to the machine's facts, with their free space.

    Also counts the models in the cache of the hub. facts["places"]: {"cache": {"path": "/home/me/.cache/shardtune", "free_gib":
    120.0, "exists": True}, ...}. Problems: a directory whose disk cannot be looked at, or that cannot be written. Notes: little
    space. Models may lie in a directory that others fill, so that one need not be writable.
    """
    from strategies.cache_dir import cache_directory

    hub_cache = env.get("HF_HUB_CACHE") or Path(env.get("HF_HOME") or "~/.cache/huggingface").expanduser() / "hub"
    path_by_name = {
        "cache": cache_directory(),
        "models": Path(hub_cache).expanduser(),
        "here": Path.cwd(),
        "shared": Path("/dev/shm"),
    }
    machine.facts["places"] = {}
    for name, path in path_by_name.items():
        # The nearest directory that exists tells the disk.
        existing_dir = next(directory for directory in (path, *path.parents) if directory.exists())
        try:
            free_gib = shutil.disk_usage(existing_dir).free / GIB
        except OSError as error:
            machine.problems.append(f"{path}: cannot be looked at ({error.strerror})")
            continue
        machine.facts["places"][name] = {"path": str(path), "free_gib": free_gib, "exists": path.exists()}
        low_gib = LOW_SHARED_MEMORY_GIB if name == "shared" else LOW_FREE_SPACE_GIB
        if not os.access(existing_dir, os.W_OK) and name != "models":
            machine.problems.append(f"{path}: cannot be written")
        elif free_gib < low_gib:
            machine.notes.append(f"{path}: {free_gib:.1f} GiB are free")
    machine.facts["models"] = len(list(Path(hub_cache).expanduser().glob("models--*")))


def _add_slurm(machine: Machine) -> None:
    """Add to the machine's facts whether SLURM's commands are here, and a note if its controller does not answer."""
    from launch.runs.queue import read_queue

    has_slurm = shutil.which("sbatch") is not None
    machine.facts["slurm"] = has_slurm
    problem = read_queue().problem if has_slurm else None
    if problem:
        machine.notes.append(f"SLURM's commands are here, and its controller is not: {problem}")


def _add_environment(machine: Machine, env: Mapping[str, str]) -> None:
    """Check the environment for two mistakes, and add the variables that keep libraries offline to the machine's facts.

    - a note on variables of a rank that are left over from a job;
    - a problem for each package of another author that hides one of ours, since it has the same name.
    """
    machine.facts["offline"] = {name: env[name] for name in OFFLINE_VARIABLES if name in env}
    is_slurm_step = "SLURM_STEP_ID" in env
    rank_variables = [] if is_slurm_step else [name for name in RANK_VARIABLES if name in env]
    if rank_variables:
        machine.notes.append(
            f"{', '.join(rank_variables)} in the environment: left over from a job? A run here would take itself for a rank"
        )
    import conf
    import strategies
    import trainer

    root = Path(__file__).resolve().parents[2]
    for package in (conf, strategies, trainer):
        if package.__file__ and Path(package.__file__).resolve().parent.parent != root:
            machine.problems.append(
                f"another package {package.__name__} hides ours: {package.__file__}; install in a venv of its own"
            )
