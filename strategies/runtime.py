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
from strategies.flight_recorder import keep_records
from strategies.matmul import Matmul, MatmulChoice, agree, choose, restore
from strategies.network import refuse_unknown_interface

MANY = 64
"""Ranks from which gloo connects two of them when they first talk: at once, each would open a socket to every other."""

NO_NETWORK = "fake"
"""Backend of a group that talks to nobody: of a simulated rank, and of one rank on a host without any network."""

Result = TypeVar("Result")

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
    torch.set_num_threads(threads or told_threads() or max(1, usable_cores() // local_world))
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if use_cuda:
        # With one visible device per task (SLURM's gpus-per-task) the local rank can exceed the device count.
        torch_device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(torch_device)
    else:
        torch_device = torch.device("cpu")
    products = None if use_cuda else choose(matmul)
    # DeepSpeed, which other libraries import when it is installed, would guess, and say so.
    os.environ.setdefault("DS_ACCELERATOR", torch_device.type)
    if world >= MANY:
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    if not dist.is_initialized():
        refuse_unknown_interface()
        keep_records()
        backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        timeout = timedelta(seconds=timeout_s)
        if store is not None:
            met = dist.PrefixStore("default_pg", store)
            dist.init_process_group(backend, store=met, rank=rank, world_size=world, timeout=timeout)
        elif "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            for key, value in {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
                os.environ.setdefault(key, value)
            _form_group_of_one(backend, timeout)
    control = dist.group.WORLD  # its CPU half: a second group of all ranks would connect each of them with each again
    runtime = Runtime(rank, world, local_rank, local_world, torch_device, control, products, shared_memory, timeout_s)
    return runtime if products is None else replace(runtime, matmul=agree(gather_objects(products, runtime), rank))


def with_matmul(library: Matmul, runtime: Runtime) -> Runtime:
    """The runtime of a CPU with `library` for its float32 products from now on, or BLAS where a rank cannot take it.

    All ranks must call, with the same library.
    """
    choice = agree(gather_objects(choose(library), runtime), runtime.rank)
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
    visible, said = os.environ.get("CUDA_VISIBLE_DEVICES"), ""
    hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
    try:
        torch.cuda.init()  # says why: a driver that is too old for this torch, no driver, no device
    except (RuntimeError, AssertionError) as error:
        said = f": {str(error).split('. ')[0]}"
    return f"torch {torch.__version__} finds no device{hidden}{said}; does nvidia-smi or rocm-smi show one?"


def told_threads() -> int | None:
    """What OMP_NUM_THREADS says; None where it is torchrun's own 1, which would leave all but one core of a rank idle."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    # Our launchers settle the number before they start torchrun.
    by_torchrun = told == "1" and "TORCHELASTIC_RUN_ID" in os.environ and "SHARDTUNE_RUN_DIR" not in os.environ
    return int(told) if told.isdecimal() and int(told) > 0 and not by_torchrun else None


_CGROUPS, _MEMBERSHIP, _HOST = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"), Path("/proc/vmstat")


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
    host = (path.read_text(encoding="utf-8") for path in [_HOST] if path.is_file())
    for text in (*_cgroup_files("memory.events"), *host):
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
    for most, now, about in zip(*map(_cgroup_files, ("memory.max", "memory.current", "memory.stat")), strict=False):
        if most.strip() != "max":  # of what is used, pages of files that were not touched lately can be had at once
            cached = next((int(line.split()[1]) for line in about.splitlines() if line.startswith("inactive_file ")), 0)
            free = min(free, int(most) - int(now) + cached)
    return max(0, free)


def _cgroup_files(name: str) -> Iterator[str]:
    """What the file `name` says in the cgroup (version 2) of this process and in those around it, where it exists."""
    try:
        own = next(line[3:] for line in _MEMBERSHIP.read_text(encoding="utf-8").splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        own = "/"
    here = _CGROUPS / own.strip("/")
    for place in (here, *here.parents):
        if place.is_relative_to(_CGROUPS) and (place / name).is_file():
            yield (place / name).read_text(encoding="utf-8")


def bound_groups(runtime: Runtime, more_s: float = 0) -> None:
    """Give all groups the run's timeout, and `more_s` beside it; half an hour is torch's own. No collective."""
    for group in living_groups():
        if dist.get_rank(group) >= 0 and dist.get_backend(group) != NO_NETWORK:  # a simulated one answers at once
            set_group_timeout(timedelta(seconds=runtime.timeout_s + more_s), group)


@contextmanager
def patience(runtime: Runtime, more_s: float) -> Iterator[None]:
    """Meanwhile ranks wait so many seconds longer for each other: one works for all. No collective; all ranks are to enter."""
    bound_groups(runtime, more_s)
    try:
        yield
    finally:
        bound_groups(runtime)


def stop(*, failed: bool = False) -> None:
    """Leave the job. No collective: a dead peer must not hold up the others.

    After a failure in a job of several ranks the groups stay, since peers may sit in a collective, for which NCCL waits
    before it destroys one; the process is to leave at once.
    """
    restore()
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
    box = [value]
    dist.broadcast_object_list(box, src=0, group=runtime.control_group)
    return box[0]


def found_on_main(look: Callable[[], Result], runtime: Runtime) -> Result:
    """What `look` finds on rank 0, where alone it is called, on every rank. All ranks must call.

    Raises StorageError on every rank where it raised that or OSError: nobody waits for a rank that has left.
    """
    found: tuple[Result | None, str | None] = (None, None)
    if runtime.is_main:
        try:
            found = (look(), None)
        except (OSError, StorageError) as error:
            found = (None, reason(error) if isinstance(error, OSError) else str(error))
    result, problem = broadcast_object(found, runtime)
    if problem is not None:
        raise StorageError(problem)
    return result  # type: ignore[no-any-return]


def gather_objects(value: Any, runtime: Runtime) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank. All ranks must call."""
    if runtime.world_size == 1 or runtime.simulated:
        return [value] * runtime.world_size
    box: list[Any] = [None] * runtime.world_size
    dist.all_gather_object(box, value, group=runtime.control_group)
    return box


def first_error(error: BaseException | None, runtime: Runtime) -> str | None:
    """Agree on whether a step that each rank did alone has failed anywhere. All ranks must call.

    Returns the lowest failing rank's message, None where all succeeded; so that no rank goes on into a collective that
    a failed peer will never join.
    """
    messages = gather_objects(None if error is None else f"{type(error).__name__}: {error}", runtime)
    return next((f"rank {rank}: {message}" for rank, message in enumerate(messages) if message), None)


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
