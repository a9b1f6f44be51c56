"""Options of sbatch in `launcher.extra`, and the GPUs per node that a job asks for. Needs no torch."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

LONG_NAME_BY_SHORT = {
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
    *LONG_NAME_BY_SHORT.values(),
    *("gpus-per-node", "gpus-per-task", "gpus-per-socket", "gres", "gres-flags", "tres-per-task"),
    *("mem", "mem-per-cpu", "mem-per-gpu"),
    *("no-requeue", "requeue", "signal", "open-mode", "wrap", "reservation", "wait-all-nodes"),
)
"""Options whose names may be shortened, as sbatch allows: `--arr` is `--array`."""
GPU_OPTIONS = frozenset({"gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket", "gres", "tres-per-task"})
"""Options that ask for GPUs."""
MEMORY_OPTIONS = frozenset({"mem", "mem-per-cpu", "mem-per-gpu"})
"""Options that ask for memory, of which sbatch takes one."""


def parse_sbatch_options(arguments: Iterable[str]) -> dict[str, str]:
    """Read options of sbatch as users write them: ["-t 10", "--gres=gpu:8"] -> {"time": "10", "gres": "gpu:8"}.

    "" for an option without a value. Of an option given twice the last one counts, as for sbatch.
    """
    options: dict[str, str] = {}
    for argument in arguments:
        name = None
        for piece in _split_like_shell(argument):
            if piece.startswith("--"):
                key, _, value = piece[2:].partition("=")
                name = _full_option_name(key)
                options[name] = value
            elif piece[:2] in LONG_NAME_BY_SHORT:
                name = LONG_NAME_BY_SHORT[piece[:2]]
                options[name] = piece[2:].removeprefix("=")
            elif name is not None and not options[name]:
                options[name] = piece  # `--time 10` and `-t 10`
    return options


def _split_like_shell(argument: str) -> list[str]:
    """The parts of an argument as a shell splits it: `--time 10` has two."""
    try:
        return shlex.split(argument)
    except ValueError:  # an open quote: sbatch will say so
        return argument.split()


def _full_option_name(key: str) -> str:
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


def gpus_per_node_request(launcher: Mapping[str, Any]) -> GpuRequest | None:
    """How many GPUs a SLURM job asks for on each node, and of which kind; None if nothing asks for GPUs.

    `launcher`: its settings as plain values. The first of these that is given counts: `--gpus-per-node` in `launcher.extra`,
    `launcher.gpus_per_node`, `--gres` in `launcher.extra`, `launcher.gres`, `--gpus-per-task`, and `--gpus`, which counts
    those of the whole job and is divided by `launcher.nodes` (rounded down).
    """
    # Options of the job that trains: those of all jobs, and in a pipeline its own.
    train_options = launcher.get("part_options", {}).get("train", []) if launcher.get("pipeline") else []
    extra = parse_sbatch_options([*launcher.get("extra", []), *train_options])  # such as {"gres": "gpu:h100:8"}
    if "gpus-per-node" in extra:
        return _request_of_option("gpus-per-node", extra, nodes=1)
    if launcher.get("gpus_per_node"):
        count = int(launcher["gpus_per_node"])
        kind_in_gres = _parse_gres(launcher.get("gres") or "").kind
        return GpuRequest(count, setting=f"launcher.gpus_per_node={count}", kind=kind_in_gres)
    gres_setting = "launcher.extra: --gres" if "gres" in extra else "launcher.gres"
    gres = extra.get("gres", launcher.get("gres") or "")
    gpus = _parse_gres(gres)
    if gpus.num_gpus:
        return GpuRequest(gpus.num_gpus, setting=f"{gres_setting}={gres}", kind=gpus.kind)
    if "gpus-per-task" in extra:  # a job script has one task a node
        return _request_of_option("gpus-per-task", extra, nodes=1)
    if "gpus" in extra:
        return _request_of_option("gpus", extra, nodes=max(1, int(launcher.get("nodes") or 1)))
    return None


def gpus_in_gres(gres: str | None) -> int:
    """The GPUs that `launcher.gres` asks for on each node: 4 for `gpu:h100:4`; 0 if it is not set, or asks for none."""
    return _parse_gres(gres or "").num_gpus


def ranks_per_node(launcher: Mapping[str, Any]) -> int:
    """Ranks of each node: `launcher.processes`, else one for each GPU that the job asks for, else 1."""
    if launcher.get("processes"):
        return int(launcher["processes"])
    request = gpus_per_node_request(launcher)
    return request.count if request is not None else 1


def drop_options(arguments: Iterable[str], dropped: frozenset[str]) -> list[str]:
    """Leave options out of sbatch's arguments, for a job that needs other ones, such as `GPU_OPTIONS` for one without GPUs.

    `dropped`: long names, such as {"gres"}.
    """
    return [argument for argument in arguments if not dropped & parse_sbatch_options([argument]).keys()]


def gpus_of_whole_job(launcher: Mapping[str, Any]) -> int | None:
    """The GPUs of the whole job that `--gpus` in `launcher.extra` asks for; None if it does not."""
    extra = parse_sbatch_options(launcher.get("extra", []))
    return _parse_gpu_option(extra["gpus"]).num_gpus if "gpus" in extra else None


def _request_of_option(option: str, extra: Mapping[str, str], nodes: int) -> GpuRequest | None:
    """Read what an option of sbatch in `launcher.extra` asks for, as GPUs of each node; None if it is less than one.

    `extra`: all of these options by name. `nodes`: over how many nodes the number in the option counts; 1 for an option that
    counts per node.
    """
    gpus = _parse_gpu_option(extra[option])
    if gpus.num_gpus < nodes:
        return None
    setting = f"launcher.extra: --{option}={extra[option]}"
    return GpuRequest(gpus.num_gpus // nodes, setting=setting, kind=gpus.kind)


class _GpusOfValue(NamedTuple):
    """The GPUs that the value of an option of sbatch asks for."""

    num_gpus: int
    kind: str | None
    """The site's word for the card; None if the GPUs have none, or several."""


def _parse_gpu_option(value: str) -> _GpusOfValue:
    """Read the value of an option such as `--gpus`, which counts GPUs by kind: `h100:8` -> (8, "h100").

    A part without a number counts as none.
    """
    count = 0
    kinds = set()
    for part in value.split(","):
        kind, _, number = part.strip().rpartition(":")
        if number.isdecimal():
            count += int(number)
            kinds.add(kind)
    return _GpusOfValue(count, _common_gpu_kind(kinds))


def _parse_gres(gres: str) -> _GpusOfValue:
    """Read the GPUs out of SLURM's list of generic resources of a node: `gpu:h100:8` -> (8, "h100").

    `gres`: such as `gpu`, `gpu:8`, `gres/gpu=4` or `gpu:h100:4,gpu:a100:4`; other resources, such as shards, are not counted.
    """
    count = 0
    kinds = set()
    for resource in gres.split(","):
        name, *fields = resource.strip().removeprefix("gres/").removeprefix("gres:").replace("=", ":").split(":")
        if name != "gpu":
            continue
        number = 1
        if fields and fields[-1].isdecimal():
            number = int(fields.pop())
        count += number
        kinds.add(fields[0] if fields else "")  # empty: of any kind
    return _GpusOfValue(count, _common_gpu_kind(kinds))


def _common_gpu_kind(kinds: set[str]) -> str | None:
    """The one kind that all GPUs of a request have; None if there are several kinds, or if the request names none ("")."""
    if len(kinds) != 1:
        return None
    return next(iter(kinds)) or None
