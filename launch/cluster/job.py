"""`python -m launch.job begin` and `end`, which a job script calls before and after its training step.

`begin [arguments]` settles which run this is (frozen by `shardtune submit`, or composed here from the arguments of
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
from launch.cluster.job_end import JobStart, count_lost_start, end, job_name
from launch.config.process_role import master_port
from launch.runs.job_record import record_job_end, record_job_start
from launch.runs.queue import note_submitted
from strategies.errors import ConfigError, NodesUnfit, ShardtuneError, StorageError
from trainer.config.sbatch_options import ranks_per_node
from trainer.reporting.code_revision import ROOT
from trainer.reporting.settings_file import read_tree
from trainer.reporting.status import State, read_status
from trainer.session.lease import SILENT, refuse_in_use

SBATCH_DECIDES = (
    "is asked of SLURM when a job is submitted; give it to sbatch before the script's name, or use shardtune submit"
)
SCRIPT_DECIDES = "is the script's own: change slurm/train.sbatch or slurm/env.sh, or use shardtune submit"
LAUNCHER_KEYS = ("name", "processes", "nodes", "rdzv", "retry", "preflight", "code", "stage")
"""Settings of the launcher that slurm/train.sbatch takes as arguments; the others would be lost."""
SECTIONS = ("launcher", "run", "model", "data")
PORTS_TRIED = 50
"""How many ports are tried, one after another."""


@dataclass(frozen=True, slots=True)
class FrozenRun:
    """A run directory with the settings of its `config.yaml` that a job script needs."""

    directory: Path
    settings: dict[str, Any]
    """The sections `SECTIONS` of the file as nested dictionaries."""

    @classmethod
    def read(cls, directory: Path) -> FrozenRun:
        """Read a run directory's settings without torch. Errors: ConfigError.

        Whether the file was edited since it was frozen is checked later, by the ranks.
        """
        path = directory / "config.yaml"
        tree = read_tree(path)
        try:
            return cls(directory, {section: dict(tree[section]) for section in SECTIONS})
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{path}: not a configuration of this version ({' '.join(str(error).split())})"
            ) from error

    @property
    def processes(self) -> int:
        """Ranks of each node."""
        return ranks_per_node(self.settings["launcher"])

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


def begin(arguments: list[str]) -> dict[str, Any]:
    """Prepare one start of a SLURM job before its training step; returns the shell variables that the job script sets.

    Determines which run this is, whether it may start, which code it runs and where its ranks meet. `arguments`: the arguments of
    slurm/train.sbatch; empty for a run that `shardtune submit` has frozen. Errors: ConfigError, StorageError, ShardtuneError.
    """
    job = JobStart.here()
    refuse_heterogeneous(os.environ)
    run = load_or_freeze_run(arguments, job)
    logs = run.directory / "logs"
    # The script reads each of these, so each is there however the start goes on.
    shell_variables: dict[str, Any] = {
        "run_dir": run.directory,
        "logs": logs,
        "job": job.name,
        "start": job.restart,
        "finished": "",
        "code": "",
    }
    if read_status(run.directory).get("state") == State.done:
        print(f"{run.directory}: already finished with this configuration; nothing to do")
        pipeline_part.record_part_end("train", run.directory, 0)
        record_job_end(run.directory, job.name, job.restart, 0, reason="already finished", will_restart=False)
        return {**shell_variables, "finished": 1}

    logs.mkdir(parents=True, exist_ok=True)
    started_by_train_sbatch = bool(arguments)
    if started_by_train_sbatch:  # `shardtune submit` has copied the code, and its scripts start from the copy
        shell_variables["code"] = code_to_run(run, job)
    snapshot.refuse_changed_code()
    launcher = run.settings["launcher"]
    containers.refuse_unavailable_container(launcher)
    refuse_lost_starts(run, job, logs)
    refuse_in_use(run.directory, run.settings["run"]["lease_s"])
    # After the checks of the run directory: a start that they refuse must not replace the record of the run's own job.
    if started_by_train_sbatch:  # `submit` has left this record for its own jobs
        note_submitted([run.directory], job.name)
    record_job_start(run.directory, job.name, job.restart, os.environ.get("SLURM_JOB_NODELIST", ""))
    report_idle_gpus(run.processes, os.environ)
    for cause, times in launcher["retry"].items():
        shell_variables[f"retry_{cause}"] = times
    shell_variables |= {"processes": run.processes, "threads": run.threads, "silent": os.environ.get(SILENT, "")}
    master = choose_rendezvous(job, os.environ.get("SHARDTUNE_RDZV") or launcher["rdzv"])
    if len(job.nodes) > 1 and launcher.get("preflight", "none") != "none":
        check_nodes(run, job, master)
    return {**shell_variables, "rendezvous": master}


def refuse_lost_starts(run: FrozenRun, job: JobStart, logs: Path) -> None:
    """Count the start before this one if it was lost, and refuse this start after more lost ones than `launcher.retry` allows.

    A start is lost if its node failed or it was killed unsaved. SLURM requeues such a job by itself, without end.
    Errors: ShardtuneError, StorageError.
    """
    if not job.restart:
        return
    # The start before this one has ended: if its record still says that it runs, it could not write another.
    status = read_status(run.directory)
    if status.get("state") != State.running or status.get("job") != job.id:
        return
    limit = run.settings["launcher"]["retry"].get("node_fail", 0)
    if not count_lost_start(logs, job, limit):
        raise ShardtuneError(
            f"job {job.name}: more than {limit} starts ended without a word (node lost, or killed unsaved); "
            "not started again"
        )


def refuse_heterogeneous(env: Mapping[str, str]) -> None:
    """Refuse a heterogeneous SLURM job, since the job script would train on its first component alone. Errors: ConfigError."""
    components = env.get("SLURM_HET_SIZE", "")
    if components.isdecimal() and int(components) > 1:
        raise ConfigError(
            f"SLURM_HET_SIZE={components}: a heterogeneous job trains on its first part alone, and the nodes of the others would "
            "stay idle; submit a job of nodes that are alike"
        )


def report_idle_gpus(processes: int, env: Mapping[str, str]) -> None:
    """Print how many GPUs of this node stay without a rank. `processes`: the ranks of a node."""
    gpus_of_job = env.get("SLURM_GPUS_ON_NODE", "")
    if gpus_of_job.isdecimal() and int(gpus_of_job) > processes:
        print(
            f"{int(gpus_of_job) - processes} of {gpus_of_job} GPUs stay idle on each node: the run has {processes} ranks a "
            "node (launcher.processes)",
            file=sys.stderr,
        )


def code_to_run(run: FrozenRun, job: JobStart) -> Path | str:
    """The directory of the code that a run by slurm/train.sbatch uses, a copy of it if `launcher.code=snapshot`.

    The first start of a job makes the copy in the run directory, and later starts use it. Empty for the clone itself.
    Errors: ConfigError if the copy was changed, StorageError.
    """
    if run.settings["launcher"].get("code") != "snapshot":
        return ""
    copy = snapshot.newest_code_copy(run.directory) if job.restart else None
    if copy is None:
        return snapshot.copy_code(run.directory)
    snapshot.refuse_changed_code(copy)
    return copy


def check_nodes(run: FrozenRun, job: JobStart, master: str) -> None:
    """Run the preflight on all nodes of the job before its ranks are started, and print what it found.

    `master`: host:port at which the ranks will meet; the preflight's own ranks meet there too. Errors: NodesUnfit with every
    problem, StorageError.
    """
    from launch.cluster.preflight.answer import report_text
    from launch.cluster.preflight.coordinator import commands_by_srun, preflight_request, run_preflight

    request = preflight_request(run.settings, len(job.nodes))
    request.master = master
    srun_options, prefix = containers.container_command(run.settings, [ROOT, run.directory])
    python = os.environ.get("SHARDTUNE_PYTHON") or sys.executable
    if containers.container_runtime(run.settings["launcher"]):
        python = run.settings["launcher"].get("python") or "python3"
    commands = commands_by_srun(len(job.nodes), python, srun_options, prefix=prefix)
    reports, verdict = run_preflight(request, commands, job.nodes)
    print(report_text(request, reports, verdict), flush=True)
    if verdict.problems:
        raise NodesUnfit(
            f"job {job.name}: not started: {verdict.problems[0]}. Fix the node, or exclude it (sbatch --exclude=<node>); "
            "launcher.preflight=none skips this check"
        )


def load_or_freeze_run(arguments: list[str], job: JobStart) -> FrozenRun:
    """The run of this job: the one that was frozen when the job was submitted, else one that is composed and frozen now.

    `arguments`: the command-line arguments of slurm/train.sbatch, such as "model.path=..."; only that script brings some.
    Errors: ConfigError.
    """
    frozen_config = os.environ.get("SHARDTUNE_CONFIG")
    if frozen_config and not arguments:
        return FrozenRun.read(Path(frozen_config).parent)
    from launch.config.compose import compose
    from launch.runs.freeze import freeze

    problems = misplaced_arguments(arguments)
    if problems:
        raise ConfigError(problems)
    composed = compose([*settings_from_job(job), *arguments])
    nodes = composed.config.launcher.nodes
    if nodes != len(job.nodes):
        raise ConfigError(f"launcher.nodes={nodes}: the job has {len(job.nodes)}; give sbatch --nodes and leave it out")
    run_dir = Path(composed.config.run.dir or "")
    return FrozenRun.read(freeze(composed, run_dir, may_change_strategy=True))


def misplaced_arguments(arguments: list[str]) -> list[str]:
    """Why slurm/train.sbatch cannot take some of its arguments: SLURM has decided them already, or the script itself does.

    ["launcher.time=1:00:00", "launcher.nodes=2"] -> one problem, about launcher.time.
    """
    problems = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        group, _, name = key.partition(".")
        if group != "launcher":
            continue
        is_taken = name in LAUNCHER_KEYS if name else value == "slurm"
        if not is_taken:
            reason = SCRIPT_DECIDES if name in ("", "setup", "python") else SBATCH_DECIDES
            problems.append(f"{argument}: {reason}")
    return problems


def settings_from_job(job: JobStart) -> list[str]:
    """The settings that a run by slurm/train.sbatch takes from its SLURM job and from the script's environment.

    As command-line arguments: ["run.dir=runs/slurm-123", "launcher.nodes=2", ...].
    """
    from trainer.config.run import SlurmConfig

    env = os.environ
    retries = []
    for cause, times in SlurmConfig().retry.items():
        retries.append(f"{cause}:{env.get(f'RETRY_{cause.upper()}') or times}")
    processes = env.get("PROCESSES") or env.get("SLURM_GPUS_ON_NODE") or 1
    return [
        f"run.dir=runs/slurm-{job.id}",
        "launcher=slurm",
        f"launcher.nodes={len(job.nodes)}",
        f"launcher.retry={{{','.join(retries)}}}",
        f"launcher.processes={processes}",
    ]


def choose_rendezvous(job: JobStart, address: str | None) -> str:
    """The host:port at which the job's ranks meet: the configured `address`, or a free port of the first node.

    Every start chooses anew: a requeued job may be given other nodes, and two jobs may share a node. Errors: ConfigError.
    """
    if address:
        # A port of this host can be tested before the ranks meet there.
        host, _, typed_port = address.rpartition(":")
        is_this_host = host.split(".")[0] == socket.gethostname().split(".")[0]
        if is_this_host and not _is_port_free(int(typed_port)):
            raise ConfigError(
                f"launcher.rdzv={address}: another process listens there; choose another port, or leave it out"
            )
        return address
    first_port = master_port(os.environ)
    for offset in range(PORTS_TRIED):
        port = 20000 + (first_port - 20000 + offset) % 10000  # from `first_port` on, within 20000 to 29999
        if _is_port_free(port):
            return f"{job.nodes[0]}:{port}"
    raise ConfigError(
        f"{job.nodes[0]}: no free port from {first_port} on, {PORTS_TRIED} were tried; choose one with launcher.rdzv=host:port"
    )


def _is_port_free(port: int) -> bool:
    """Whether nobody listens at a port of this host, which is the job's first."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        with socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def _stdout_is_stderr() -> Iterator[int]:
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
    """What job scripts call as `python -m launch.job`; returns the exit code. Errors: ConfigError.

    - `begin [arguments]`: prints shell variables for the script, as NAME=value lines;
    - `end <exit code of the step> <1 after TERM, else empty> [<1 if no rank was started>]`: records the end, requeues the job;
    - `part <part> <run directory> <ranks>`: runs a part of a pipeline other than training.
    """
    if argv[:1] == ["part"] and len(argv) == 4:
        snapshot.refuse_changed_code()
        return pipeline_part.run_part(argv[1], Path(argv[2]), int(argv[3]))
    # Three arguments come from scripts of an earlier shardtune, which did not tell whether a rank was started.
    if argv[:1] == ["end"] and len(argv) in (3, 4) and argv[1].isdecimal():
        return end(int(argv[1]), bool(argv[2]), unstarted=argv[3:] == ["1"])
    if argv[:1] != ["begin"]:
        raise ConfigError("this is for job scripts: begin [words], or end <code> <stopped> [<unstarted>]")
    with _stdout_is_stderr() as stdout_fd:
        try:
            shell_variables = begin(argv[1:])
        except ShardtuneError as error:
            record_refusal(error)
            raise
        lines = "".join(f"{key}={shlex.quote(str(value))}\n" for key, value in shell_variables.items())
        os.write(stdout_fd, lines.encode())
    return 0


def record_refusal(error: ShardtuneError) -> None:
    """Record in the directory of a frozen run why its job ended before a rank was started."""
    config = os.environ.get("SHARDTUNE_CONFIG")
    name = job_name()
    if not config or name is None or not Path(config).is_file():
        return
    restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    reason = " ".join(str(error).split())
    with contextlib.suppress(StorageError):
        record_job_end(Path(config).parent, name, restart, error.exit_code, reason=reason, will_restart=False)
