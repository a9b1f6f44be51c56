"""Rules of the launcher's settings, without SLURM and for what sbatch is asked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict

from trainer.config.run import RETRY_CAUSES, Device, LauncherConfig, RunConfig, SlurmConfig
from trainer.config.sbatch_options import gpus_in_gres, gpus_of_whole_job, parse_sbatch_options

SLURM_TIME_REGEX = re.compile(r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}")
SLURM_MEMORY_REGEX = re.compile(r"\d+([KMGT]B?)?", re.IGNORECASE)
"""`launcher.mem`: `64G`, `512000M`, `512000` (megabytes), or `0` for all memory of a node."""
JOB_NAME_REGEX = re.compile(r"[\w.-]+")
PIPELINE_JOB_NAMES = ("prepare", "train", "evaluate", "export")
HOST_REGEX = re.compile(r"[\w\[][\w.@:%\[\]-]*")
ADVICE_BY_FORBIDDEN_OPTION = {
    "array": "the script is for one run, or for those of -m; launcher.array_limit bounds how many run at a time",
    "nodes": "the ranks are counted by launcher.nodes; set that",
    "output": "`shardtune logs` reads <run>/logs; leave it out",
    "error": "`shardtune logs` reads <run>/logs; leave it out",
    "open-mode": "a requeued job appends to its logs; leave it out",
    "signal": "the script expects USR2 at the time of launcher.signal_lead_s; set that",
}
"""Options of sbatch that `launcher.extra` must not have, and what to do in their place."""
RENDEZVOUS_REGEX = re.compile(r"[^\s:]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}")
"""`launcher.rdzv`, where the ranks meet: `node1:29400`, or `[fe80::1]:29400`."""
JOB_IDS_REGEX = re.compile(r"\d+(_\d+)?(:\d+(_\d+)?)*")


def launcher_problems(config: RunConfig) -> Iterator[str]:
    """Check the settings of `launcher`, which starts the processes of a run here, over ssh or by SLURM; yields error messages."""
    launcher = config.launcher
    for cause, times in launcher.retry.items():
        if cause not in RETRY_CAUSES:
            yield f"launcher.retry={{{cause}: {times}}}: there is no such cause; it has {' and '.join(RETRY_CAUSES)}"
        elif times < 0:
            yield f"launcher.retry={{{cause}: {times}}}: must be at least 0; 0 never starts the run again"
    if launcher.stage is not None and not launcher.stage.startswith(("/", "~", "$")):
        yield f"launcher.stage={launcher.stage}: must be the same on every node: an absolute path, or a variable of the node's"
    if isinstance(launcher, SlurmConfig):
        yield from _slurm_problems(launcher)
        yield from _gpu_problems(config, launcher)
        yield from _pipeline_problems(config, launcher)
    else:
        yield from _local_launcher_problems(config, launcher)


def _local_launcher_problems(config: RunConfig, launcher: LauncherConfig) -> Iterator[str]:
    """Check launcher=local, which starts a run without SLURM; yields error messages.

    There are three ways: on this host, on `launcher.hosts` over ssh, or by the same command that the user types on each host.
    """
    if launcher.ssh and not launcher.hosts:
        yield f"launcher.ssh=[{','.join(launcher.ssh)}]: no host is reached over ssh; name them in launcher.hosts=[n1,n2]"
    if launcher.hosts:
        yield from _ssh_problems(launcher)
    elif launcher.nodes > 1:
        yield from _manual_start_problems(config, launcher)
    if launcher.rdzv is not None and not RENDEZVOUS_REGEX.fullmatch(launcher.rdzv):
        yield f"launcher.rdzv={launcher.rdzv}: must be host:port, such as node1:29400"
    if launcher.node_rank is not None and launcher.node_rank >= launcher.nodes > 0 and not launcher.hosts:
        yield f"launcher.node_rank={launcher.node_rank}: must be below launcher.nodes={launcher.nodes}"


def _manual_start_problems(config: RunConfig, launcher: LauncherConfig) -> Iterator[str]:
    """Check what a run needs whose command the user types on each of several hosts: a common meeting point and directory.

    Yields error messages.
    """
    if launcher.rdzv is None:
        yield (
            f"launcher.nodes={launcher.nodes}: needs launcher.rdzv=<first host>:<port>, the same everywhere; or name the "
            "hosts in its place: launcher.hosts=[n1,n2]"
        )
    if config.run.dir is None:
        yield f"launcher.nodes={launcher.nodes}: needs run.dir on a file system that all hosts share"
    if any(launcher.retry.values()):  # how often a run is started again, by the cause of its failure
        yield (
            f"launcher.retry: with launcher.nodes={launcher.nodes} and no SLURM each host's launcher would count by itself; "
            "name the hosts in launcher.hosts=[n1,n2], or leave it out and start the command again on each"
        )


def _ssh_problems(launcher: LauncherConfig) -> Iterator[str]:
    """Check the hosts on which a run is started over ssh (`launcher.hosts`), and what does not go with them; yields messages."""
    hosts_text = f"launcher.hosts=[{','.join(launcher.hosts)}]"
    if launcher.nodes != len(launcher.hosts):
        yield f"launcher.nodes={launcher.nodes}: {hosts_text} are {len(launcher.hosts)}; leave launcher.nodes out"
    for host in launcher.hosts:
        if not HOST_REGEX.fullmatch(host):
            yield f"{hosts_text}: `{host}` is no host; give names or addresses as ssh takes them, such as [n1,me@n2]"
    if len({*launcher.hosts}) < len(launcher.hosts):
        yield f"{hosts_text}: a host is named twice; its number of ranks is launcher.processes"
    for key in ("address", "node_rank"):
        value = getattr(launcher, key)
        if value is not None:
            yield f"launcher.{key}={value}: {hosts_text} says it of each host; leave it out"


def _slurm_problems(launcher: SlurmConfig) -> Iterator[str]:
    """Check the settings of a SLURM job before anything is submitted; yields error messages, with what to set instead."""
    if launcher.hosts:
        yield f"launcher.hosts=[{','.join(launcher.hosts)}]: SLURM chooses the nodes; launcher=local takes hosts, over ssh"
    if not SLURM_TIME_REGEX.fullmatch(launcher.time):
        yield f"launcher.time={launcher.time}: must be [days-]hours:minutes:seconds, such as 24:00:00"
    if launcher.mem is not None and not SLURM_MEMORY_REGEX.fullmatch(launcher.mem):
        yield f"launcher.mem={launcher.mem}: must be the memory of a node, such as 512G; 0 takes all of it"
    if launcher.address is not None:
        yield (
            f"launcher.address={launcher.address}: is the address of one host, and SLURM starts all of them; name the first "
            "with launcher.rdzv=host:port, or the interface with GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME in slurm/env.sh"
        )
    if launcher.node_rank is not None:
        yield f"launcher.node_rank={launcher.node_rank}: SLURM numbers the nodes; leave it out"
    if launcher.job_name is not None and not JOB_NAME_REGEX.fullmatch(launcher.job_name):
        yield f"launcher.job_name={launcher.job_name}: names log files, too; use letters, digits, `.`, `_` and `-`"
    if launcher.after is not None and not JOB_IDS_REGEX.fullmatch(launcher.after):
        yield f"launcher.after={launcher.after}: must be the id of a job, as in launcher.after=17; several: 17:18"
    if launcher.mail_user is not None and launcher.mail is None:
        yield f"launcher.mail_user={launcher.mail_user}: nothing is mailed; say what: launcher.mail=END,FAIL"
    yield from _sbatch_option_problems(launcher)


def _gpu_problems(config: RunConfig, launcher: SlurmConfig) -> Iterator[str]:
    """Check that a SLURM job gets a GPU for each rank, and asks for one number of GPUs; yields error messages."""
    num_gpus_in_gres = gpus_in_gres(launcher.gres)
    if launcher.gpus_per_node and num_gpus_in_gres not in (0, launcher.gpus_per_node):
        yield (
            f"launcher.gres={launcher.gres}: asks for {num_gpus_in_gres} GPUs of a node, and launcher.gpus_per_node="
            f"{launcher.gpus_per_node}; leave one of the two out"
        )
    request = launcher.gpus_per_node_request
    if request is None or launcher.processes is None or config.run.device is Device.cpu:
        return
    if launcher.processes > request.count:
        yield (
            f"launcher.processes={launcher.processes}: each rank needs a GPU of its own, and {request.setting}; leave "
            "launcher.processes out to train on all of them"
        )


def _sbatch_option_problems(launcher: SlurmConfig) -> Iterator[str]:
    """Check the user's own options of sbatch: none that the job's script or the launcher sets itself; yields error messages.

    The options are those in `launcher.extra`, and in `launcher.part_options` for one job of a pipeline, such as `evaluate`.
    GPUs of the whole job (`--gpus`) must be a multiple of the nodes.
    """
    arguments_by_key = {"launcher.extra": launcher.extra}
    arguments_by_key |= {f"launcher.part_options.{part}": extra for part, extra in launcher.part_options.items()}
    for key, arguments in arguments_by_key.items():
        for option, value in parse_sbatch_options(arguments).items():
            if option in ADVICE_BY_FORBIDDEN_OPTION:
                option_text = f"--{option}={value}" if value else f"--{option}"
                yield f"{key}: {option_text}: {ADVICE_BY_FORBIDDEN_OPTION[option]}"
    num_gpus = gpus_of_whole_job(asdict(launcher))
    if num_gpus is not None and launcher.nodes > 1 and num_gpus % launcher.nodes:
        yield (
            f"launcher.extra: --gpus={num_gpus} cannot be shared evenly by launcher.nodes={launcher.nodes}; "
            "each node needs the same number of ranks: set launcher.gpus_per_node"
        )


def _pipeline_problems(config: RunConfig, launcher: SlurmConfig) -> Iterator[str]:
    """Check `launcher.pipeline`, a chain of SLURM jobs for one run, such as [prepare, train, evaluate]; yields error messages."""
    parts = launcher.pipeline
    pipeline_text = f"launcher.pipeline=[{','.join(parts)}]"
    in_order = [part for part in PIPELINE_JOB_NAMES if part in parts]
    if parts and (parts != in_order or "train" not in parts):
        yield f"{pipeline_text}: must be train and others of [{','.join(PIPELINE_JOB_NAMES)}], in this order, each once"
    if "evaluate" in parts:
        has_held_out_data = config.data.eval_path is not None or config.data.eval_share > 0
        if not config.evaluation.tasks and not has_held_out_data:
            yield (
                f"{pipeline_text}: there is nothing to evaluate; give data.eval_path or data.eval_share, or tasks: "
                "evaluation.tasks=[...] (docs/evaluation.md)"
            )
    unknown = sorted(launcher.part_options.keys() - set(PIPELINE_JOB_NAMES))
    if unknown:
        yield f"launcher.part_options: {', '.join(unknown)}: no part of a pipeline; they are {', '.join(PIPELINE_JOB_NAMES)}"


def separate_job_writes_export(config: RunConfig) -> bool:
    """Whether another job than the one that trains writes the export (`launcher.pipeline` with export), after it has ended."""
    return isinstance(config.launcher, SlurmConfig) and "export" in config.launcher.pipeline


def run_writes_export(config: RunConfig) -> bool:
    """Whether the processes that train also write the export; not if a job of the pipeline does, so that GPUs are released."""
    return config.export.at_end and not separate_job_writes_export(config)
