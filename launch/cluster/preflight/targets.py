"""Which nodes the arguments of `shardtune doctor` name, and how they are reached."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

from launch.cluster import containers
from launch.cluster.preflight.coordinator import (
    NodeCommand,
    local_check_command,
    preflight_request,
    srun_check_command,
)
from launch.cluster.preflight.node_facts import PreflightRequest
from strategies.errors import ConfigError, key_of_problem
from trainer.config.run import RunConfig, SlurmConfig
from trainer.reporting.code_revision import CODE_DIRECTORY

TIME_LIMIT_MINUTES = 10
"""Time limit of the job that SLURM is asked for when a preflight runs outside an allocation."""


@dataclass(frozen=True, slots=True)
class PreflightTargets:
    """Which nodes a preflight checks, and how."""

    request: PreflightRequest
    """What each node must have."""
    commands: list[NodeCommand]
    """The commands that check the nodes."""
    hosts: list[str]
    """The nodes' names, by number."""
    is_queued: bool
    """Whether the nodes must first be waited for in SLURM's queue."""


def preflight_targets(overrides: list[str]) -> PreflightTargets:
    """Find out which nodes `shardtune doctor` checks, what they must have, and by which commands, from its command line.

    - launcher=slurm: nodes of the allocation that this process is in, or of a new one;
    - otherwise: this host, as the only node.

    Raises ConfigError for launcher settings that are wrong, or that name other hosts without SLURM.
    """
    from launch.config.compose import compose_config, start_problems
    from trainer.config.resuming import settings_as_dict

    config = compose_config(overrides, check=False).config
    # Only the launcher's settings matter here: a model or data set may still be missing.
    problems = [problem for problem in start_problems(config) if key_of_problem(problem).startswith("launcher.")]
    if problems:
        raise ConfigError(problems)
    # As a number from here on: what reads the settings as a dictionary cannot derive it from the GPUs of a node.
    config.launcher.processes = config.launcher.per_node
    if isinstance(config.launcher, SlurmConfig):
        return _slurm_targets(config, overrides)
    if config.launcher.nodes > 1:
        raise ConfigError(
            f"launcher.nodes={config.launcher.nodes}: only nodes of SLURM are asked from here (launcher=slurm); else call "
            "doctor on each of them"
        )
    with socket.create_server(("localhost", 0)) as listener:  # any free port
        free_port = listener.getsockname()[1]
    request = preflight_request(settings_as_dict(config), 1, rendezvous=f"localhost:{free_port}")
    return PreflightTargets(request, [local_check_command()], hosts=[os.uname().nodename], is_queued=False)


def _slurm_targets(config: RunConfig, overrides: list[str]) -> PreflightTargets:
    """The nodes of SLURM that `shardtune doctor` checks: of the allocation that this process is in, or of a new one.

    `overrides`: as typed, which tell whether `launcher.nodes` was set.
    Raises ConfigError if the allocation has fewer nodes than that, or if the run's container cannot start here.
    """
    from trainer.config.resuming import settings_as_dict

    slurm = config.launcher
    assert isinstance(slurm, SlurmConfig)
    in_allocation = "SLURM_JOB_ID" in os.environ
    is_number_of_nodes_set = any(override.startswith("launcher.nodes=") for override in overrides)
    nodes = _slurm_nodes(
        slurm.nodes if is_number_of_nodes_set or not in_allocation else None, in_allocation=in_allocation
    )
    slurm.nodes = nodes.num_nodes
    settings = settings_as_dict(config)
    request = preflight_request(settings, nodes.num_nodes)
    # Whatever `launcher.preflight` says.
    request.wants_communication_test = True
    command = _slurm_check_command(slurm, settings, in_allocation=in_allocation)
    return PreflightTargets(request, commands=[command], hosts=nodes.hosts, is_queued=not in_allocation)


class _SlurmNodes(NamedTuple):
    """Nodes of an allocation of SLURM, of which the first `num_nodes` are checked."""

    num_nodes: int
    hosts: list[str]
    """Their names; "node 0", "node 1", ... if SLURM has not chosen any yet."""


def _slurm_nodes(requested_nodes: int | None, *, in_allocation: bool) -> _SlurmNodes:
    """How many nodes a preflight checks and what they are called: those of this allocation, or of one that SLURM will choose.

    `requested_nodes`: None for all nodes of the allocation.
    Raises ConfigError if the allocation has fewer.
    """
    from launch.cluster.job_end import hosts_of_job

    if not in_allocation:
        assert requested_nodes is not None, "a job always asks for a number of nodes"
        return _SlurmNodes(requested_nodes, [f"node {number}" for number in range(requested_nodes)])
    hosts = hosts_of_job()
    num_nodes = len(hosts) if requested_nodes is None else requested_nodes
    if num_nodes > len(hosts):
        raise ConfigError(f"launcher.nodes={num_nodes}: this allocation has {len(hosts)}; leave it out")
    return _SlurmNodes(num_nodes, hosts)


def _slurm_check_command(slurm: SlurmConfig, settings: dict[str, Any], *, in_allocation: bool) -> NodeCommand:
    """The srun command that checks the nodes for `shardtune doctor`, in the run's container if it has one.

    `settings`: the whole configuration as nested dictionaries.
    `in_allocation`: the nodes are this process's already.
    Raises ConfigError if the container cannot start here.
    """
    container = containers.container_command(settings, [CODE_DIRECTORY])
    containers.refuse_unavailable_container(settings["launcher"])
    return srun_check_command(
        slurm.nodes,
        python=slurm.python or ("python3" if slurm.container else sys.executable),
        srun_options=[*_srun_options(slurm, in_allocation=in_allocation), *container.srun_options],
        environment=_srun_environment(slurm),
        container_prefix=container.prefix,
    )


def _srun_environment(slurm: SlurmConfig) -> dict[str, str]:
    """The environment variables for the srun command that checks nodes: those of this process, the code's path, and `setup`.

    SHARDTUNE_SETUP holds the shell function `setup`, which the command runs on each node first. PYTHONSAFEPATH keeps modules of
    the current directory, such as a `trainer.py`, from hiding those of the code.
    """
    from launch.cluster.slurm import setup_function_text

    return {
        **os.environ,
        "SHARDTUNE_SETUP": setup_function_text(slurm, CODE_DIRECTORY),
        "PYTHONPATH": os.pathsep.join([str(CODE_DIRECTORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONSAFEPATH": "1",
    }


def _srun_options(slurm: SlurmConfig, *, in_allocation: bool) -> list[str]:
    """The options of the srun command that checks nodes of the allocation that this process is in, or of a new one."""
    from launch.cluster.slurm import node_request, unquoted_options

    if in_allocation:
        return ["--overlap"]  # beside whatever else runs in the allocation
    return unquoted_options({**node_request(slurm), "time": TIME_LIMIT_MINUTES, "job-name": "shardtune-doctor"})
