"""`python -m launch.job begin` and `end`, which a job script calls before and after its training step.

`begin [overrides]` settles which run this is (submitted by `shardtune submit`, or composed here from the overrides of
slurm/train.sbatch), whether it may start, and where its ranks meet. It prints lines that the shell evaluates;
everything else goes to stderr. `end` requeues a run that saved and wants to go on, or that lost a rank. Records of an
earlier start are recognised by the job's id and the number of its start, never by a clock.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cluster import containers, pipeline_part, snapshot
from launch.cluster.job_end import JobStart, job_name, record_end_and_requeue, record_lost_start
from launch.config.process_role import master_port
from launch.runs.job_record import record_job_end, record_job_start
from launch.runs.queue import write_submitted_job_ids
from strategies.errors import ConfigError, NodesUnfit, ShardtuneError, StorageError
from trainer.config.sbatch_options import ranks_per_node
from trainer.reporting.code_revision import CODE_DIRECTORY
from trainer.reporting.settings_file import read_settings_tree
from trainer.reporting.status import RunState, read_status
from trainer.session.lease import SILENT_OWNER_VARIABLE, raise_if_run_dir_is_in_use

SBATCH_DECIDES_REASON = (
    "is asked of SLURM when a job is submitted; give it to sbatch before the script's name, or use shardtune submit"
)
SCRIPT_DECIDES_REASON = "is the script's own: change slurm/train.sbatch or slurm/env.sh, or use shardtune submit"
SCRIPT_LAUNCHER_KEYS = ("name", "processes", "nodes", "rdzv", "retry", "preflight", "code", "stage")
"""Keys below `launcher.` that slurm/train.sbatch takes as overrides; SLURM or the script itself has decided the others."""
CONFIG_SECTIONS = ("launcher", "run", "model", "data")
JOB_USAGE = (
    "this is for job scripts: begin [overrides]; end <exit code of the step> <1 after TERM, else empty> "
    "[<1 if no rank was started>]; or part <part> <run directory> <ranks>"
)
PORTS = range(20000, 30000)
"""Ports at which ranks meet if the user names none; below those that the kernel gives out to connections."""
MAX_PORTS_TRIED = 50
"""How many ports are tried, one after another."""


@dataclass(frozen=True, slots=True)
class FrozenRun:
    """A run whose settings are decided: they stand in the `config.yaml` of its directory, which job scripts read."""

    directory: Path
    settings: dict[str, Any]
    """All settings of the file as nested dictionaries. The sections `CONFIG_SECTIONS` are surely there."""

    @classmethod
    def read(cls, directory: Path) -> FrozenRun:
        """Read the settings of a run from the `config.yaml` of its directory, without torch, which takes seconds to import.

        Whether the file was edited since it was written is checked later, by the ranks. Raises ConfigError if it cannot be read
        or lacks a section.
        """
        path = directory / "config.yaml"
        sections = read_settings_tree(path)
        try:
            return cls(directory, {**sections, **{section: dict(sections[section]) for section in CONFIG_SECTIONS}})
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{path}: not a configuration of this version ({' '.join(str(error).split())})"
            ) from error

    @property
    def launcher(self) -> dict[str, Any]:
        """The settings `launcher.*`."""
        return self.settings["launcher"]

    @property
    def processes(self) -> int:
        """Ranks of each node."""
        return ranks_per_node(self.launcher)

    @property
    def threads(self) -> int:
        """CPU threads of each rank: `run.threads`, or OMP_NUM_THREADS, or the node's cores divided by its ranks."""
        configured = self.settings["run"]["threads"]
        if configured:
            return configured
        omp_threads = os.environ.get("OMP_NUM_THREADS", "")
        if omp_threads.isdecimal():
            return int(omp_threads)
        cores = int(os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or 1)
        return max(1, cores // self.processes)


def prepare_job_start(overrides: list[str]) -> dict[str, Any]:
    """Prepare one start of a SLURM job before its training step: which run it trains, whether it may start, where ranks meet.

    `overrides`: the arguments of slurm/train.sbatch; empty for a run that `shardtune submit` has submitted.

    Records the start in the run directory. Returns the shell variables that the job script sets: {"run_dir": "runs/first", "job":
    "1234", "processes": 8, "rendezvous": "node1:29500", ...}. `finished` is 1 if the run is done already: then the script starts
    no ranks, and `rendezvous` and others are missing.

    Raises ConfigError if the run may not start, StorageError if its directory cannot be written, NodesUnfit after a failed
    preflight, and ShardtuneError after too many lost starts.
    """
    job = JobStart.from_environment()
    refuse_heterogeneous(os.environ)
    run = load_or_compose_run_of_job(overrides, job)
    logs = run.directory / "logs"
    # The script reads each of these, so each is there however the start goes on.
    shell_variables: dict[str, Any] = {
        "run_dir": run.directory,
        "logs": logs,
        "job": job.name,
        "start": job.num_earlier_starts,
        "finished": "",
        "code": "",
    }
    if read_status(run.directory).get("state") == RunState.done:
        print(f"{run.directory}: already finished with this configuration; nothing to do")
        pipeline_part.record_part_end("train", run.directory, 0)
        record_job_end(
            run.directory, job.name, job.num_earlier_starts, 0, reason="already finished", will_restart=False
        )
        return {**shell_variables, "finished": 1}

    logs.mkdir(parents=True, exist_ok=True)
    started_by_train_sbatch = bool(overrides)
    if started_by_train_sbatch:  # `shardtune submit` has copied the code, and its scripts start from the copy
        shell_variables["code"] = code_copy_of_job(run, job) or ""
    snapshot.refuse_changed_code()
    containers.refuse_unavailable_container(run.launcher)
    refuse_lost_starts(run, job, logs)
    raise_if_run_dir_is_in_use(run.directory, run.settings["run"]["lease_s"])
    # After the checks of the run directory: a start that they refuse must not replace the record of the run's own job.
    if started_by_train_sbatch:  # `submit` has left this record for its own jobs
        write_submitted_job_ids([run.directory], job.name)
    record_job_start(run.directory, job.name, job.num_earlier_starts, os.environ.get("SLURM_JOB_NODELIST", ""))
    print_idle_gpus(run.processes, os.environ)
    for cause, max_retries in run.launcher["retry"].items():
        shell_variables[f"retry_{cause}"] = max_retries
    shell_variables |= {
        "processes": run.processes,
        "threads": run.threads,
        "silent": os.environ.get(SILENT_OWNER_VARIABLE, ""),
    }
    rendezvous = choose_rendezvous(job, os.environ.get("SHARDTUNE_RDZV") or run.launcher["rdzv"])
    if len(job.nodes) > 1 and run.launcher.get("preflight", "none") != "none":
        refuse_job_with_unfit_nodes(run, job, rendezvous)
    return {**shell_variables, "rendezvous": rendezvous}


def refuse_lost_starts(run: FrozenRun, job: JobStart, logs: Path) -> None:
    """Count the start before this one if it was lost, and refuse this start after too many (`launcher.retry.node_fail`).

    A start is lost if its node failed or it was killed unsaved. SLURM requeues such a job by itself, without end.
    `logs`: where the count is kept.
    Raises ShardtuneError after too many lost starts, StorageError if the count cannot be written.
    """
    if not job.num_earlier_starts:
        return
    # The start before this one has ended. If `status.json` still says that it runs, it was lost before it could say otherwise.
    status = read_status(run.directory)
    was_lost = status.get("state") == RunState.running and status.get("job") == job.id
    if not was_lost:
        return
    max_lost_starts = run.launcher["retry"].get("node_fail", 0)
    num_lost_starts = record_lost_start(logs, job)
    if num_lost_starts > max_lost_starts:
        raise ShardtuneError(
            f"job {job.name}: more than {max_lost_starts} starts ended without a word (node lost, or killed unsaved); "
            "not started again"
        )


def refuse_heterogeneous(env: Mapping[str, str]) -> None:
    """Raise ConfigError for a heterogeneous SLURM job, because the job script would train on its first component alone."""
    components = env.get("SLURM_HET_SIZE", "")
    if components.isdecimal() and int(components) > 1:
        raise ConfigError(
            f"SLURM_HET_SIZE={components}: a heterogeneous job trains on its first part alone, and the nodes of the others would "
            "stay idle; submit a job of nodes that are alike"
        )


def print_idle_gpus(ranks_per_node: int, env: Mapping[str, str]) -> None:
    """Tell the user on stderr how many GPUs of this node stay without a rank, if any. `env`: the job's environment variables."""
    gpus_per_node = env.get("SLURM_GPUS_ON_NODE", "")
    if gpus_per_node.isdecimal() and int(gpus_per_node) > ranks_per_node:
        num_idle_gpus = int(gpus_per_node) - ranks_per_node
        print(
            f"{num_idle_gpus} of {gpus_per_node} GPUs stay idle on each node: the run has {ranks_per_node} ranks a "
            "node (launcher.processes)",
            file=sys.stderr,
        )


def code_copy_of_job(run: FrozenRun, job: JobStart) -> Path | None:
    """The copy of shardtune's code that a job of slurm/train.sbatch runs, which edits do not reach; None for the clone itself.

    - `launcher.code` is not `snapshot`: None;
    - the first start of a job: a new copy in the run directory;
    - a later start: the copy that the first start made. Raises ConfigError if it was changed since.

    Raises StorageError if the code cannot be copied.
    """
    if run.launcher.get("code") != "snapshot":
        return None
    copy = snapshot.newest_code_copy(run.directory) if job.num_earlier_starts else None
    if copy is None:
        return snapshot.copy_code(run.directory)
    snapshot.refuse_changed_code(copy)
    return copy


def refuse_job_with_unfit_nodes(run: FrozenRun, job: JobStart, rendezvous: str) -> None:
    """Check all nodes of the job (preflight) before its ranks are started, print what was found, and refuse unfit nodes.

    Each node is asked for its GPUs, libraries, run directory and data, and the ranks' communication is tested. `rendezvous`:
    host:port at which the ranks will meet; those of the test meet there too. Raises NodesUnfit with the first problem,
    StorageError if the run directory cannot be written.
    """
    from launch.cluster.preflight.answer import report_text
    from launch.cluster.preflight.coordinator import preflight_request, run_preflight, srun_check_command

    request = preflight_request(run.settings, len(job.nodes), rendezvous)
    container = containers.container_command(run.settings, [CODE_DIRECTORY, run.directory])
    python = os.environ.get("SHARDTUNE_PYTHON") or sys.executable  # the job script sets the variable
    if containers.container_runtime(run.launcher):  # the host's interpreter is not in the container
        python = run.launcher.get("python") or "python3"
    command = srun_check_command(len(job.nodes), python, container.srun_options, container_prefix=container.prefix)
    reports, verdict = run_preflight(request, [command], job.nodes)
    print(report_text(request, reports, verdict), flush=True)
    if verdict.problems:
        raise NodesUnfit(
            f"job {job.name}: not started: {verdict.problems[0]}. Fix the node, or exclude it (sbatch --exclude=<node>); "
            "launcher.preflight=none skips this check"
        )


def load_or_compose_run_of_job(overrides: list[str], job: JobStart) -> FrozenRun:
    """Find out which run this job trains, and read its settings.

    - Without overrides, and with SHARDTUNE_CONFIG set: the run that `shardtune submit` wrote when the job was submitted.
    - Otherwise: a run that is composed now from the job and the overrides. Its `config.yaml` is written.

    `overrides`: the arguments of slurm/train.sbatch, such as "model.path=..."; a script of `shardtune submit` has none.
    Raises ConfigError for overrides that the script cannot take, or that contradict the job.
    """
    submitted_config = os.environ.get("SHARDTUNE_CONFIG")
    if submitted_config and not overrides:
        return FrozenRun.read(Path(submitted_config).parent)
    from launch.config.compose import compose_config
    from launch.runs.freeze import write_run_config

    problems = misplaced_override_problems(overrides)
    if problems:
        raise ConfigError(problems)
    composed = compose_config([*overrides_from_job(job), *overrides])
    num_nodes = composed.config.launcher.nodes
    if num_nodes != len(job.nodes):
        raise ConfigError(
            f"launcher.nodes={num_nodes}: the job has {len(job.nodes)}; give sbatch --nodes and leave it out"
        )
    run_dir = Path(composed.config.run.dir or "")
    # The strategy may change: an unfinished run resumes under another one, as it does with `shardtune submit`.
    return FrozenRun.read(write_run_config(composed, run_dir, may_change_strategy=True))


def misplaced_override_problems(overrides: list[str]) -> list[str]:
    """Why slurm/train.sbatch cannot take some overrides of the launcher: sbatch has decided them, or they are the script's own.

    ["launcher.time=1:00:00", "launcher.nodes=2"] gives one problem, about launcher.time: the job runs already. Of the launcher
    itself, only "launcher=slurm" is taken.
    """
    problems = []
    for override in overrides:
        key, _, value = override.partition("=")
        group, _, launcher_key = key.partition(".")
        if group != "launcher":
            continue
        if launcher_key:
            can_be_taken = launcher_key in SCRIPT_LAUNCHER_KEYS
        else:
            can_be_taken = value == "slurm"
        if not can_be_taken:
            # slurm/train.sbatch sets the interpreter and its setup in lines of its own, or in slurm/env.sh.
            reason = SCRIPT_DECIDES_REASON if launcher_key in ("", "setup", "python") else SBATCH_DECIDES_REASON
            problems.append(f"{override}: {reason}")
    return problems


def overrides_from_job(job: JobStart) -> list[str]:
    """The overrides that a run by slurm/train.sbatch takes from its SLURM job and the script's environment, before those typed.

    ["run.dir=runs/slurm-123", "launcher=slurm", "launcher.nodes=2", "launcher.retry={preempted:20,...}", ...].
    """
    from trainer.config.run import SlurmConfig

    env = os.environ
    retries = []
    for cause, default_retries in SlurmConfig().retry.items():
        retries.append(f"{cause}:{env.get(f'RETRY_{cause.upper()}') or default_retries}")
    processes = env.get("PROCESSES") or env.get("SLURM_GPUS_ON_NODE") or 1
    return [
        f"run.dir=runs/slurm-{job.id}",
        "launcher=slurm",
        f"launcher.nodes={len(job.nodes)}",
        f"launcher.retry={{{','.join(retries)}}}",
        f"launcher.processes={processes}",
    ]


def choose_rendezvous(job: JobStart, configured_address: str | None) -> str:
    """Choose the host:port at which the job's ranks meet: the configured one, or else a free port of the job's first node.

    Every start chooses anew, because a requeued job may be given other nodes, and two jobs may share a node.
    `configured_address`: None or empty if the user has set none.
    Raises ConfigError if another process listens at the configured port of this host, or if no port is free.
    """
    if configured_address:
        host, _, port_text = configured_address.rpartition(":")
        is_this_host = host.split(".")[0] == socket.gethostname().split(".")[0]
        # Only a port of this host can be tested before the ranks meet there.
        if is_this_host and not _is_port_free(int(port_text)):
            raise ConfigError(
                f"launcher.rdzv={configured_address}: another process listens there; choose another port, or leave it out"
            )
        return configured_address
    # `begin` runs on the first node of the job, so that its ports can be tested here.
    first_port = master_port(os.environ)
    for offset in range(MAX_PORTS_TRIED):
        port = PORTS[(first_port - PORTS.start + offset) % len(PORTS)]  # after the last one comes the first
        if _is_port_free(port):
            return f"{job.nodes[0]}:{port}"
    raise ConfigError(
        f"{job.nodes[0]}: no free port from {first_port} on, {MAX_PORTS_TRIED} were tried; choose one with "
        "launcher.rdzv=host:port"
    )


def _is_port_free(port: int) -> bool:
    """Whether no process listens at a port of this host, on IPv4 or IPv6."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        with socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def _stdout_redirected_to_stderr() -> Iterator[int]:
    """Within the block, everything that is printed goes to stderr; yields the descriptor of the real stdout.

    The job script evaluates what comes from stdout, so that nothing else may be printed there.
    """
    sys.stdout.flush()
    stdout_fd = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield stdout_fd
    finally:
        os.dup2(stdout_fd, 1)
        os.close(stdout_fd)


def main(argv: list[str]) -> int:
    """Run one command of a job script, `python -m launch.job ...`; returns the exit code.

    - `begin [overrides]`: prints shell variables for the script, as NAME=value lines;
    - `end <exit code of the step> <1 after TERM, else empty> [<1 if no rank was started>]`: records the end, requeues the job;
    - `part <part> <run directory> <ranks>`: runs one part of a pipeline (prepare, evaluate or export).

    Raises ConfigError for other arguments.
    """
    command = argv[0] if argv else ""
    arguments = argv[1:]
    if command == "part" and len(arguments) == 3:
        part, run_dir, num_processes = arguments
        snapshot.refuse_changed_code()  # files of the copy that this process was started from
        return pipeline_part.run_part(part, Path(run_dir), int(num_processes))
    # The script of a job that an earlier shardtune submitted gives two arguments: it does not tell whether a rank was started.
    if command == "end" and len(arguments) in (2, 3) and arguments[0].isdecimal():
        srun_exit_code, term_text, *no_rank_started = arguments
        return record_end_and_requeue(
            int(srun_exit_code), received_term=bool(term_text), has_started_ranks=no_rank_started != ["1"]
        )
    if command != "begin":
        raise ConfigError(JOB_USAGE)
    _print_variables_of_job_start(arguments)
    return 0


def _print_variables_of_job_start(overrides: list[str]) -> None:
    """Prepare the start of the job, and print its shell variables to stdout as NAME=value lines, which the script evaluates.

    All else that is printed meanwhile goes to stderr. A refusal is recorded in the run directory and raised.
    """
    with _stdout_redirected_to_stderr() as stdout_fd:
        try:
            shell_variables = prepare_job_start(overrides)
        except ShardtuneError as error:
            record_refusal(error)
            raise
        lines = "".join(f"{key}={shlex.quote(str(value))}\n" for key, value in shell_variables.items())
        os.write(stdout_fd, lines.encode())


def record_refusal(error: ShardtuneError) -> None:
    """Record in the directory of a submitted run why its job ended before a rank was started, for `shardtune status`.

    Records nothing outside a job, without SHARDTUNE_CONFIG (the run's `config.yaml`), if that file does not exist, or if the disk
    is full.
    """
    config_file = os.environ.get("SHARDTUNE_CONFIG")
    name = job_name()
    if not config_file or name is None or not Path(config_file).is_file():
        return
    num_earlier_starts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    reason = " ".join(str(error).split())
    with contextlib.suppress(StorageError):
        record_job_end(
            Path(config_file).parent, name, num_earlier_starts, error.exit_code, reason=reason, will_restart=False
        )
