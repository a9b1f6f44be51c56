"""Which nodes the words of `shardtune doctor` name, and how they are reached."""

from __future__ import annotations

import os
import shlex
import socket
import sys

from launch.cluster import containers
from launch.cluster.preflight.coordinator import Command, asked_of, by_srun, here
from launch.cluster.preflight.node_facts import PreflightRequest
from strategies.errors import ConfigError, key_of_problem
from trainer.config.run import RunConfig, SlurmConfig
from trainer.reporting.code_revision import ROOT

MINUTES = 10
"""Asked of SLURM for a preflight outside an allocation."""


def nodes_of(words: list[str]) -> tuple[PreflightRequest, list[Command], list[str], bool]:
    """(what they are asked, what is started, their names, whether SLURM's queue is waited for). Raises ConfigError."""
    from launch.config.compose import compose, refusals
    from trainer.config.resuming import plain

    config = compose(words, check=False).config
    if problems := [line for line in refusals(config) if key_of_problem(line).startswith("launcher.")]:
        raise ConfigError(problems)
    config.launcher.processes = config.launcher.per_node
    if isinstance(config.launcher, SlurmConfig):
        return _of_slurm(config, words)
    if config.launcher.nodes > 1:
        raise ConfigError(
            f"launcher.nodes={config.launcher.nodes}: only nodes of SLURM are asked from here (launcher=slurm); else call "
            "doctor on each of them"
        )
    asked = asked_of(plain(config), 1)
    with socket.create_server(("localhost", 0)) as free:
        asked.master = f"localhost:{free.getsockname()[1]}"
    return asked, here(), [os.uname().nodename], False


def _of_slurm(config: RunConfig, words: list[str]) -> tuple[PreflightRequest, list[Command], list[str], bool]:
    from launch.cluster.job_end import hosts_of_job
    from launch.cluster.slurm import Options, request, setup_text, written
    from trainer.config.resuming import plain

    slurm = config.launcher
    assert isinstance(slurm, SlurmConfig)
    inside = "SLURM_JOB_ID" in os.environ
    named = hosts_of_job() if inside else []
    if inside and not any(word.startswith("launcher.nodes=") for word in words):
        slurm.nodes = len(named)
    if inside and slurm.nodes > len(named):
        raise ConfigError(f"launcher.nodes={slurm.nodes}: this allocation has {len(named)}; leave it out")
    asked = asked_of(plain(config), slurm.nodes)
    asked.exchange = True
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "SHARDTUNE_SETUP": setup_text(slurm, ROOT), "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    own: Options = {**request(slurm), "time": MINUTES, "job-name": "shardtune-doctor"}
    options = ["--overlap"] if inside else [shlex.split(option)[0] for option in written(own)]
    step, before = containers.words(plain(config), [ROOT])
    containers.refuse_missing(plain(config)["launcher"])
    python = slurm.python or ("python3" if slurm.container else sys.executable)
    hosts = named or [f"node {number}" for number in range(slurm.nodes)]
    return asked, by_srun(slurm.nodes, python, [*options, *step], env, before=before), hosts, not inside
