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
from typing import Any

from launch.cluster.preflight.node_facts import GIB, installed_version, nvidia_smi

DISTRIBUTION = "shardtune"
EXTRAS = {
    "gpu": "FlashAttention",
    "hybrid": "kernels for linear attention and short convolutions",
    "mamba": "kernels for state-space layers",
    "tensorboard": "TensorBoard",
    "report": "the pages with plots, report.html of a run and compare.html",
    "evaluate": "metrics of classifiers, and answers checked by a JSON schema",
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
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "WANDB_MODE")
LEFT_OVER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "SHARDTUNE_RUN_DIR")
LEAST_SHARED, LEAST_CACHE = 1.0, 5.0
"""GiB below which a word is said."""


@dataclass(slots=True)
class Machine:
    """What was found. `problems` keep runs from starting; `notes` are worth knowing."""

    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def look(env: Mapping[str, str]) -> Machine:
    """All of it. Nothing here raises for what is missing."""
    found = Machine()
    found.facts["host"] = socket.gethostname()
    found.facts["system"] = platform.platform()
    _packages(found)
    _torch(found)
    _places(found, env)
    _slurm(found)
    _environment(found, env)
    return found


def _packages(found: Machine) -> None:
    """Versions of what is required, and which extras are whole."""
    found.facts["python"] = platform.python_version()
    try:
        about = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        found.notes.append(
            f"{DISTRIBUTION} is not installed, so what it needs was not looked up: pip install -e . in the clone"
        )
        return
    found.facts[DISTRIBUTION] = metadata.version(DISTRIBUTION)
    needed, extras = _requirements(about.get_all("Provides-Extra") or [])
    found.facts["packages"] = {name: installed_version(name) for name, _ in needed}
    for name, wanted in needed:
        if problem := _unmet(name, wanted):
            found.problems.append(f"{problem}: pip install '{name}{wanted}'")
    found.facts["extras"] = {}
    for extra, what in EXTRAS.items():
        lacking = [problem for name, wanted in extras.get(extra, []) if (problem := _unmet(name, wanted))]
        found.facts["extras"][extra] = {"brings": what, "lacks": lacking}


def _requirements(extras: list[str]) -> tuple[list[tuple[str, Any]], dict[str, list[tuple[str, Any]]]]:
    """(name, versions) of what is always needed, and of what each extra adds."""
    from packaging.requirements import Requirement

    needed: list[tuple[str, Any]] = []
    of_extra: dict[str, list[tuple[str, Any]]] = {}
    for text in metadata.requires(DISTRIBUTION) or []:
        each = Requirement(text)
        if each.marker is None or each.marker.evaluate({"extra": ""}):
            needed.append((each.name, each.specifier))
            continue
        for extra in extras:
            if each.marker.evaluate({"extra": extra}):
                of_extra.setdefault(extra.replace("-", "_"), []).append((each.name, each.specifier))
    return needed, of_extra


def _unmet(name: str, wanted: Any) -> str | None:
    """What is wrong with an installed package; None where nothing is."""
    version = installed_version(name)
    if version is None:
        return f"{name} is not installed"
    return None if wanted.contains(version, prereleases=True) else f"{name} is {version}, and {wanted} is needed"


def _torch(found: Machine) -> None:
    """Cores, memory and GPUs, as torch and the driver see them."""
    driver = _driver()
    try:
        import torch

        from strategies.hardware import best_precision, gpu_of
        from strategies.runtime import cgroup_memory, usable_cores
    except Exception as error:  # noqa: BLE001 - a broken build raises whatever its libraries do
        found.problems.append(f"torch cannot be imported: {' '.join(str(error).split())[:200]}")
        return
    import psutil

    memory = psutil.virtual_memory()
    limit = cgroup_memory()
    found.facts["cores"] = usable_cores()
    found.facts["memory_gib"] = min(memory.total, limit or memory.total) / GIB
    found.facts["memory_free_gib"] = min(memory.available, limit or memory.available) / GIB
    found.facts["torch_cuda"] = torch.version.cuda or torch.version.hip
    found.facts["driver"] = driver
    found.facts["gpus"] = []
    if not torch.cuda.is_available():
        if driver is not None:
            built = f"is built for CUDA {torch.version.cuda}, which driver {driver} may be too old for"
            why = built if torch.version.cuda else "is built without CUDA: install a CUDA build of torch"
            found.problems.append(
                f"there are GPUs (nvidia-smi names them), and torch sees none: torch {torch.__version__} {why}"
            )
        found.facts["precision"] = str(best_precision(None))
        return
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        free, total = torch.cuda.mem_get_info(device)
        about = {"name": torch.cuda.get_device_name(device), "memory_gib": total / GIB, "free_gib": free / GIB}
        found.facts["gpus"].append({**about, "precision": str(best_precision(gpu_of(device)))})
        if free < 0.9 * total:
            found.notes.append(
                f"GPU {number}: {(total - free) / GIB:.1f} of its {total / GIB:.1f} GiB are in use by somebody"
            )
    found.facts["precision"] = found.facts["gpus"][0]["precision"]


def _driver() -> str | None:
    """The version of NVIDIA's driver; None if no GPU has one."""
    rows = nvidia_smi("gpu", ("driver_version",))
    return rows[0][0] if rows else None


def _places(found: Machine, env: Mapping[str, str]) -> None:
    """The directories that runs write to, with their free space."""
    from strategies.cache_dir import cache_directory

    hub = env.get("HF_HUB_CACHE") or Path(env.get("HF_HOME") or "~/.cache/huggingface").expanduser() / "hub"
    places = {
        "cache": cache_directory(),
        "models": Path(hub).expanduser(),
        "here": Path.cwd(),
        "shared": Path("/dev/shm"),
    }
    found.facts["places"] = {}
    for name, path in places.items():
        above = next(each for each in (path, *path.parents) if each.exists())
        try:
            free = shutil.disk_usage(above).free / GIB
        except OSError as error:
            found.problems.append(f"{path}: cannot be looked at ({error.strerror})")
            continue
        found.facts["places"][name] = {"path": str(path), "free_gib": free, "exists": path.exists()}
        if not os.access(above, os.W_OK) and name != "models":
            found.problems.append(f"{path}: cannot be written")
        elif free < (LEAST_SHARED if name == "shared" else LEAST_CACHE):
            found.notes.append(f"{path}: {free:.1f} GiB are free")
    found.facts["models"] = len(list(Path(hub).expanduser().glob("models--*")))


def _slurm(found: Machine) -> None:
    from launch.runs.queue import ask

    found.facts["slurm"] = shutil.which("sbatch") is not None
    if found.facts["slurm"] and (problem := ask().problem):
        found.notes.append(f"SLURM's commands are here, and its controller is not: {problem}")


def _environment(found: Machine, env: Mapping[str, str]) -> None:
    """Variables that change what a run does, and packages of our names that are not ours."""
    found.facts["offline"] = {name: env[name] for name in OFFLINE if name in env}
    left = [name for name in LEFT_OVER if name in env and "SLURM_STEP_ID" not in env]
    if left:
        found.notes.append(
            f"{', '.join(left)} in the environment: left over from a job? A run here would take itself for a rank"
        )
    import conf
    import strategies
    import trainer

    own = Path(__file__).resolve().parents[2]
    for package in (conf, strategies, trainer):
        if package.__file__ and Path(package.__file__).resolve().parent.parent != own:
            found.problems.append(
                f"another package {package.__name__} hides ours: {package.__file__}; install in a venv of its own"
            )
