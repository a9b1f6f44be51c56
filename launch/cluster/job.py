"""`python -m launch.job begin` and `end`, which a job script calls before and after its training step.

`begin [words]` settles which run this is (frozen by `shardtune submit`, or composed here from the words of
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
from launch.config.process_role import port
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
LAUNCHER_WORDS = ("name", "processes", "nodes", "rdzv", "retry", "preflight", "code", "stage")
"""Settings of the launcher that slurm/train.sbatch takes as words; the others would be lost."""
PARTS = ("launcher", "run", "model", "data")
PORTS_TRIED = 50
"""How many ports are tried, one after another."""


@dataclass(frozen=True, slots=True)
class FrozenRun:
    """What of a frozen configuration a job script needs to know."""

    directory: Path
    tree: dict[str, Any]
    """Its parts (`PARTS`), as the file has them."""

    @classmethod
    def read(cls, directory: Path) -> FrozenRun:
        """Read without torch; whether the file is as it was frozen is the ranks' to see. Errors: ConfigError."""
        path = directory / "config.yaml"
        tree = read_tree(path)
        try:
            run = cls(directory, {part: dict(tree[part]) for part in PARTS})
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{path}: not a configuration of this version ({' '.join(str(error).split())})"
            ) from error
        return run

    @property
    def processes(self) -> int:
        """Ranks of each node."""
        return ranks_per_node(self.tree["launcher"])

    @property
    def threads(self) -> int:
        """CPU threads of a rank: `run.threads`, or OMP_NUM_THREADS, or the node's cores divided by its ranks."""
        configured = self.tree["run"]["threads"]
        if configured:
            return configured
        omp_threads = os.environ.get("OMP_NUM_THREADS", "")
        if omp_threads.isdecimal():
            return int(omp_threads)
        cores = int(os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or 1)
        return max(1, cores // self.processes)


def begin(words: list[str]) -> dict[str, Any]:
    """Settle everything before the training step; returns the variables that the job script sets.

    Errors: ConfigError, StorageError, ShardtuneError.
    """
    job = JobStart.here()
    refuse_heterogeneous(os.environ)
    run = frozen_run(words, job)
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
    if words:  # `shardtune submit` has copied the code, and its scripts start from the copy
        shell_variables["code"] = code_copy(run, job)
    snapshot.refuse_changed()
    launcher = run.tree["launcher"]
    containers.refuse_missing(launcher)
    refuse_lost_starts(run, job, logs)
    refuse_in_use(run.directory, run.tree["run"]["lease_s"])
    if words:  # the script for people; `submit` has left it for its own
        note_submitted([run.directory], job.name)
    record_job_start(run.directory, job.name, job.restart, os.environ.get("SLURM_JOB_NODELIST", ""))
    report_idle_gpus(run.processes, os.environ)
    for cause, times in launcher["retry"].items():
        shell_variables[f"retry_{cause}"] = times
    shell_variables |= {"processes": run.processes, "threads": run.threads, "silent": os.environ.get(SILENT, "")}
    master = rendezvous(job, os.environ.get("SHARDTUNE_RDZV") or launcher["rdzv"])
    if len(job.nodes) > 1 and launcher.get("preflight", "none") != "none":
        preflight(run, job, master)
    return {**shell_variables, "rendezvous": master}


def refuse_lost_starts(run: FrozenRun, job: JobStart, logs: Path) -> None:
    """Refuse a start after more starts were lost than `launcher.retry` allows. Errors: ShardtuneError, StorageError.

    A start that says it runs, and has ended, was lost with its node or killed unsaved. SLURM requeues such a job by itself.
    """
    if not job.restart:
        return
    status = read_status(run.directory)
    if status.get("state") != State.running or status.get("job") != job.id:
        return
    limit = run.tree["launcher"]["retry"].get("node_fail", 0)
    if not count_lost_start(logs, job, limit):
        raise ShardtuneError(
            f"job {job.name}: more than {limit} starts ended without a word (node lost, or killed unsaved); "
            "not started again"
        )


def refuse_heterogeneous(env: Mapping[str, str]) -> None:
    """Refuse a job of several unlike parts, of which this script would train on the first alone. Errors: ConfigError."""
    parts = env.get("SLURM_HET_SIZE", "")
    if parts.isdecimal() and int(parts) > 1:
        raise ConfigError(
            f"SLURM_HET_SIZE={parts}: a heterogeneous job trains on its first part alone, and the nodes of the others would "
            "stay idle; submit a job of nodes that are alike"
        )


def report_idle_gpus(processes: int, env: Mapping[str, str]) -> None:
    """Say how many GPUs of this node no rank uses; SLURM tells how many the job was given."""
    gpus = env.get("SLURM_GPUS_ON_NODE", "")
    if gpus.isdecimal() and int(gpus) > processes:
        print(
            f"{int(gpus) - processes} of {gpus} GPUs stay idle on each node: the run has {processes} ranks a node "
            "(launcher.processes)",
            file=sys.stderr,
        )


def code_copy(run: FrozenRun, job: JobStart) -> Path | str:
    """The code of a run by slurm/train.sbatch: a copy, which the first start of its job makes; empty for the clone itself."""
    if run.tree["launcher"].get("code") != "snapshot":
        return ""
    copy = snapshot.newest_copy(run.directory) if job.restart else None
    if copy is None:
        return snapshot.copy_code(run.directory)
    snapshot.refuse_changed(copy)
    return copy


def preflight(run: FrozenRun, job: JobStart, master: str) -> None:
    """Check all nodes before the ranks are started. Raises NodesUnfit with every problem, StorageError.

    `master`: host:port at which the ranks will meet; the check uses it too.
    """
    from launch.cluster.preflight.answer import text
    from launch.cluster.preflight.coordinator import commands_by_srun, preflight_request, run_preflight

    request = preflight_request(run.tree, len(job.nodes))
    request.master = master
    srun_options, prefix = containers.launch_words(run.tree, [ROOT, run.directory])
    python = os.environ.get("SHARDTUNE_PYTHON") or sys.executable
    if containers.runtime_of(run.tree["launcher"]):
        python = run.tree["launcher"].get("python") or "python3"
    commands = commands_by_srun(len(job.nodes), python, srun_options, prefix=prefix)
    reports, verdict = run_preflight(request, commands, job.nodes)
    print(text(request, reports, verdict), flush=True)
    if verdict.problems:
        raise NodesUnfit(
            f"job {job.name}: not started: {verdict.problems[0]}. Fix the node, or exclude it (sbatch --exclude=<node>); "
            "launcher.preflight=none skips this check"
        )


def frozen_run(words: list[str], job: JobStart) -> FrozenRun:
    """The run that was frozen for this job, or the one that the words describe, which is frozen now. Errors: ConfigError."""
    frozen = os.environ.get("SHARDTUNE_CONFIG")
    if frozen and not words:
        return FrozenRun.read(Path(frozen).parent)
    from launch.config.compose import compose
    from launch.runs.freeze import freeze

    if problems := misplaced_words(words):
        raise ConfigError(problems)
    composed = compose([*words_of_job(job), *words])
    if composed.config.launcher.nodes != len(job.nodes):
        raise ConfigError(
            f"launcher.nodes={composed.config.launcher.nodes}: the job has {len(job.nodes)}; give sbatch --nodes and leave it out"
        )
    return FrozenRun.read(freeze(composed, Path(composed.config.run.dir or ""), may_change_strategy=True))


def misplaced_words(words: list[str]) -> list[str]:
    """Why slurm/train.sbatch cannot take some of these words: SLURM has decided them already, or the script itself does."""
    problems = []
    for word in words:
        key, _, value = word.partition("=")
        group, _, leaf = key.partition(".")
        if group != "launcher":
            continue
        is_taken = leaf in LAUNCHER_WORDS if leaf else value == "slurm"
        if not is_taken:
            problems.append(f"{word}: {SCRIPT_DECIDES if leaf in ('', 'setup', 'python') else SBATCH_DECIDES}")
    return problems


def words_of_job(job: JobStart) -> list[str]:
    """Settings that a run by slurm/train.sbatch takes from its job and from the environment of the script."""
    from trainer.config.run import SlurmConfig

    env = os.environ
    retries = []
    for cause, times in SlurmConfig().retry.items():
        retries.append(f"{cause}:{env.get(f'RETRY_{cause.upper()}') or times}")
    return [
        f"run.dir=runs/slurm-{job.id}",
        "launcher=slurm",
        f"launcher.nodes={len(job.nodes)}",
        f"launcher.retry={{{','.join(retries)}}}",
        f"launcher.processes={env.get('PROCESSES') or env.get('SLURM_GPUS_ON_NODE') or 1}",
    ]


def rendezvous(job: JobStart, address: str | None) -> str:
    """host:port on the first node, where nobody listens as far as can be seen from here. Raises ConfigError.

    Every start derives it anew: a requeued job may be given other nodes, and two jobs may share a node.
    """
    if address:
        host, _, own_port = address.rpartition(":")
        if host.split(".")[0] == socket.gethostname().split(".")[0] and not _is_port_free(int(own_port)):
            raise ConfigError(
                f"launcher.rdzv={address}: another process listens there; choose another port, or leave it out"
            )
        return address
    first = port(os.environ)
    for offset in range(PORTS_TRIED):
        number = 20000 + (first - 20000 + offset) % 10000  # from `first` on, within 20000 to 29999
        if _is_port_free(number):
            return f"{job.nodes[0]}:{number}"
    raise ConfigError(
        f"{job.nodes[0]}: no free port from {first} on, {PORTS_TRIED} were tried; choose one with launcher.rdzv=host:port"
    )


def _is_port_free(number: int) -> bool:
    """Whether nobody listens at a port of this host, which is the job's first."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        with socket.create_server(("", number), family=family, dualstack_ipv6=family == socket.AF_INET6):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def _stdout_is_stderr() -> Iterator[int]:
    """Print everything to stderr meanwhile; yields the descriptor of the real stdout, which the shell evaluates."""
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
    """`begin [words]`, `end <code of the step> <1 after TERM, else empty>`, `part <part> <run> <ranks>`. Errors: ConfigError."""
    if argv[:1] == ["part"] and len(argv) == 4:
        snapshot.refuse_changed()
        return pipeline_part.run_part(argv[1], Path(argv[2]), int(argv[3]))
    # Three words by scripts that were written before signals were kept from the first line on.
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
    """Leave in the directory of a frozen run why its job ended before a rank was started."""
    config = os.environ.get("SHARDTUNE_CONFIG")
    name = job_name()
    if not config or name is None or not Path(config).is_file():
        return
    restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    reason = " ".join(str(error).split())
    with contextlib.suppress(StorageError):
        record_job_end(Path(config).parent, name, restart, error.exit_code, reason=reason, will_restart=False)
