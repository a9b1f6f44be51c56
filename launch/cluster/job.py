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
from launch.cluster.job_end import JobStart, end, job_name, lost
from launch.config.process_role import port
from launch.runs.job_record import note_begun, note_ended
from launch.runs.queue import note_submitted
from strategies.errors import ConfigError, NodesUnfit, ShardtuneError, StorageError
from trainer.config.sbatch_options import ranks_per_node
from trainer.reporting.code_revision import ROOT
from trainer.reporting.settings_file import read_tree
from trainer.reporting.status import State, read_status
from trainer.session.lease import SILENT, refuse_in_use

FOR_SBATCH = (
    "is asked of SLURM when a job is submitted; give it to sbatch before the script's name, or use shardtune submit"
)
IN_THE_SCRIPT = "is the script's own: change slurm/train.sbatch or slurm/env.sh, or use shardtune submit"
TAKEN = ("name", "processes", "nodes", "rdzv", "retry", "preflight", "code", "stage")
"""Settings of the launcher that slurm/train.sbatch takes as words; the others would be lost."""
PARTS = ("launcher", "run", "model", "data")
PORTS = 50
"""How many ports are tried, one after another."""


@dataclass(frozen=True, slots=True)
class FrozenRun:
    """What of a frozen configuration a job script needs to know."""

    directory: Path
    tree: dict[str, Any]
    """Its parts (`PARTS`), as the file has them."""

    @classmethod
    def frozen(cls, directory: Path) -> FrozenRun:
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
        """CPU threads of a rank: as the run says, or the environment, or the node's cores divided."""
        told = os.environ.get("OMP_NUM_THREADS", "")
        cores = int(os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or 1)
        return self.tree["run"]["threads"] or (int(told) if told.isdecimal() else max(1, cores // self.processes))


def begin(words: list[str]) -> dict[str, Any]:
    """Everything that is settled before the step; what the shell is told. Errors: ConfigError, StorageError, ShardtuneError."""
    job = JobStart.here()
    refuse_heterogeneous(os.environ)
    run = run_of(words, job)
    logs = run.directory / "logs"
    told: dict[str, Any] = {"run_dir": run.directory, "logs": logs, "job": job.name, "start": job.restart}
    told |= {"finished": "", "code": ""}
    if read_status(run.directory).get("state") == State.done:
        print(f"{run.directory}: already finished with this configuration; nothing to do")
        pipeline_part.ended("train", run.directory, 0)
        note_ended(run.directory, job.name, job.restart, 0, reason="already finished", goes_on=False)
        return {**told, "finished": 1}
    logs.mkdir(parents=True, exist_ok=True)
    told["code"] = code_of(run, job) if words else ""
    snapshot.check()
    containers.refuse_missing(run.tree["launcher"])
    retry = run.tree["launcher"]["retry"]
    status = read_status(run.directory)
    # A start that ended without a word was lost with its node or killed unsaved; SLURM has requeued the job by itself.
    unsaid = status.get("state") == State.running and status.get("job") == job.id
    if job.restart and unsaid and not lost(logs, job, retry.get("node_fail", 0)):
        raise ShardtuneError(
            f"job {job.name}: more than {retry.get('node_fail', 0)} starts ended without a word (node lost, or killed unsaved); "
            "not started again"
        )
    refuse_in_use(run.directory, run.tree["run"]["lease_s"])
    if words:  # the script for people; `submit` has left it for its own
        note_submitted([run.directory], job.name)
    note_begun(run.directory, job.name, job.restart, os.environ.get("SLURM_JOB_NODELIST", ""))
    tell_idle_gpus(run.processes, os.environ)
    told |= {f"retry_{cause}": times for cause, times in retry.items()}
    told |= {"processes": run.processes, "threads": run.threads, "silent": os.environ.get(SILENT, "")}
    meeting = rendezvous(job, os.environ.get("SHARDTUNE_RDZV") or run.tree["launcher"]["rdzv"])
    if len(job.nodes) > 1 and run.tree["launcher"].get("preflight", "none") != "none":
        preflight(run, job, meeting)
    return {**told, "rendezvous": meeting}


def refuse_heterogeneous(env: Mapping[str, str]) -> None:
    """Refuse a job of several unlike parts, of which this script would train on the first alone. Errors: ConfigError."""
    parts = env.get("SLURM_HET_SIZE", "")
    if parts.isdecimal() and int(parts) > 1:
        raise ConfigError(
            f"SLURM_HET_SIZE={parts}: a heterogeneous job trains on its first part alone, and the nodes of the others would "
            "stay idle; submit a job of nodes that are alike"
        )


def tell_idle_gpus(processes: int, env: Mapping[str, str]) -> None:
    """Say how many GPUs of this node no rank uses; SLURM tells how many the job was given."""
    gpus = env.get("SLURM_GPUS_ON_NODE", "")
    if gpus.isdecimal() and int(gpus) > processes:
        print(
            f"{int(gpus) - processes} of {gpus} GPUs stay idle on each node: the run has {processes} ranks a node "
            "(launcher.processes)",
            file=sys.stderr,
        )


def code_of(run: FrozenRun, job: JobStart) -> Path | str:
    """The code of a run by slurm/train.sbatch: a copy that its job's first start makes; nothing for the clone itself."""
    if run.tree["launcher"].get("code") != "snapshot":
        return ""
    made = snapshot.taken(run.directory) if job.restart else None
    if made is not None:
        snapshot.check(made)
    return made or snapshot.take(run.directory)


def preflight(run: FrozenRun, job: JobStart, meeting: str) -> None:
    """Ask all nodes before the ranks are started. Raises NodesUnfit with every problem, StorageError."""
    from launch.cluster.preflight.answer import text
    from launch.cluster.preflight.coordinator import ask, asked_of, by_srun

    asked = asked_of(run.tree, len(job.nodes))
    asked.master = meeting
    step, before = containers.words(run.tree, [ROOT, run.directory])
    python = os.environ.get("SHARDTUNE_PYTHON") or sys.executable
    if containers.way_of(run.tree["launcher"]):
        python = run.tree["launcher"].get("python") or "python3"
    heard, verdict = ask(asked, by_srun(len(job.nodes), python, step, before=before), job.nodes)
    print(text(asked, heard, verdict), flush=True)
    if verdict.problems:
        raise NodesUnfit(
            f"job {job.name}: not started: {verdict.problems[0]}. Mend the node, or leave it out (sbatch --exclude=<node>); "
            "launcher.preflight=none starts without asking"
        )


def run_of(words: list[str], job: JobStart) -> FrozenRun:
    """The run that was frozen for this job, or the one that the words describe, which is frozen now. Errors: ConfigError."""
    frozen = os.environ.get("SHARDTUNE_CONFIG")
    if frozen and not words:
        return FrozenRun.frozen(Path(frozen).parent)
    from launch.config.compose import compose
    from launch.runs.freeze import freeze
    from trainer.config.run import SlurmConfig

    problems = []
    for word in words:
        key, _, value = word.partition("=")
        group, _, leaf = key.partition(".")
        if group == "launcher" and (leaf not in TAKEN if leaf else value != "slurm"):
            problems.append(f"{word}: {IN_THE_SCRIPT if leaf in ('', 'setup', 'python') else FOR_SBATCH}")
    if problems:
        raise ConfigError(problems)
    env = os.environ
    often = [f"{cause}:{env.get(f'RETRY_{cause.upper()}') or times}" for cause, times in SlurmConfig().retry.items()]
    retry = f"{{{','.join(often)}}}"
    own = [f"run.dir=runs/slurm-{job.id}", "launcher=slurm", f"launcher.nodes={len(job.nodes)}"]
    own.append(f"launcher.retry={retry}")
    own.append(f"launcher.processes={env.get('PROCESSES') or env.get('SLURM_GPUS_ON_NODE') or 1}")
    composed = compose([*own, *words])
    if composed.config.launcher.nodes != len(job.nodes):
        raise ConfigError(
            f"launcher.nodes={composed.config.launcher.nodes}: the job has {len(job.nodes)}; give sbatch --nodes and leave it out"
        )
    return FrozenRun.frozen(freeze(composed, Path(composed.config.run.dir or ""), another_way=True))


def rendezvous(job: JobStart, asked: str | None) -> str:
    """host:port on the first node, where nobody listens as far as can be seen from here. Raises ConfigError.

    Every start derives it anew: a requeued job may be given other nodes, and two jobs may share a node.
    """
    if asked:
        host, _, number = asked.rpartition(":")
        if host.split(".")[0] == socket.gethostname().split(".")[0] and not _free(int(number)):
            raise ConfigError(
                f"launcher.rdzv={asked}: another process listens there; choose another port, or leave it out"
            )
        return asked
    first = port(os.environ)
    ports = (20000 + (first - 20000 + number) % 10000 for number in range(PORTS))
    free = next((number for number in ports if _free(number)), None)
    if free is None:
        raise ConfigError(
            f"{job.nodes[0]}: no free port from {first} on, {PORTS} were tried; choose one with launcher.rdzv=host:port"
        )
    return f"{job.nodes[0]}:{free}"


def _free(number: int) -> bool:
    """Whether nobody listens at a port of this host, which is the job's first."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        with socket.create_server(("", number), family=family, dualstack_ipv6=family == socket.AF_INET6):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def _stdout_is_stderr() -> Iterator[int]:
    """Whatever is printed meanwhile goes to stderr; the descriptor of the real stdout, which the shell reads."""
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield real
    finally:
        os.dup2(real, 1)
        os.close(real)


def main(argv: list[str]) -> int:
    """`begin [words]`, `end <code of the step> <1 after TERM, else empty>`, `part <part> <run> <ranks>`. Errors: ConfigError."""
    if argv[:1] == ["part"] and len(argv) == 4:
        snapshot.check()
        return pipeline_part.run_part(argv[1], Path(argv[2]), int(argv[3]))
    # Three words by scripts that were written before signals were kept from the first line on.
    if argv[:1] == ["end"] and len(argv) in (3, 4) and argv[1].isdecimal():
        return end(int(argv[1]), bool(argv[2]), unstarted=argv[3:] == ["1"])
    if argv[:1] != ["begin"]:
        raise ConfigError("this is for job scripts: begin [words], or end <code> <stopped> [<unstarted>]")
    with _stdout_is_stderr() as real:
        try:
            told = begin(argv[1:])
        except ShardtuneError as error:
            note_refused(error)
            raise
        lines = "".join(f"{key}={shlex.quote(str(value))}\n" for key, value in told.items())
        os.write(real, lines.encode())
    return 0


def note_refused(error: ShardtuneError) -> None:
    """Leave in the directory of a frozen run why its job ended before a rank was started."""
    config = os.environ.get("SHARDTUNE_CONFIG")
    name = job_name()
    if not config or name is None or not Path(config).is_file():
        return
    restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    reason = " ".join(str(error).split())
    with contextlib.suppress(StorageError):
        note_ended(Path(config).parent, name, restart, error.exit_code, reason=reason, goes_on=False)
