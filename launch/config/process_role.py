"""Tells from the environment whether this process starts a job or is one of its ranks.

SLURM's variables are mapped to torchrun's. A start that would train on one host of many is refused.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping

from strategies.errors import ConfigError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NUMERIC_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
UNSET_COMMAND = f"`unset {' '.join(RANK_VARIABLES)}`"
BRACKETS = re.compile(r"\[([^\[\]]*)\]")
INTERACTIVE = str(0xFFFFFFFA)
"""SLURM's number for the step in which salloc puts a shell on the first node."""


def is_worker(env: Mapping[str, str]) -> bool:
    """Whether torchrun or a several-task srun started this process. Errors: ConfigError (lone host, variables of another job)."""
    refuse_non_numbers(env)
    refuse_lone_host(env)
    if "RANK" in env or "WORLD_SIZE" in env:
        refuse_incomplete_variables(env)
    return seems_a_worker(env)


def seems_a_worker(env: Mapping[str, str]) -> bool:
    """The same by the variables that are there, whether or not they make sense."""
    if "RANK" in env or "WORLD_SIZE" in env:
        return True
    return "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and _tasks(env) > 1


def refuse_non_numbers(env: Mapping[str, str]) -> None:
    """Refuse variables of a rank that are no whole numbers. Errors: ConfigError."""
    wrong = [f"{name}={env[name]}" for name in NUMERIC_RANK_VARIABLES if name in env and not env[name].isdecimal()]
    if wrong:
        raise ConfigError(
            f"{' '.join(wrong)}: no whole number, so left over from something else? {UNSET_COMMAND}; a launcher of your own "
            "must set them all"
        )


def refuse_lone_host(env: Mapping[str, str]) -> None:
    """Refuse to run on the first host of an allocation of several: the others would idle, or be waited for in vain.

    Errors: ConfigError.
    """
    nodes = int(env.get("SLURM_JOB_NUM_NODES") or env.get("SLURM_NNODES") or 1)
    by_hand = env.get("SLURM_STEP_ID") == INTERACTIVE or "SLURM_PTY_PORT" in env
    if nodes == 1 or ("SLURM_STEP_ID" in env and not by_hand):
        return
    if int(env.get("WORLD_SIZE", 1)) > int(env.get("LOCAL_WORLD_SIZE", env.get("WORLD_SIZE", 1))):
        return  # torchrun was started on each host by other means than srun (ssh, pdsh)
    if by_hand and _tasks(env) > 1:
        return
    where = "in a terminal on one" if by_hand else "outside srun, on the first"
    overlap = "--overlap " if by_hand else ""
    raise ConfigError(
        f"SLURM_NNODES={nodes}: this process runs {where} of {nodes} hosts only; start it with `srun --nodes={nodes} "
        f"--ntasks-per-node=1 {overlap}python -m launch.train ...` (one task a rank; with --nodes=1 on this host alone), with "
        "slurm/train.sbatch, or with launcher=slurm"
    )


def refuse_incomplete_variables(env: Mapping[str, str]) -> None:
    """Refuse variables of a rank if some are missing: they are left over from a job, and no other rank would come.

    Errors: ConfigError.
    """
    present = [f"{name}={env[name]}" for name in RANK_VARIABLES if name in env]
    missing = [name for name in RANK_VARIABLES if name not in env]
    if missing:
        raise ConfigError(
            f"{' '.join(present)}: set without {' and '.join(missing)}, so left over from a job? {UNSET_COMMAND}; a launcher of "
            "your own must set them all"
        )


def torchrun_variables(env: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR ... of a task that srun started. What is already set is left out."""
    if "RANK" in env:
        return {}
    tasks = _tasks(env)
    per_node = env.get("SLURM_NTASKS_PER_NODE") or env.get("SLURM_STEP_TASKS_PER_NODE") or str(tasks)
    mapped = {
        "RANK": env["SLURM_PROCID"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": tasks_on_node(per_node, int(env.get("SLURM_NODEID", 0))),
        "MASTER_PORT": str(port(env)),
    }
    if "MASTER_ADDR" not in env:
        mapped["MASTER_ADDR"] = first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "")
    return {key: value for key, value in mapped.items() if key not in env}


def port(env: Mapping[str, str]) -> int:
    """A port that two jobs on a host, two starts or two steps of one job do not share; below the ephemeral range."""
    job = int(env.get("SLURM_JOB_ID") or 0)
    restart = int(env.get("SLURM_RESTART_COUNT") or 0)
    step = int(env.get("SLURM_STEP_ID") or 0)
    return 20000 + (job * 7 + restart + step * 131) % 10000


def tasks_on_node(counts: str, node: int) -> str:
    """The number of tasks on the node with this index, from SLURM's shorthand such as `4(x3),2`."""
    expanded: list[str] = []
    for part in counts.split(","):
        count, _, repeat = part.partition("(x")
        expanded += [count] * int(repeat.rstrip(")") or 1)
    return expanded[min(node, len(expanded) - 1)]


def _tasks(env: Mapping[str, str]) -> int:
    """Tasks of this step of the job."""
    return int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)


def first_host(nodelist: str) -> str:
    """The first host of SLURM's shorthand. Raises ConfigError."""
    # The name, not an address: `hostname --ip-address` gives loopback, or several words, on some sites.
    hosts = expand_hosts(nodelist)
    if not hosts:
        raise ConfigError(f"SLURM_STEP_NODELIST={nodelist}: names no host; set MASTER_ADDR to the first")
    return hosts[0]


def expand_hosts(nodelist: str) -> list[str]:
    """The hosts of SLURM's shorthand in its order: `n[08-10],gpu1` is n08, n09, n10 and gpu1. Errors: ConfigError.

    `scontrol show hostnames` could do it as well, but its answer may stand among words that a site prints.
    """
    hosts: list[str] = []
    for entry in _split_outside_brackets(nodelist):
        # Alternating: literal text, the inside of brackets, literal text ...
        pieces = BRACKETS.split(entry)
        if any(set(piece) & set("[] \t") for piece in pieces):
            raise ConfigError(_not_slurms(nodelist))
        choices = []
        for number, piece in enumerate(pieces):
            is_inside_brackets = number % 2 == 1
            choices.append(_expand_ranges(piece, nodelist) if is_inside_brackets else [piece])
        hosts += ["".join(parts) for parts in itertools.product(*choices)]
    return hosts


def _not_slurms(nodelist: str) -> str:
    return f"SLURM_JOB_NODELIST={nodelist}: is not written as SLURM writes hosts, such as n[1-4,7]"


def _split_outside_brackets(nodelist: str) -> list[str]:
    """The parts between commas that stand outside brackets."""
    entries = re.split(r",(?![^\[]*\])", nodelist.strip())
    return [entry for entry in entries if entry]


def _expand_ranges(ranges: str, nodelist: str) -> list[str]:
    """`08-10,12` as 08, 09, 10, 12: numbers keep the width of the first one of their range. Errors: ConfigError."""
    numbers: list[str] = []
    for part in ranges.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(_not_slurms(nodelist))
        stop = int(last) if dash else int(first)
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), stop + 1)]
    return numbers


def export(env: Mapping[str, str] | None = None) -> None:
    """Set torchrun's variables in this process's environment."""
    os.environ.update(torchrun_variables(os.environ if env is None else env))
