"""Which nodes the arguments of `shardtune doctor` name, and how they are reached."""

from __future__ import annotations

import os
import shlex
import socket
import sys

from launch.cluster import containers
from launch.cluster.preflight.coordinator import NodeCommand, commands_by_srun, commands_on_this_host, preflight_request
from launch.cluster.preflight.node_facts import PreflightRequest
from strategies.errors import ConfigError, key_of_problem
from trainer.config.run import RunConfig, SlurmConfig
from trainer.reporting.code_revision import ROOT

MINUTES = 10
"""Time limit of the job that SLURM is asked for when a preflight runs outside an allocation."""


def preflight_targets(arguments: list[str]) -> tuple[PreflightRequest, list[NodeCommand], list[str], bool]:
    """Find out which nodes `shardtune doctor` checks, and how, from its command-line arguments (`arguments`).

    Returns (what each node must have, the commands that check them, the nodes' names, whether the nodes must first be waited
    for in SLURM's queue). Errors: ConfigError for launcher settings that are wrong, or name other hosts without SLURM.
    """
    from launch.config.compose import compose, start_problems
    from trainer.config.resuming import plain

    config = compose(arguments, check=False).config
    # Only the launcher's settings matter here: a model or data set may still be missing.
    problems = [problem for problem in start_problems(config) if key_of_problem(problem).startswith("launcher.")]
    if problems:
        raise ConfigError(problems)
    config.launcher.processes = config.launcher.per_node
    if isinstance(config.launcher, SlurmConfig):
        return _slurm_targets(config, arguments)
    if config.launcher.nodes > 1:
        raise ConfigError(
            f"launcher.nodes={config.launcher.nodes}: only nodes of SLURM are asked from here (launcher=slurm); else call "
            "doctor on each of them"
        )
    # This host, as the only node.
    request = preflight_request(plain(config), nodes=1)
    with socket.create_server(("localhost", 0)) as listener:  # any free port
        free_port = listener.getsockname()[1]
    request.master = f"localhost:{free_port}"
    return request, commands_on_this_host(), [os.uname().nodename], False


def _slurm_targets(
    config: RunConfig, arguments: list[str]
) -> tuple[PreflightRequest, list[NodeCommand], list[str], bool]:
    """As `preflight_targets`, for nodes of SLURM: those of the allocation that this process is in, or of a new one."""
    from launch.cluster.job_end import hosts_of_job
    from launch.cluster.slurm import Options, node_request, quoted_options, setup_function_text
    from trainer.config.resuming import plain

    # Which nodes.
    slurm = config.launcher
    assert isinstance(slurm, SlurmConfig)
    in_allocation = "SLURM_JOB_ID" in os.environ
    hosts = hosts_of_job() if in_allocation else []
    nodes_are_given = any(argument.startswith("launcher.nodes=") for argument in arguments)
    if in_allocation and not nodes_are_given:
        slurm.nodes = len(hosts)
    if in_allocation and slurm.nodes > len(hosts):
        raise ConfigError(f"launcher.nodes={slurm.nodes}: this allocation has {len(hosts)}; leave it out")
    if not hosts:  # SLURM has not chosen any yet
        hosts = [f"node {number}" for number in range(slurm.nodes)]
    # What each node must have.
    tree = plain(config)
    request = preflight_request(tree, nodes=slurm.nodes)
    request.exchange = True
    # The srun command that checks them.
    env = {
        **os.environ,
        "SHARDTUNE_SETUP": setup_function_text(slurm, ROOT),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONSAFEPATH": "1",
    }
    if in_allocation:
        srun_options = ["--overlap"]  # beside whatever else runs in the allocation
    else:
        options: Options = {**node_request(slurm), "time": MINUTES, "job-name": "shardtune-doctor"}
        # `quoted_options` quotes for a shell. No shell reads these: shlex.split takes the quotes off again.
        srun_options = [shlex.split(option)[0] for option in quoted_options(options)]
    container_options, prefix = containers.container_command(tree, [ROOT])
    containers.refuse_unavailable_container(tree["launcher"])
    python = slurm.python or ("python3" if slurm.container else sys.executable)
    commands = commands_by_srun(slurm.nodes, python, [*srun_options, *container_options], env, prefix=prefix)
    return request, commands, hosts, not in_allocation
