"""Tells from the environment whether this process starts a job or is one of its ranks.

SLURM's variables are mapped to torchrun's. A start that would train on one host of many is refused.
"""

import itertools
import os
import re
from collections.abc import Mapping

from strategies.errors import ConfigError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NUMERIC_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
UNSET_COMMAND = f"`unset {' '.join(RANK_VARIABLES)}`"
BRACKETS_REGEX = re.compile(r"\[([^\[\]]*)\]")
COMMA_OUTSIDE_BRACKETS_REGEX = re.compile(r",(?![^\[]*\])")
INTERACTIVE_STEP_ID = str(0xFFFFFFFA)
"""SLURM's number for the step in which salloc puts a shell on the first node."""


def is_rank_process(env: Mapping[str, str]) -> bool:
    """Whether torchrun or srun started this process as one rank of a job; False if a user typed the command.

    `env`: the environment variables of the process.
    Raises ConfigError if it would train on one host of many, or has variables that are left over from another job.
    """
    refuse_non_numbers(env)
    refuse_lone_host(env)
    if "RANK" in env or "WORLD_SIZE" in env:
        refuse_incomplete_variables(env)
    return has_rank_variables(env)


def has_rank_variables(env: Mapping[str, str]) -> bool:
    """Whether the environment has the variables of a rank, whether or not their values make sense."""
    if "RANK" in env or "WORLD_SIZE" in env:
        return True
    return "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and _num_tasks_of_step(env) > 1


def refuse_non_numbers(env: Mapping[str, str]) -> None:
    """Raise ConfigError if a variable by which launchers number ranks, such as RANK or WORLD_SIZE, is no whole number."""
    non_numbers = []
    for name in NUMERIC_RANK_VARIABLES:
        if name in env and not env[name].isdecimal():
            non_numbers.append(f"{name}={env[name]}")
    if non_numbers:
        raise ConfigError(
            f"{' '.join(non_numbers)}: no whole number, so left over from something else? {UNSET_COMMAND}; a launcher of your "
            "own must set them all"
        )


def refuse_lone_host(env: Mapping[str, str]) -> None:
    """Raise ConfigError if this process would train on only one host of a SLURM allocation of several.

    The other hosts would idle, or be waited for in vain. `env`: the environment variables of the process. No error if:

    - the allocation has one host, or srun started this process;
    - torchrun was started on several hosts, by ssh for example (WORLD_SIZE is above LOCAL_WORLD_SIZE);
    - this process is one of several tasks of a step in a terminal (`srun --pty`).
    """
    num_hosts = int(env.get("SLURM_JOB_NUM_NODES") or env.get("SLURM_NNODES") or 1)
    is_in_terminal = env.get("SLURM_STEP_ID") == INTERACTIVE_STEP_ID or "SLURM_PTY_PORT" in env
    was_started_by_srun = "SLURM_STEP_ID" in env and not is_in_terminal
    if num_hosts == 1 or was_started_by_srun:
        return
    world_size = int(env.get("WORLD_SIZE", 1))
    has_ranks_on_other_hosts = world_size > int(env.get("LOCAL_WORLD_SIZE", world_size))
    if has_ranks_on_other_hosts:
        return
    if is_in_terminal and _num_tasks_of_step(env) > 1:
        return
    place = "in a terminal on one" if is_in_terminal else "outside srun, on the first"
    # Without --overlap, srun would wait for the terminal's own step to end, which holds the resources.
    overlap = "--overlap " if is_in_terminal else ""
    raise ConfigError(
        f"SLURM_NNODES={num_hosts}: this process runs {place} of {num_hosts} hosts only; start it with `srun --nodes={num_hosts} "
        f"--ntasks-per-node=1 {overlap}python -m launch.train ...` (one task a rank; with --nodes=1 on this host alone), with "
        "slurm/train.sbatch, or with launcher=slurm"
    )


def refuse_incomplete_variables(env: Mapping[str, str]) -> None:
    """Raise ConfigError if RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are not all set in `env`, or RANK is too large.

    They are then left over from an ended job, and this process would wait for ranks that never come. RANK and WORLD_SIZE must be
    whole numbers (`refuse_non_numbers`).
    """
    present = [f"{name}={env[name]}" for name in RANK_VARIABLES if name in env]
    missing = [name for name in RANK_VARIABLES if name not in env]
    if missing:
        raise ConfigError(
            f"{' '.join(present)}: set without {' and '.join(missing)}, so left over from a job? {UNSET_COMMAND}; a launcher of "
            "your own must set them all"
        )
    if int(env["RANK"]) >= int(env["WORLD_SIZE"]):
        raise ConfigError(
            f"RANK={env['RANK']}: must be below WORLD_SIZE={env['WORLD_SIZE']}, since ranks count from 0; {UNSET_COMMAND} if "
            "they are left over from a job"
        )


