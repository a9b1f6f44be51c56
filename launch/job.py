"""What a job script asks of Python: `begin` before its step is started, `end` after that has ended.

`begin [words]` settles which run this is (frozen by `shardtune submit`, or composed here from the words of slurm/train.sbatch),
whether it may start, and where its ranks meet; it prints lines for the shell, and everything else to stderr. `end` requeues a run
that saved and wants to go on, or lost a rank. What an earlier start left is told apart by the job's id and the number of its
start, never by a clock.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.slurm_env import port
from strategies.errors import ConfigError, NodesUnfit, ShardtuneError, StorageError
from trainer.records.lease import SILENT, refuse_in_use
from trainer.records.settings_file import read_tree
from trainer.records.status import State, read_failure, read_status, restart_count

FOR_SBATCH = (
    "is asked of SLURM when a job is submitted; give it to sbatch before the script's name, or use shardtune submit"
)
IN_THE_SCRIPT = "is the script's own: change slurm/train.sbatch or slurm/env.sh, or use shardtune submit"
TAKEN = ("name", "processes", "nodes", "rdzv", "retry", "preflight")
"""Settings of the launcher that slurm/train.sbatch takes as words; the others would be lost."""
PARTS = ("launcher", "run", "model", "data")
PORTS = 50
"""How many ports are tried, one after another."""


@dataclass(frozen=True, slots=True)
class Job:
    """This start of this job."""

    name: str
    """As scontrol takes it; in an array a bare job id can mean all its tasks."""
    id: str
    restart: int
    nodes: list[str] = field(default_factory=list)
    """Its hosts, in SLURM's order."""

    @classmethod
    def here(cls) -> Job:
        """The job of this process. Raises ConfigError outside a job."""
        env = os.environ
        if "SLURM_JOB_ID" not in env:
            raise ConfigError("SLURM_JOB_ID: not set; this is for job scripts of SLURM")
        array = env.get("SLURM_ARRAY_JOB_ID")
        name = f"{array}_{env.get('SLURM_ARRAY_TASK_ID')}" if array else env["SLURM_JOB_ID"]
        return cls(name, env["SLURM_JOB_ID"], int(env.get("SLURM_RESTART_COUNT") or 0), hosts_of_job())

    def wrote(self, record: dict[str, Any]) -> bool:
        """Whether a record is of this start."""
        return (record.get("job"), record.get("restart")) == (self.id, restart_count())


