"""Which nodes the arguments of `shardtune doctor` name, and how they are reached."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass

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
from trainer.reporting.code_revision import ROOT

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
    """Find out which nodes `shardtune doctor` checks, and how, from the overrides on its command line.

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
    config.launcher.processes = config.launcher.per_node
    if isinstance(config.launcher, SlurmConfig):
        return _slurm_targets(config, overrides)
    if config.launcher.nodes > 1:
        raise ConfigError(
            f"launcher.nodes={config.launcher.nodes}: only nodes of SLURM are asked from here (launcher=slurm); else call "
            "doctor on each of them"
        )
    request = preflight_request(settings_as_dict(config), num_nodes=1)
    with socket.create_server(("localhost", 0)) as listener:  # any free port
        free_port = listener.getsockname()[1]
    request.master = f"localhost:{free_port}"
    return PreflightTargets(request, [local_check_command()], hosts=[os.uname().nodename], is_queued=False)


def _slurm_targets(config: RunConfig, overrides: list[str]) -> PreflightTargets:
    """The nodes of SLURM that a preflight checks, and how: those of the allocation that this process is in, or of a new one.

    Within an allocation all its nodes are checked, unless `overrides` have `launcher.nodes`: sets `config.launcher.nodes`.
    Raises ConfigError if the allocation has fewer nodes, or if the run's container cannot start here.
    """
    from launch.cluster.job_end import hosts_of_job
    from trainer.config.resuming import settings_as_dict

    # Which nodes.
    slurm = config.launcher
    assert isinstance(slurm, SlurmConfig)
    in_allocation = "SLURM_JOB_ID" in os.environ
    hosts = hosts_of_job() if in_allocation else []
    is_number_of_nodes_set = any(override.startswith("launcher.nodes=") for override in overrides)
    if in_allocation and not is_number_of_nodes_set:
        slurm.nodes = len(hosts)
    if in_allocation and slurm.nodes > len(hosts):
        raise ConfigError(f"launcher.nodes={slurm.nodes}: this allocation has {len(hosts)}; leave it out")
    if not hosts:  # SLURM has not chosen any yet
        hosts = [f"node {number}" for number in range(slurm.nodes)]
    # What each node must have.
    settings = settings_as_dict(config)
    request = preflight_request(settings, num_nodes=slurm.nodes)
    request.exchange = True  # the ranks' communication is tested too
    # The srun command that checks them.
    environment = _srun_environment(slurm)
    srun_options = _srun_options(slurm, in_allocation=in_allocation)
    container = containers.container_command(settings, [ROOT])
    containers.refuse_unavailable_container(settings["launcher"])
    srun_options += container.srun_options
    python = slurm.python or ("python3" if slurm.container else sys.executable)
    command = srun_check_command(slurm.nodes, python, srun_options, environment, prefix=container.prefix)
    return PreflightTargets(request, commands=[command], hosts=hosts, is_queued=not in_allocation)


def _srun_environment(slurm: SlurmConfig) -> dict[str, str]:
    """The environment variables of the srun command that checks nodes: those of this process, the code's path, and `setup`.

    SHARDTUNE_SETUP holds the shell function `setup`, which the command runs on each node first.
    """
    from launch.cluster.slurm import setup_function_text

    return {
        **os.environ,
        "SHARDTUNE_SETUP": setup_function_text(slurm, ROOT),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONSAFEPATH": "1",
    }


def _srun_options(slurm: SlurmConfig, *, in_allocation: bool) -> list[str]:
    """The options of the srun command that checks nodes of the allocation that this process is in, or of a new one."""
    from launch.cluster.slurm import node_request, unquoted_options

    if in_allocation:
        return ["--overlap"]  # beside whatever else runs in the allocation
    return unquoted_options({**node_request(slurm), "time": TIME_LIMIT_MINUTES, "job-name": "shardtune-doctor"})