def torchrun_variables(env: Mapping[str, str]) -> dict[str, str]:
    """The variables that torch needs to find its ranks, for a task that srun started: {"RANK": "3", "WORLD_SIZE": "8", ...}.

    Made from SLURM's own variables in `env`, of which one tells the tasks of each node as `4(x2),3`: 4, 4 and 3. Variables that
    are set already are left out; if RANK is one of them, all are.
    """
    if "RANK" in env:
        return {}
    num_tasks = _num_tasks_of_step(env)
    tasks_per_node = env.get("SLURM_NTASKS_PER_NODE") or env.get("SLURM_STEP_TASKS_PER_NODE") or str(num_tasks)
    node_index = int(env.get("SLURM_NODEID", 0))
    variables = {
        "RANK": env["SLURM_PROCID"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "WORLD_SIZE": str(num_tasks),
        "LOCAL_WORLD_SIZE": tasks_on_node(tasks_per_node, node_index),
        "MASTER_PORT": str(master_port(env)),
    }
    if "MASTER_ADDR" not in env:
        node_list = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
        variables["MASTER_ADDR"] = first_host(node_list)
    return {key: value for key, value in variables.items() if key not in env}


def master_port(env: Mapping[str, str]) -> int:
    """A port at which the ranks of a SLURM step meet; all of them derive the same one from SLURM's variables in `env`."""
    job_id = int(env.get("SLURM_JOB_ID") or 0)
    restart_count = int(env.get("SLURM_RESTART_COUNT") or 0)
    step_id = int(env.get("SLURM_STEP_ID") or 0)
    # The factors give two jobs, two starts of a job and two steps of a job different ports, because they may share a host.
    # 20000 to 29999 lies below the ports that the kernel assigns to connections.
    return 20000 + (job_id * 7 + restart_count + step_id * 131) % 10000


def tasks_on_node(tasks_per_node: str, node_index: int) -> str:
    """How many tasks run on one node, as text, from SLURM's shorthand: `4(x3),2` stands for 4, 4, 4 and 2 tasks.

    `node_index`: counted from 0.
    The last number holds for all further nodes, since `SLURM_NTASKS_PER_NODE=4` is one number for all.
    """
    counts: list[str] = []  # one for each node
    for entry in tasks_per_node.split(","):
        count, _, num_nodes = entry.partition("(x")
        counts += [count] * int(num_nodes.rstrip(")") or 1)
    return counts[min(node_index, len(counts) - 1)]


def _num_tasks_of_step(env: Mapping[str, str]) -> int:
    """How many tasks this step of the job has."""
    return int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)


def first_host(nodelist: str) -> str:
    """The first host in SLURM's shorthand: `n[08-10]` -> n08. Raises ConfigError if there is none."""
    # The name, not an address: `hostname --ip-address` gives loopback, or several words, on some sites.
    hosts = expand_hosts(nodelist)
    if not hosts:
        raise ConfigError(f"SLURM_STEP_NODELIST={nodelist}: names no host; set MASTER_ADDR to the first")
    return hosts[0]


def expand_hosts(nodelist: str) -> list[str]:
    """List the hosts of SLURM's shorthand in its order: `n[08-10],gpu1` is n08, n09, n10 and gpu1.

    Raises ConfigError for a text that is not written so.
    """
    # `scontrol show hostnames` could do it as well, but its answer may stand among words that a site prints.
    hosts: list[str] = []
    for entry in COMMA_OUTSIDE_BRACKETS_REGEX.split(nodelist.strip()):
        if not entry:
            continue
        # Alternating: literal text, the inside of brackets, literal text ...; `n[1-4]` is "n", "1-4", "".
        pieces = BRACKETS_REGEX.split(entry)
        if any(set(piece) & set("[] \t") for piece in pieces):
            raise ConfigError(_malformed_node_list_message(nodelist))
        choices: list[list[str]] = []  # what each piece may be: ["n"], ["1", "2", "3", "4"], [""]
        for number, piece in enumerate(pieces):
            is_inside_brackets = number % 2 == 1
            if is_inside_brackets:
                choices.append(_expand_ranges(piece, nodelist))
            else:
                choices.append([piece])
        hosts += ["".join(parts) for parts in itertools.product(*choices)]
    return hosts


def _malformed_node_list_message(nodelist: str) -> str:
    """The error message about a list of hosts that is not written in SLURM's shorthand."""
    return f"SLURM_JOB_NODELIST={nodelist}: is not written as SLURM writes hosts, such as n[1-4,7]"


def _expand_ranges(ranges: str, nodelist: str) -> list[str]:
    """`08-10,12` as 08, 09, 10, 12: numbers keep the width of the first one of their range.

    `nodelist`: the whole list of hosts, for the message.
    Raises ConfigError if `ranges` holds anything but numbers.
    """
    numbers: list[str] = []
    for range_text in ranges.split(","):
        first, dash, last = range_text.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(_malformed_node_list_message(nodelist))
        stop = int(last) if dash else int(first)
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), stop + 1)]
    return numbers


def export_torchrun_variables() -> None:
    """Set torchrun's variables in this process's environment, so that torch finds the other ranks of a step of srun."""
    os.environ.update(torchrun_variables(os.environ))
