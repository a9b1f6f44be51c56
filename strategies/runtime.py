"""The process's place in the job: ranks, device, process groups, seeding, and the few collectives everybody uses."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from strategies.atomic_io import error_summary
from strategies.compat.process_groups import living_groups, make_fake_backend_known, set_group_timeout
from strategies.errors import ConfigError, StorageError
from strategies.flight_recorder import enable_recorder
from strategies.matmul import (
    Matmul,
    MatmulChoice,
    agree_on_matmul_library,
    choose_matmul_library,
    use_default_matmul_library,
)
from strategies.network import check_gloo_interfaces

MIN_RANKS_FOR_LAZY_CONNECTIONS = 64
"""From this many ranks on, gloo connects two ranks only when they first talk. Otherwise each opens a socket to every other."""

FAKE_BACKEND = "fake"
"""Backend of a group that talks to nobody: of a simulated rank, and of one rank on a host without any network."""

Returned = TypeVar("Returned")

SIMULATED = torch.device("cpu", 0)
"""Stands for a GPU in a simulation (`strategies/simulation.py`); the host is the device "cpu", without an index."""


def device_kind(device: torch.device) -> str:
    """The type of device whose kernels and settings are chosen: that of `device`, or of the GPU that it stands for."""
    return "cuda" if device == SIMULATED else device.type


@dataclass(frozen=True, slots=True)
class Runtime:
    """Where this process stands in the job. `control_group` communicates over the CPU and never waits for the device."""

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
    """Whether the other ranks do not exist. Every collective then returns as if they had the values of this rank."""
    expert_imbalance: float = 1.0
    """In a simulation: rows that arrive for the experts of this rank, over the mean of the ranks of its expert group."""
    sequence_size: int = 1
    """Neighbouring ranks that share each row of documents (`parallel.sequence`); set by
    `strategies.sequence.with_sequence_parallelism`."""

    @property
    def dp_rank(self) -> int:
        """This rank's data-parallel rank, which decides what documents it reads; the same for all ranks that share a row."""
        return self.rank // self.sequence_size

    @property
    def dp_size(self) -> int:
        """Data-parallel ranks: ranks, or groups of ranks that share each row, with documents of their own."""
        return self.world_size // self.sequence_size

    @property
    def sequence_rank(self) -> int:
        """The index of this rank among those that share its rows, and so of its slice."""
        return self.rank % self.sequence_size

    @property
    def kind(self) -> str:
        """The type of device that the run is for."""
        return device_kind(self.device)

    @property
    def num_hosts(self) -> int:
        """Number of hosts that the ranks are on."""
        return self.world_size // self.local_world_size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes shared files."""
        return self.rank == 0


