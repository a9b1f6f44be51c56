"""The process's place in the job: ranks, device, process groups, seeding, and the few collectives everybody uses."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from strategies.atomic_io import reason
from strategies.compat.process_groups import living_groups, make_fake_backend_known, set_group_timeout
from strategies.errors import ConfigError, StorageError
from strategies.flight_recorder import enable_recorder
from strategies.matmul import Matmul, MatmulChoice, agree_on_library, choose_library, restore_default
from strategies.network import refuse_unknown_interface

LAZY_CONNECTION_RANKS = 64
"""Ranks from which gloo connects two of them when they first talk: at once, each would open a socket to every other."""

NO_NETWORK = "fake"
"""Backend of a group that talks to nobody: of a simulated rank, and of one rank on a host without any network."""

Returned = TypeVar("Returned")

SIMULATED = torch.device("cpu", 0)
"""Stands for a GPU in a simulation (`strategies/simulation.py`); the host is the device "cpu", without an index."""


def device_kind(device: torch.device) -> str:
    """The type of device whose kernels and settings are chosen: that of `device`, or of the GPU that it stands for."""
    return "cuda" if device == SIMULATED else device.type


@dataclass(frozen=True, slots=True)
class Runtime:
    """Where this process stands. `control_group` talks over the CPU and never waits for the device."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    control_group: Any
    matmul: MatmulChoice | None = None
    """On a CPU, the library of float32 products; None on GPUs."""
    shared_memory: bool = True
    """Whether CPU ranks on one host may exchange through shared memory."""
    timeout_s: float = 600
    """Seconds after which a collective that makes no progress fails."""
    simulated: bool = False
    """Whether the other ranks are made up: then they answer what this one says."""

    @property
    def kind(self) -> str:
        """The type of device that the run is for."""
        return device_kind(self.device)

    @property
    def hosts(self) -> int:
        """How many hosts the ranks are on."""
        return self.world_size // self.local_world_size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes shared files."""
        return self.rank == 0