@dataclass(frozen=True, slots=True)
class Run:
    """What of a frozen configuration a job script needs to know."""

    directory: Path
    tree: dict[str, Any]
    """Its parts (`PARTS`), as the file has them."""

    @classmethod
    def frozen(cls, directory: Path) -> Run:
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
        launcher = self.tree["launcher"]
        return launcher["processes"] or launcher.get("gpus_per_node") or 1

    @property
    def threads(self) -> int:
        """CPU threads of a rank: as the run says, or the environment, or the node's cores divided."""
        told = os.environ.get("OMP_NUM_THREADS", "")
        cores = int(os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or 1)
        return self.tree["run"]["threads"] or (int(told) if told.isdecimal() else max(1, cores // self.processes))


def begin(words: list[str]) -> dict[str, Any]:
    """Everything that is settled before the step; what the shell is told. Errors: ConfigError, StorageError, ShardtuneError."""
    job = Job.here()
    run = run_of(words, job)
    logs = run.directory / "logs"
    told = {"run_dir": run.directory, "logs": logs, "job": job.name, "start": job.restart, "finished": ""}
    if read_status(run.directory).get("state") == State.done:
        print(f"{run.directory}: already finished with this configuration; nothing to do")
        return {**told, "finished": 1}
    logs.mkdir(parents=True, exist_ok=True)
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
    told |= {f"retry_{cause}": retry.get(cause, 0) for cause in ("preempted", "node_fail")}
    told |= {"processes": run.processes, "threads": run.threads, "silent": os.environ.get(SILENT, "")}
    meeting = rendezvous(job, os.environ.get("SHARDTUNE_RDZV") or run.tree["launcher"]["rdzv"])
    if len(job.nodes) > 1 and run.tree["launcher"].get("preflight", "none") != "none":
        preflight(run, job, meeting)
    return {**told, "rendezvous": meeting}


def preflight(run: Run, job: Job, meeting: str) -> None:
    """Ask all nodes before the ranks are started. Raises NodesUnfit with every problem, StorageError."""
    from launch.preflight_answer import text
    from launch.preflight_ask import ask, asked_of, by_srun

    asked = asked_of(run.tree, len(job.nodes))
    asked.master = meeting
    heard, verdict = ask(
        asked, by_srun(len(job.nodes), os.environ.get("SHARDTUNE_PYTHON") or sys.executable, []), job.nodes
    )
    print(text(asked, heard, verdict), flush=True)
    if verdict.problems:
        raise NodesUnfit(
            f"job {job.name}: not started: {verdict.problems[0]}. Mend the node, or leave it out (sbatch --exclude=<node>); "
            "launcher.preflight=none starts without asking"
        )


def run_of(words: list[str], job: Job) -> Run:
    """The run that was frozen for this job, or the one that the words describe, which is frozen now. Errors: ConfigError."""
    frozen = os.environ.get("SHARDTUNE_CONFIG")
    if frozen and not words:
        return Run.frozen(Path(frozen).parent)
    from launch.compose import compose, freeze

    problems = []
    for word in words:
        key, _, value = word.partition("=")
        group, _, leaf = key.partition(".")
        if group == "launcher" and (leaf not in TAKEN if leaf else value != "slurm"):
            problems.append(f"{word}: {IN_THE_SCRIPT if leaf in ('', 'setup', 'python') else FOR_SBATCH}")
    if problems:
        raise ConfigError(problems)
    env = os.environ
    retry = f"{{preempted:{env.get('RETRY_PREEMPTED') or 20},node_fail:{env.get('RETRY_NODE_FAIL') or 3}}}"
    own = [f"run.dir=runs/slurm-{job.id}", "launcher=slurm", f"launcher.nodes={len(job.nodes)}"]
    own.append(f"launcher.retry={retry}")
    own.append(f"launcher.processes={env.get('PROCESSES') or env.get('SLURM_GPUS_ON_NODE') or 1}")
    composed = compose([*own, *words])
    if composed.config.launcher.nodes != len(job.nodes):
        raise ConfigError(
            f"launcher.nodes={composed.config.launcher.nodes}: the job has {len(job.nodes)}; give sbatch --nodes and leave it out"
        )
    return Run.frozen(freeze(composed, Path(composed.config.run.dir or "")))


def lost(logs: Path, job: Job, limit: int) -> bool:
    """Count one more start whose rank or node was lost; whether there may be another. Errors: StorageError."""
    count = logs / f"lost-{job.name}"
    try:
        with count.open("a") as file:
            file.write(f"{job.restart}\n")
        return len(count.read_text().splitlines()) <= limit
    except OSError as error:
        raise StorageError(f"{count}: cannot be written ({error.strerror or error}); free space") from error


def rendezvous(job: Job, asked: str | None) -> str:
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


def hosts_of_job() -> list[str]:
    """The job's hosts, in the order in which SLURM numbers them. Raises ConfigError."""
    listed = os.environ.get("SLURM_JOB_NODELIST", "")
    try:
        command = ["scontrol", "show", "hostnames", listed]
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"SLURM_JOB_NODELIST={listed}: scontrol cannot tell its hosts ({error})") from error
    if not found:
        raise ConfigError(f"SLURM_JOB_NODELIST={listed}: scontrol names no host")
    return found


def end(code: int, stopped: bool) -> int:
    """Requeue where the run wants it and may; the job's exit code. `stopped`: whether TERM came to the script."""
    job, run_dir = Job.here(), Path(os.environ["SHARDTUNE_RUN_DIR"])
    status, failure = read_status(run_dir), read_failure(run_dir)
    limits = {cause: int(os.environ.get(f"retry_{cause}") or 0) for cause in ("preempted", "node_fail")}
    if job.wrote(status) and status.get("state") == State.preempted:
        if _by_slurm(job, stopped):
            print(f"job {job.name}: stopped by SLURM or by scancel, state saved; not requeued from here")
        elif job.restart >= limits["preempted"]:
            print(
                f"job {job.name}: state saved; not requeued, since it restarted {job.restart} times already "
                f"(limit {limits['preempted']})"
            )
            return 75
        else:
            _requeue(job, "state saved")
    elif job.wrote(failure) and failure.get("retry") == "node_fail":  # never after an error of the run itself
        if _by_slurm(job, stopped):
            print(f"job {job.name}: stopped by SLURM or by scancel, and a rank was lost; not requeued from here")
        elif lost(run_dir / "logs", job, limits["node_fail"]):
            _requeue(job, "a rank was lost")
        else:
            print(
                f"job {job.name}: a rank was lost; not requeued, since that happened more than {limits['node_fail']} times"
            )
    return code


def _by_slurm(job: Job, stopped: bool) -> bool:
    """Whether SLURM ends the job, or requeues it by itself: asking for it as well would run it once too often."""
    if stopped:
        return True
    shown = subprocess.run(["scontrol", "show", "job", job.name], capture_output=True, text=True).stdout
    return any(word.startswith("PreemptTime=") and word[12:13].isdigit() for word in shown.split())


def _requeue(job: Job, why: str) -> None:
    print(f"job {job.name}: {why}; requeued", flush=True)
    done = subprocess.run(["scontrol", "requeue", job.name], capture_output=True, text=True)
    if done.returncode:
        print(f"job {job.name}: scontrol requeue failed: {(done.stderr or done.stdout).strip()}", flush=True)


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
    """`begin [words]` or `end <exit code of the step> <1 after TERM, else empty>`; returns the exit code. Errors: ConfigError."""
    if argv[:1] == ["end"] and len(argv) == 3 and argv[1].isdecimal():
        return end(int(argv[1]), bool(argv[2]))
    if argv[:1] != ["begin"]:
        raise ConfigError("this is for job scripts: begin [words], or end <code> <stopped>")
    with _stdout_is_stderr() as real:
        told = begin(argv[1:])
        lines = "".join(f"{key}={shlex.quote(str(value))}\n" for key, value in told.items())
        os.write(real, lines.encode())
    return 0


if __name__ == "__main__":
    from launch.main import guarded

    sys.exit(guarded("job", sys.argv[1:]))
