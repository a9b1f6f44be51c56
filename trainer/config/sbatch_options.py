"""Options of sbatch in `launcher.extra`, and the GPUs per node that a job asks for. Needs no torch."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

SHORT_NAMES = {
    "-A": "account",
    "-C": "constraint",
    "-D": "chdir",
    "-G": "gpus",
    "-J": "job-name",
    "-N": "nodes",
    "-W": "wait",
    "-a": "array",
    "-e": "error",
    "-o": "output",
    "-p": "partition",
    "-q": "qos",
    "-t": "time",
}
LONG_NAMES = (
    *SHORT_NAMES.values(),
    *("gpus-per-node", "gpus-per-task", "gpus-per-socket", "gres", "gres-flags", "tres-per-task"),
    *("mem", "mem-per-cpu", "mem-per-gpu"),
    *("no-requeue", "requeue", "signal", "open-mode", "wrap", "reservation", "wait-all-nodes"),
)
"""Options whose names may be shortened, as sbatch allows: `--arr` is `--array`."""
GPU_OPTIONS = frozenset({"gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket", "gres", "tres-per-task"})
"""Options that ask for GPUs."""
MEMORY_OPTIONS = frozenset({"mem", "mem-per-cpu", "mem-per-gpu"})
"""Options that ask for memory, of which sbatch takes one."""


def options_of(words: Iterable[str]) -> dict[str, str]:
    """Values of sbatch's options by long name: ["-t 10", "--gres=gpu:8"] gives {"time": "10", "gres": "gpu:8"}.

    "" for an option without a value. Of an option given twice the last one counts, as for sbatch.
    """
    options: dict[str, str] = {}
    for word in words:
        name = None
        for piece in _pieces(word):
            if piece.startswith("--"):
                key, _, value = piece[2:].partition("=")
                name = _long_name(key)
                options[name] = value
            elif piece[:2] in SHORT_NAMES:
                name = SHORT_NAMES[piece[:2]]
                options[name] = piece[2:].removeprefix("=")
            elif name is not None and not options[name]:
                options[name] = piece  # `--time 10` and `-t 10`
    return options


def _pieces(word: str) -> list[str]:
    """A word as a shell splits it: `--time 10` is two."""
    try:
        return shlex.split(word)
    except ValueError:  # an open quote: sbatch will say so
        return word.split()


def _long_name(key: str) -> str:
    """The whole name of an option; sbatch takes any beginning that only one option has."""
    whole_names = {name for name in LONG_NAMES if name.startswith(key)}
    if key in whole_names or len(whole_names) != 1:
        return key
    return whole_names.pop()


@dataclass(frozen=True, slots=True)
class GpuRequest:
    """The GPUs that a job asks for on each of its nodes."""

    count: int
    setting: str
    """What asks for them, as the user wrote it: `launcher.gres=gpu:h100:8`."""
    kind: str | None = None
    """The site's word for the card; None if the request names none, or several."""


def gpu_request(launcher: Mapping[str, Any]) -> GpuRequest | None:
    """The GPUs of each node of a SLURM job, from the launcher's settings as plain values; None if nothing asks for GPUs.

    The first of these that is given counts: `--gpus-per-node` in `launcher.extra`, `launcher.gpus_per_node`, `--gres` in
    `launcher.extra`, `launcher.gres`, `--gpus-per-task`, and `--gpus`, which counts those of the whole job and is divided by
    `launcher.nodes` (rounded down).
    """
    # Options of the job that trains: those of all jobs, and in a pipeline its own.
    train_options = launcher.get("part_options", {}).get("train", []) if launcher.get("pipeline") else []
    extra = options_of([*launcher.get("extra", []), *train_options])  # such as {"gres": "gpu:h100:8"}
    if "gpus-per-node" in extra:
        return _request("gpus-per-node", extra, nodes=1)
    if launcher.get("gpus_per_node"):
        count = int(launcher["gpus_per_node"])
        return GpuRequest(count, f"launcher.gpus_per_node={count}", _gres_gpus(launcher.get("gres") or "")[1])
    gres_setting = "launcher.extra: --gres" if "gres" in extra else "launcher.gres"
    gres = extra.get("gres", launcher.get("gres") or "")
    count, kind = _gres_gpus(gres)
    if count:
        return GpuRequest(count, f"{gres_setting}={gres}", kind)
    if "gpus-per-task" in extra:  # a job script has one task a node
        return _request("gpus-per-task", extra, nodes=1)
    if "gpus" in extra:
        return _request("gpus", extra, nodes=max(1, int(launcher.get("nodes") or 1)))
    return None


def ranks_per_node(launcher: Mapping[str, Any]) -> int:
    """Ranks of each node: `launcher.processes`, else one for each GPU that the job asks for, else 1."""
    if launcher.get("processes"):
        return int(launcher["processes"])
    request = gpu_request(launcher)
    return request.count if request is not None else 1


def without_gpus(words: Iterable[str]) -> list[str]:
    """The words that ask for something else than GPUs."""
    return [word for word in words if not GPU_OPTIONS & options_of([word]).keys()]


def without_memory(words: Iterable[str]) -> list[str]:
    """The words that ask for something else than memory."""
    return [word for word in words if not MEMORY_OPTIONS & options_of([word]).keys()]


def total_gpus(launcher: Mapping[str, Any]) -> int | None:
    """The GPUs of the whole job that `--gpus` in `launcher.extra` asks for; None if it does not."""
    extra = options_of(launcher.get("extra", []))
    return _count_and_kind(extra["gpus"])[0] if "gpus" in extra else None


def _request(option: str, extra: Mapping[str, str], nodes: int) -> GpuRequest | None:
    """The GPUs per node that an option of `launcher.extra` asks for, which counts those of `nodes` nodes together.

    None if there is less than one for each node.
    """
    count, kind = _count_and_kind(extra[option])
    if count < nodes:
        return None
    return GpuRequest(count // nodes, f"launcher.extra: --{option}={extra[option]}", kind)


def _count_and_kind(value: str) -> tuple[int, str | None]:
    """(the number of GPUs, their kind) of `8`, `h100:8` or `h100:4,a100:4`; what is no number counts as none."""
    count = 0
    kinds = set()
    for part in value.split(","):
        kind, _, number = part.strip().rpartition(":")
        if number.isdecimal():
            count += int(number)
            kinds.add(kind)
    return count, _only(kinds)


def _gres_gpus(gres: str) -> tuple[int, str | None]:
    """(the number of GPUs, their kind) of `gpu`, `gpu:8`, `gpu:h100:8` and lists of them; shards and MPS are no GPUs."""
    count = 0
    kinds = set()
    for resource in gres.split(","):
        name, *rest = resource.strip().removeprefix("gres/").removeprefix("gres:").replace("=", ":").split(":")
        if name != "gpu":
            continue
        number = 1
        if rest and rest[-1].isdecimal():
            number = int(rest.pop())
        count += number
        kinds.add(rest[0] if rest else "")
    return count, _only(kinds)


def _only(kinds: set[str]) -> str | None:
    """The one kind of card; None if there are several, or it has no name."""
    if len(kinds) != 1:
        return None
    return next(iter(kinds)) or None