def join_job(
    device: str,
    *,
    timeout_s: int,
    threads: int = 0,
    matmul: Matmul = Matmul.auto,
    shared_memory: bool = True,
    store: Any = None,
) -> Runtime:
    """Make this process a rank of the job that the environment describes (torchrun's variables), or of a job of one.

    Forms the process group, chooses the device, sets the number of CPU threads, and on a CPU chooses the library of float32
    products, the same on every rank. All ranks must call, once.

    `device`: `cpu`, `cuda`, or `auto` for a GPU if there is one. `timeout_s`: seconds after which a collective fails. `threads`:
    0 takes what the user asks for by OMP_NUM_THREADS, else this job's cores divided by the ranks on the host. `shared_memory`:
    whether CPU ranks on one host may exchange through it. `store`: torch's store of the job, if the ranks have connected before.

    Raises ConfigError if `device` is `cuda` and there is no GPU, or if the environment names an unknown network interface.
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    torch_device = _device_of_rank(device, local_rank)
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    torch.set_num_threads(threads or threads_from_environment() or max(1, num_usable_cores() // local_world_size))
    is_on_gpu = torch_device.type == "cuda"
    if is_on_gpu:
        torch.cuda.set_device(torch_device)
    library_choice = None if is_on_gpu else choose_matmul_library(matmul)
    # Other libraries import DeepSpeed if it is installed. It would guess the device, and print its guess.
    os.environ.setdefault("DS_ACCELERATOR", torch_device.type)
    if world_size >= MIN_RANKS_FOR_LAZY_CONNECTIONS:
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    if not dist.is_initialized():
        _form_process_group(
            is_on_gpu=is_on_gpu, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s), store=store
        )
    runtime = Runtime(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        device=torch_device,
        # The CPU part of the group of all ranks. A separate group would need as many connections once more.
        control_group=dist.group.WORLD,
        matmul=library_choice,
        shared_memory=shared_memory,
        timeout_s=timeout_s,
    )
    if library_choice is None:
        return runtime
    return replace(runtime, matmul=agree_on_matmul_library(gather_objects(library_choice, runtime), rank))


def _device_of_rank(requested: str, local_rank: int) -> torch.device:
    """The device of the rank with this index on its host. `requested`: `cpu`, `cuda`, or `auto` for a GPU if there is one.

    Raises ConfigError if `cuda` is requested and no GPU can be used.
    """
    if requested == "cuda":
        why_missing = why_cuda_is_missing()
        if why_missing is not None:
            raise ConfigError(f"run.device=cuda: {why_missing}; set run.device=cpu, or run where there is a GPU")
    if requested == "cuda" or (requested == "auto" and torch.cuda.is_available()):
        # With one visible device per task (SLURM's gpus-per-task) the local rank can exceed the device count.
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def _form_process_group(*, is_on_gpu: bool, rank: int, world_size: int, timeout: timedelta, store: Any) -> None:
    """Form the process group of all ranks. All ranks must call.

    - The ranks have connected before: through their `store`.
    - A launcher has set the variables of a job (RANK and others): as they say.
    - Otherwise: a job of one, whose variables are set here.
    """
    check_gloo_interfaces()
    enable_recorder()  # torch's flight recorder, which says after a timeout what each rank waited for
    backend = "cpu:gloo,cuda:nccl" if is_on_gpu else "gloo"
    if store is not None:
        prefixed_store = dist.PrefixStore("default_pg", store)
        dist.init_process_group(backend, store=prefixed_store, rank=rank, world_size=world_size, timeout=timeout)
    elif "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        # Libraries read these variables, which no launcher has set.
        os.environ.setdefault("LOCAL_RANK", "0")
        os.environ.setdefault("LOCAL_WORLD_SIZE", "1")
        _form_process_group_of_one(backend, timeout)


def with_matmul(library: Matmul, runtime: Runtime) -> Runtime:
    """Switch the float32 products of a CPU run to another library; all ranks take BLAS if they would choose differently.

    Returns the runtime with the choice. All ranks must call, with the same `library`.
    """
    choice = agree_on_matmul_library(gather_objects(choose_matmul_library(library), runtime), runtime.rank)
    return replace(runtime, matmul=choice)


def _form_process_group_of_one(backend: str, timeout: timedelta) -> None:
    """Form the process group of a job of one rank, also on a host without a network, where torch's backends cannot start.

    `backend`: as `dist.init_process_group` takes it. Without a network, the group gets a backend that talks to nobody.
    """
    try:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    except RuntimeError as error:
        # gloo binds an address. A container without any network has none, not even 127.0.0.1.
        if "Unable to find" not in str(error):
            raise
        make_fake_backend_known()
        dist.init_process_group(FAKE_BACKEND, store=dist.HashStore(), rank=0, world_size=1)


def why_cuda_is_missing() -> str | None:
    """Say why no GPU can be used here, for an error message; None if one can. (torch also calls AMD's GPUs CUDA devices.)"""
    if torch.cuda.is_available():
        return None
    if not (torch.version.cuda or torch.version.hip):
        return f"this torch ({torch.__version__}) is built for CPUs alone"
    details = ""  # of the setting that hides devices, and of torch's own error
    visible_devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible_devices is not None:
        details += f" (CUDA_VISIBLE_DEVICES={visible_devices!r})"
    try:
        torch.cuda.init()  # its error says why: no driver, one that is too old for this torch, no device
    except (RuntimeError, AssertionError) as error:
        first_sentence = str(error).split(". ")[0]
        details += f": {first_sentence}"
    return f"torch {torch.__version__} finds no device{details}; does nvidia-smi or rocm-smi show one?"


def threads_from_environment() -> int | None:
    """The number of CPU threads that the user asks for by OMP_NUM_THREADS; None if it has no number above 0.

    Also None if torchrun has set it: it sets 1 by default, which would leave all but one core of a rank idle.
    """
    text = os.environ.get("OMP_NUM_THREADS", "")
    # Our own launchers set the number before they start torchrun, so under them a 1 is intended.
    is_default_of_torchrun = (
        text == "1" and "TORCHELASTIC_RUN_ID" in os.environ and "SHARDTUNE_RUN_DIR" not in os.environ
    )
    if not text.isdecimal() or is_default_of_torchrun:
        return None
    return int(text) or None


_CGROUP_ROOT = Path("/sys/fs/cgroup")
_OWN_CGROUP_FILE = Path("/proc/self/cgroup")
_HOST_COUNTERS_FILE = Path("/proc/vmstat")


def num_usable_cores() -> int:
    """Cores that this process may use, to choose a number of threads: at least 1, which may be fewer than the host has.

    They are limited by the process's affinity, and by the CPU quota of its cgroups, which containers and SLURM set. Of a quota of
    2.5 cores, 2 count.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    for text in _texts_in_own_cgroups("cpu.max"):
        quota, period = text.split()  # microseconds of CPU time in each period, such as "200000 100000" for two cores
        if quota != "max":
            cores = min(cores, int(quota) // int(period))
    return max(1, cores)


def cgroup_memory_limit() -> int | None:
    """Bytes that the cgroups of this process allow; None if they set no limit."""
    limits = [text.strip() for text in _texts_in_own_cgroups("memory.max")]
    return min((int(limit) for limit in limits if limit != "max"), default=None)


def num_out_of_memory_kills() -> int | None:
    """How many processes the kernel has killed so far because memory ran out; None if it does not say.

    Read before and after, it tells whether a rank that disappeared was killed for memory. Counted in the innermost cgroup
    (version 2) of this process that counts them: its children are there, and no other job of the host. If no cgroup counts them:
    on the whole host.
    """
    counter_texts = list(_texts_in_own_cgroups("memory.events"))
    if _HOST_COUNTERS_FILE.is_file():
        counter_texts.append(_HOST_COUNTERS_FILE.read_text(encoding="utf-8"))
    for text in counter_texts:
        num_kills = _counter_value(text, "oom_kill")
        if num_kills is not None:
            return num_kills
    return None


def free_host_memory_bytes() -> int | None:
    """Bytes of host memory that this process may still allocate; None if the kernel does not say.

    That is what the host has available, or what a cgroup around this process (a container, a SLURM job) leaves of its limit, if
    that is less.
    """
    try:
        available_kib = _counter_value(Path("/proc/meminfo").read_text(encoding="utf-8"), "MemAvailable:")
    except OSError:
        return None
    if available_kib is None:
        return None
    free_bytes = available_kib * 1024
    # Each of these is in the order of the cgroups. The root cgroup has only some of the files, but it comes last.
    limits = _texts_in_own_cgroups("memory.max")
    usages = _texts_in_own_cgroups("memory.current")
    statistics = _texts_in_own_cgroups("memory.stat")
    for limit, usage, statistics_text in zip(limits, usages, statistics, strict=False):
        if limit.strip() == "max":  # no limit
            continue
        # Cached pages of files count as used, but the kernel frees them when memory is needed.
        cached_bytes = _counter_value(statistics_text, "inactive_file") or 0
        free_bytes = min(free_bytes, int(limit) - int(usage) + cached_bytes)
    return max(0, free_bytes)


def _counter_value(text: str, name: str) -> int | None:
    """The number of the counter `name` in the text of a kernel's file, one "name number" a line; None if it is not there."""
    for line in text.splitlines():
        if line.startswith(f"{name} "):
            return int(line.split()[1])
    return None


def _texts_in_own_cgroups(name: str) -> Iterator[str]:
    """Read the kernel's file `name`, such as `memory.max`, of the cgroup of this process and of each cgroup around it.

    A cgroup (version 2) is the group of processes by which containers and SLURM limit memory and CPUs. The innermost comes first;
    those without the file are left out.
    """
    own_cgroup = "/"
    with suppress(OSError):  # not Linux
        for line in _OWN_CGROUP_FILE.read_text(encoding="utf-8").splitlines():
            if line.startswith("0::"):
                own_cgroup = line.removeprefix("0::")
                break
    own_directory = _CGROUP_ROOT / own_cgroup.strip("/")
    for directory in (own_directory, *own_directory.parents):
        if directory.is_relative_to(_CGROUP_ROOT) and (directory / name).is_file():
            yield (directory / name).read_text(encoding="utf-8")


def set_group_timeouts(runtime: Runtime, extra_s: float = 0) -> None:
    """Set after how many seconds a collective fails: the run's timeout plus `extra_s`, in all process groups of this rank.

    Groups that libraries have formed have torch's own timeout otherwise. No collective.
    """
    timeout = timedelta(seconds=runtime.timeout_s + extra_s)
    for group in living_groups():
        is_member = dist.get_rank(group) >= 0
        if is_member and dist.get_backend(group) != FAKE_BACKEND:  # that one answers at once
            set_group_timeout(timeout, group)


@contextmanager
def longer_timeout(runtime: Runtime, extra_s: float) -> Iterator[None]:
    """Inside the context collectives fail `extra_s` seconds later than usual, because one rank works while the others wait.

    No collective, but all ranks must enter.
    """
    set_group_timeouts(runtime, extra_s)
    try:
        yield
    finally:
        set_group_timeouts(runtime)  # the usual one again


def leave_job(*, failed: bool = False) -> None:
    """Leave the job at the end of a process: destroy its process groups, and undo the choice of the library of products.

    After a failure in a job of several ranks (`failed`) the groups are left. Peers may sit in a collective, and NCCL waits for it
    before it destroys a group; but the process is to leave at once. No collective: a dead peer must not hold up the others.
    """
    use_default_matmul_library()
    if dist.is_initialized() and not (failed and dist.get_world_size() > 1):
        dist.destroy_process_group()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum `values` over all ranks, in place. All ranks must call. In a job of one nothing happens."""
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
    """Call `function` on rank 0 alone, which reads or writes shared files, and return its result on every rank.

    If it raises OSError or StorageError, StorageError is raised on every rank, so that nobody waits for a rank that has left. All
    ranks must call.
    """
    own_result: Returned | None = None
    problem: str | None = None
    if runtime.is_main:
        try:
            own_result = function()
        except OSError as error:
            problem = error_summary(error)
        except StorageError as error:
            problem = str(error)
    returned, problem = broadcast_object((own_result, problem), runtime)
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


def first_rank_error(error: BaseException | None, runtime: Runtime) -> RankError | None:
    """Learn whether any rank failed in something that each did alone: the error of the lowest such rank; None if none failed.

    `error`: this rank's own; None if it succeeded. Without this call a rank would go on into a collective that a failed peer will
    never join. All ranks must call, and get the same answer.
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


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on nothing else (no rank, no process)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_dropout_of_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout for one step of one rank: a resumed run draws what the uninterrupted one would have drawn."""
    torch.manual_seed(derived_seed(seed, "step", step, rank))


def peak_memory_gib_by_metric(device: torch.device) -> dict[str, float]:
    """Read the peak memory of this rank so far in GiB, by the names of its metrics. Does not wait for the device.

    On a GPU what tensors took, and what torch's allocator held for them: {"memory_gib": 61.2, "memory_reserved_gib": 66.0}. On a
    CPU the memory of the process: {"memory_gib": 12.4}.
    """
    if device.type == "cuda":
        return {
            "memory_gib": torch.cuda.max_memory_allocated(device) / 2**30,
            "memory_reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
        }
    import resource

    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB on Linux
    return {"memory_gib": peak_kib / 2**20}