def start(
    device: str,
    *,
    timeout_s: int,
    threads: int = 0,
    matmul: Matmul = Matmul.auto,
    shared_memory: bool = True,
    store: Any = None,
) -> Runtime:
    """Join the job described by the environment (torchrun's variables), or form a job of one.

    `store` is the one that the ranks have met by (`strategies/rendezvous.py`); without it they meet here.

    All ranks must call, once. Sets the CPU thread count: `threads`, or this job's cores divided by the ranks on the host;
    on a CPU also the library of float32 products, the same on every rank. Raises ConfigError for `cuda` where there is none.
    """
    if device == "cuda" and (reason := missing_cuda()):
        raise ConfigError(f"run.device=cuda: {reason}; set run.device=cpu, or run where there is a GPU")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    torch.set_num_threads(threads or threads_from_environment() or max(1, usable_cores() // local_world))
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if use_cuda:
        # With one visible device per task (SLURM's gpus-per-task) the local rank can exceed the device count.
        torch_device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(torch_device)
    else:
        torch_device = torch.device("cpu")
    library_choice = None if use_cuda else choose_library(matmul)
    # DeepSpeed, which other libraries import when it is installed, would guess, and say so.
    os.environ.setdefault("DS_ACCELERATOR", torch_device.type)
    if world >= LAZY_CONNECTION_RANKS:
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    if not dist.is_initialized():
        refuse_unknown_interface()
        enable_recorder()
        backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        timeout = timedelta(seconds=timeout_s)
        if store is not None:
            prefixed_store = dist.PrefixStore("default_pg", store)
            dist.init_process_group(backend, store=prefixed_store, rank=rank, world_size=world, timeout=timeout)
        elif "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            for key, value in {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
                os.environ.setdefault(key, value)
            _form_group_of_one(backend, timeout)
    control_group = (
        dist.group.WORLD
    )  # its CPU half: a second group of all ranks would connect each of them with each again
    runtime = Runtime(
        rank, world, local_rank, local_world, torch_device, control_group, library_choice, shared_memory, timeout_s
    )
    return (
        runtime
        if library_choice is None
        else replace(runtime, matmul=agree_on_library(gather_objects(library_choice, runtime), rank))
    )


def with_matmul(library: Matmul, runtime: Runtime) -> Runtime:
    """The runtime of a CPU with `library` for its float32 products from now on, or BLAS where a rank cannot take it.

    All ranks must call, with the same library.
    """
    choice = agree_on_library(gather_objects(choose_library(library), runtime), runtime.rank)
    return replace(runtime, matmul=choice)


def _form_group_of_one(backend: str, timeout: timedelta) -> None:
    """The process group of a job of one rank, which talks to nobody and needs no network."""
    try:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    except RuntimeError as error:
        # gloo binds an address, and a container without any network has none, not even 127.0.0.1.
        if "Unable to find" not in str(error):
            raise
        make_fake_backend_known()
        dist.init_process_group(NO_NETWORK, store=dist.HashStore(), rank=0, world_size=1)


def missing_cuda() -> str | None:
    """Why no CUDA device can be used here; None where one can."""
    if torch.cuda.is_available():
        return None
    if not (torch.version.cuda or torch.version.hip):
        return f"this torch ({torch.__version__}) is built for CPUs alone"
    visible, driver_error = os.environ.get("CUDA_VISIBLE_DEVICES"), ""
    visible_devices = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
    try:
        torch.cuda.init()  # says why: a driver that is too old for this torch, no driver, no device
    except (RuntimeError, AssertionError) as error:
        driver_error = f": {str(error).split('. ')[0]}"
    return f"torch {torch.__version__} finds no device{visible_devices}{driver_error}; does nvidia-smi or rocm-smi show one?"


def threads_from_environment() -> int | None:
    """What OMP_NUM_THREADS says; None where it is torchrun's own 1, which would leave all but one core of a rank idle."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    # Our launchers settle the number before they start torchrun.
    set_by_torchrun = text == "1" and "TORCHELASTIC_RUN_ID" in os.environ and "SHARDTUNE_RUN_DIR" not in os.environ
    return int(text) if text.isdecimal() and int(text) > 0 and not set_by_torchrun else None


_CGROUPS, _CGROUP_OF_PROCESS, _HOST_COUNTERS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"), Path("/proc/vmstat")


def usable_cores() -> int:
    """Cores this process may use: its affinity, or the CPU quota of its cgroup where that is less; at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = (text.split() for text in _cgroup_files("cpu.max"))
    return max(1, min([allowed, *(int(quota) // int(period) for quota, period in limits if quota != "max")]))


def cgroup_memory() -> int | None:
    """Bytes that the cgroups of this process allow, None where they set no limit."""
    limits = (text.strip() for text in _cgroup_files("memory.max"))
    return min((int(limit) for limit in limits if limit != "max"), default=None)


def out_of_memory_kills() -> int | None:
    """Processes that the kernel has killed for memory so far; None where it does not say.

    Of this process's cgroup and those below it (version 2), where its children are and no other job of the host; of the whole
    host where that is not counted.
    """
    host_texts = (path.read_text(encoding="utf-8") for path in [_HOST_COUNTERS] if path.is_file())
    for text in (*_cgroup_files("memory.events"), *host_texts):
        for line in text.splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None


def free_host_memory() -> int | None:
    """Bytes that this process may still take of its host, by the kernel's estimate and its cgroups; None where nobody can say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    for limit, used, statistics in zip(
        *map(_cgroup_files, ("memory.max", "memory.current", "memory.stat")), strict=False
    ):
        if limit.strip() != "max":  # of what is used, pages of files that were not touched lately can be had at once
            cached = next(
                (int(line.split()[1]) for line in statistics.splitlines() if line.startswith("inactive_file ")), 0
            )
            free = min(free, int(limit) - int(used) + cached)
    return max(0, free)


def _cgroup_files(name: str) -> Iterator[str]:
    """What the file `name` says in the cgroup (version 2) of this process and in those around it, where it exists."""
    try:
        own_cgroup = next(
            line[3:] for line in _CGROUP_OF_PROCESS.read_text(encoding="utf-8").splitlines() if line.startswith("0::")
        )
    except (OSError, StopIteration):
        own_cgroup = "/"
    directory_of_process = _CGROUPS / own_cgroup.strip("/")
    for directory in (directory_of_process, *directory_of_process.parents):
        if directory.is_relative_to(_CGROUPS) and (directory / name).is_file():
            yield (directory / name).read_text(encoding="utf-8")


def set_group_timeouts(runtime: Runtime, more_s: float = 0) -> None:
    """Give all groups the run's timeout, and `more_s` beside it; half an hour is torch's own. No collective."""
    for group in living_groups():
        if dist.get_rank(group) >= 0 and dist.get_backend(group) != NO_NETWORK:  # a simulated one answers at once
            set_group_timeout(timedelta(seconds=runtime.timeout_s + more_s), group)


@contextmanager
def longer_timeout(runtime: Runtime, more_s: float) -> Iterator[None]:
    """Meanwhile ranks wait so many seconds longer for each other: one works for all. No collective; all ranks are to enter."""
    set_group_timeouts(runtime, more_s)
    try:
        yield
    finally:
        set_group_timeouts(runtime)


def stop(*, failed: bool = False) -> None:
    """Leave the job. No collective: a dead peer must not hold up the others.

    After a failure in a job of several ranks the groups stay, since peers may sit in a collective, for which NCCL waits
    before it destroys one; the process is to leave at once.
    """
    restore_default()
    if dist.is_initialized() and not (failed and dist.get_world_size() > 1):
        dist.destroy_process_group()


def dist_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum `values` over all ranks, in place where there is more than one. All ranks must call."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def broadcast_object(value: Any, runtime: Runtime) -> Any:
    """Rank 0's `value`, on every rank. All ranks must call."""
    if runtime.world_size == 1 or runtime.simulated:
        return value
    slots = [value]
    dist.broadcast_object_list(slots, src=0, group=runtime.control_group)
    return slots[0]


def call_on_main(function: Callable[[], Returned], runtime: Runtime) -> Returned:
    """What `function` finds on rank 0, where alone it is called, on every rank. All ranks must call.

    Raises StorageError on every rank where it raised that or OSError: nobody waits for a rank that has left.
    """
    outcome: tuple[Returned | None, str | None] = (None, None)
    if runtime.is_main:
        try:
            outcome = (function(), None)
        except (OSError, StorageError) as error:
            outcome = (None, reason(error) if isinstance(error, OSError) else str(error))
    returned, problem = broadcast_object(outcome, runtime)
    if problem is not None:
        raise StorageError(problem)
    return returned  # type: ignore[no-any-return]


def gather_objects(value: Any, runtime: Runtime) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank. All ranks must call."""
    if runtime.world_size == 1 or runtime.simulated:
        return [value] * runtime.world_size
    gathered: list[Any] = [None] * runtime.world_size
    dist.all_gather_object(gathered, value, group=runtime.control_group)
    return gathered


@dataclass(frozen=True, slots=True)
class RankError:
    """The error with which a step failed that each rank did alone."""

    rank: int
    kind: str
    """The name of the exception's class."""
    text: str
    """The exception's message."""

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.kind}: {self.text}"


def first_error(error: BaseException | None, runtime: Runtime) -> RankError | None:
    """Agree on whether a step that each rank did alone has failed anywhere. All ranks must call.

    Returns the error of the lowest rank that failed; None if all succeeded. Without it a rank would go on into a collective that
    a failed peer will never join.
    """
    failures = gather_objects(None if error is None else (type(error).__name__, str(error)), runtime)
    for rank, failure in enumerate(failures):
        if failure is not None:
            return RankError(rank, *failure)
    return None


def barrier(runtime: Runtime) -> None:
    """Wait for every rank. All ranks must call."""
    if runtime.world_size > 1 and not runtime.simulated:
        dist.barrier(group=runtime.control_group)


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on nothing else (no rank, no process)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout for one step of one rank: a resumed run draws what the uninterrupted one would have drawn."""
    torch.manual_seed(derive_seed(seed, "step", step, rank))


def peak_memory_gib(device: torch.device) -> dict[str, float]:
    """Peaks of this rank in GiB; waits for nothing. On a CPU the process's resident set under `memory_gib`.

    On CUDA what tensors took (`memory_gib`) and what the allocator held for them (`memory_reserved_gib`).
    """
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {"memory_gib": allocated / 2**30, "memory_reserved_gib": reserved / 2**30}
    import resource

    return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
