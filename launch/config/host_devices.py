"""The devices of this host: what `auto` means here for device, precision and processes, and which GPUs are missing."""

import os
import subprocess
from collections.abc import Iterator

from strategies.base import Precision, StrategyName
from strategies.hardware import Gpu, best_precision, count_nvidia_gpus
from strategies.runtime import why_cuda_is_missing
from trainer.config.run import Device, LauncherName, RunConfig


def resolve_auto_for_this_host(config: RunConfig) -> None:
    """Replace `auto` for device, precision and processes by what this host has, when a run is composed on the host that trains.

    Each replacement leaves a note in `config.substitutions`, such as {"run.device": "auto -> cuda"}. Also sets `launcher.nodes`
    to the number of `launcher.hosts`, if it was left at its default of 1. Nothing is done if SLURM launches the run, since its
    job will run on another host.
    """
    if config.launcher.name is not LauncherName.local:
        return
    if config.launcher.nodes == 1:
        config.launcher.nodes = max(1, len(config.launcher.hosts))
    # Imported here: to submit a job needs no torch.
    import torch

    notes = config.substitutions
    if config.run.device is Device.auto:
        config.run.device = Device.cuda if torch.cuda.is_available() else Device.cpu
        notes["run.device"] = f"auto -> {config.run.device.value}"
        if config.run.device is Device.cpu:
            notes["run.device"] += _note_on_idle_gpus()
    if config.precision is Precision.auto:
        config.precision = best_precision_here(config.run.device)
        if config.precision is not Precision.auto:  # it stays so if the GPUs differ: each rank then settles it
            notes["precision"] = f"auto -> {config.precision.value}"
    if config.launcher.processes is None:
        config.launcher.processes = _num_processes_here(config)
        notes["launcher.processes"] = f"auto -> {config.launcher.processes}"


def _num_processes_here(config: RunConfig) -> int:
    """How many training processes this host gets, for `launcher.processes=auto`: one for each GPU.

    1 on a CPU or for the strategy `single`. In a process that torchrun has started, as many as it started on this host.
    """
    import torch

    torchrun_processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 0)
    if torchrun_processes:
        return torchrun_processes
    if config.strategy.name is StrategyName.single or config.run.device is not Device.cuda:
        return 1
    return max(1, torch.cuda.device_count())


def _note_on_idle_gpus() -> str:
    """The end of the note about a run on CPUs if the host has GPUs that torch cannot use; empty if it has none."""
    num_gpus = count_nvidia_gpus()
    if not num_gpus:
        return ""
    return f", beside {num_gpus} GPUs that their driver lists here: {why_cuda_is_missing()}"


def device_problems(config: RunConfig) -> Iterator[str]:
    """Error messages if this host lacks the GPUs that the settings ask for; none if SLURM chooses the host, or on CPUs."""
    if config.launcher.name is not LauncherName.local or config.run.device is not Device.cuda:
        return
    import torch

    reason = why_cuda_is_missing()
    if reason:
        yield f"run.device=cuda: {reason}; set run.device=cpu, or run where there is a GPU"
        return
    num_processes = config.launcher.processes or 1
    num_gpus = torch.cuda.device_count()
    # Not checked in a rank (it has a WORLD_SIZE), because a rank may see only its own GPU.
    is_rank = "WORLD_SIZE" in os.environ
    if not is_rank and num_processes > num_gpus:
        yield (
            f"launcher.processes={num_processes}: each needs a GPU of its own, and this host has {num_gpus}; "
            f"set at most {num_gpus}"
        )


def best_precision_here(device: Device) -> Precision:
    """The best precision that this host supports in hardware, for `precision=auto`: fp32 on CPUs, else what all GPUs support.

    `auto` if the GPUs differ, or cannot be asked (as AMD's): each rank then settles it for its own device.
    """
    if device is Device.cpu:
        return Precision.fp32
    # nvidia-smi is asked, because asking torch would hold GPU memory in this process for the whole run.
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        capabilities = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        precisions = {_precision_of(capability) for capability in capabilities}
    except (OSError, ValueError, subprocess.SubprocessError):
        return Precision.auto
    return precisions.pop() if len(precisions) == 1 else Precision.auto


def _precision_of(capability: str) -> Precision:
    """The best precision of a card by its compute capability: `9.0` -> bf16. Raises ValueError for another text."""
    major, minor = capability.split(".")
    return best_precision(Gpu("", (int(major), int(minor))))
