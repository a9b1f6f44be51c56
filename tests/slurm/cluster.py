"""A real SLURM on this one machine: a head ("ctl") and N nodes, each in namespaces of its own.

A node has its own host name, address, process table, /dev/shm and /run; all nodes see the same disk, like a shared file
system. Nothing outside the namespaces changes: no address, no file below /etc. Killing a node's first process ends
everything in it, and the first process dies with this one, so nothing can be left behind.
Needs root on Debian with CAP_SYS_ADMIN and CAP_NET_ADMIN; installs SLURM's packages when they are missing.
"""

import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.helpers import speed

NET = "10.213.0"  # exists only inside the namespaces
PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
}
POLICY = Path("/usr/sbin/policy-rc.d")  # exit code 101 keeps packages from starting services at their installation

CONF = """\
ClusterName=test
SlurmctldHost=ctl
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# also how long a requeued job waits before it starts again
AuthInfo=cred_expire=5
# no cgroups: plain process tracking, no pinning
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
StateSaveLocation=/var/lib/slurm/slurmctld
SlurmdSpoolDir=/var/lib/slurm/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdLogFile=/var/log/slurm/slurmd-%h.log
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=2,sched_interval=5
MessageTimeout=5
KillWait=5
MinJobAge=3600
ReturnToService=2
JobRequeue=1
# partition "high" evicts jobs of "main": TERM at once, the rest after GraceTime
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={nodes} CPUs=4 Boards=1 SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""

# First process of a node: makes its view of the machine, then reaps orphans. $1: the cluster's directory, $2: its name.
NODE = """\
set -e
dir=$1 name=$2 own=$1/$2
mount --make-rprivate /
mount -t proc proc /proc
hostname "$name"
mkdir -p /etc/slurm /var/log/slurm /var/lib/slurm/slurmctld /var/lib/slurm/slurmd "$own/run/munge" "$own/spool"
mount --bind "$dir/ctl/run/munge" "$own/run/munge"
mount --rbind "$own/run" /run
mount --bind "$dir/etc" /etc/slurm
mount --bind "$dir/etc/hosts" /etc/hosts
mount --bind "$dir/log" /var/log/slurm
mount --bind "$dir/state" /var/lib/slurm/slurmctld
mount --bind "$own/spool" /var/lib/slurm/slurmd
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
ip link set lo up
: >"$own/ready"
while :; do sleep 3600 & wait $! || true; done
"""


class Unavailable(Exception):
    """This machine cannot host the cluster; the message says why."""


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Poll `condition` until it is true; TimeoutError that names `what` after `seconds`, scaled to the machine."""
    end = time.monotonic() + speed.seconds(seconds)
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(0.05)


def provide() -> None:
    """Install what is missing and probe the rights; raises Unavailable with the reason."""
    if os.geteuid() != 0:
        raise Unavailable("a local SLURM needs root")
    missing = [package for binary, package in PACKAGES.items() if shutil.which(binary) is None]
    if missing:
        if shutil.which("apt-get") is None or not Path("/etc/debian_version").exists():
            raise Unavailable(f"a local SLURM needs Debian, or these programs installed: {' '.join(PACKAGES)}")
        own_policy = not POLICY.exists()
        if own_policy:
            POLICY.write_text("#!/bin/sh\nexit 101\n")
            POLICY.chmod(0o755)
        try:
            env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
            install = f"apt-get update -qq && apt-get install -y -qq --no-install-recommends {' '.join(missing)}"
            done = subprocess.run(
                ["sh", "-c", install], env=env, capture_output=True, text=True, timeout=speed.seconds(300)
            )
        finally:
            if own_policy:
                POLICY.unlink()
        if done.returncode:
            raise Unavailable(f"apt-get could not install {' '.join(missing)}: {done.stderr.strip()[-500:]}")
    probe = "mount --make-rprivate / && mount -t proc proc /proc && ip link add name veth0 type veth peer name veth1"
    done = subprocess.run(
        ["unshare", "--mount", "--uts", "--net", "--ipc", "--pid", "--fork", "sh", "-c", probe],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise Unavailable(f"a local SLURM needs CAP_SYS_ADMIN and CAP_NET_ADMIN: {done.stderr.strip()}")


class Cluster:
    """Up after construction, down after `close`. `dir` must not lie below /run, /proc or /dev."""

    def __init__(self, dir: Path, num_nodes: int = 2) -> None:
        self.dir = dir
        # n9 and n10: in the order of their names the second would be the first.
        self.nodes = [f"n{i}" for i in range(9, 9 + num_nodes)]
        self.holders: dict[str, subprocess.Popen[bytes]] = {}
        self.pids: dict[str, int] = {}
        try:
            self._write_files()
            for index, name in enumerate(["ctl", *self.nodes]):
                self._start_node(name, index)
            self._start_daemons()
        except BaseException:
            self.close()
            raise

    def _write_files(self) -> None:
        for part in ("etc", "log", "state", "ctl/run/munge"):
            (self.dir / part).mkdir(parents=True)
        etc = self.dir / "etc"
        hosts = [f"{NET}.254 ctl"] + [f"{NET}.{i} {n}" for i, n in enumerate(self.nodes, 1)]
        (etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts]) + "\n")
        (etc / "slurm.conf").write_text(CONF.format(nodes=",".join(self.nodes)))
        (etc / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        (etc / "munge.key").write_bytes(secrets.token_bytes(1024))
        (etc / "munge.key").chmod(0o600)

    def _start_node(self, name: str, index: int) -> None:
        (self.dir / name).mkdir(exist_ok=True)
        log = (self.dir / name / "init.log").open("wb")
        namespaces = ["--mount", "--uts", "--net", "--ipc", "--pid", "--fork", "--kill-child"]
        holder = subprocess.Popen(
            ["setpriv", "--pdeathsig=KILL", "unshare", *namespaces, "bash", "-c", NODE, "node", str(self.dir), name],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        self.holders[name] = holder
        wait_for((self.dir / name / "ready").exists, 10, f"namespaces of {name}, see {log.name}")
        self.pids[name] = int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()[0])
        if name == "ctl":
            self.on(
                "ctl", "sh", "-ec", f"ip link add br0 type bridge; ip addr add {NET}.254/24 dev br0; ip link set br0 up"
            )
            return
        # The bridge lives in the head's namespace. A fixed hardware address keeps neighbours' tables right.
        mac = f"02:00:0a:d5:00:{index:02x}"
        plug = f"ip link add v{name} type veth peer name eth0 address {mac} netns {self.pids[name]}"
        outside = ["nsenter", "-t", str(self.pids["ctl"]), "-n", "sh", "-ec"]
        subprocess.run([*outside, f"{plug}; ip link set v{name} master br0 up"], check=True)
        self.on(name, "sh", "-ec", f"ip addr add {NET}.{index}/24 dev eth0; ip link set eth0 up")

    def _start_daemons(self) -> None:
        # One munged serves all nodes: they share its socket.
        munged = "munged --force --num-threads=2 --key-file=/etc/slurm/munge.key --socket=/run/munge/munge.socket.2"
        files = "--pid-file=/run/munged.pid --log-file=/var/log/slurm/munged.log --seed-file=/run/munged.seed"
        self.on("ctl", "sh", "-c", f"{munged} {files}")
        self.on("ctl", "slurmctld")
        wait_for(lambda: "is UP" in self.on("ctl", "scontrol", "ping", check=False).stdout, 20, "slurmctld")
        for name in self.nodes:
            self.on(name, "slurmd")
        wait_for(
            lambda: (
                self.on("ctl", "sinfo", "-h", "-N", "-t", "idle", "-p", "main").stdout.count("\n") == len(self.nodes)
            ),
            30,
            "idle nodes",
        )

    def on(
        self, node: str, *command: str, check: bool = True, cwd: Path | str = "/", env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a node ("ctl" is the login node); a failure raises RuntimeError with its output."""
        enter = ["nsenter", "-t", str(self.pids[node]), "-m", "-u", "-n", "-i", "-p", f"--wdns={cwd}", "--"]
        output = self.dir / node / f"command-{time.monotonic_ns()}"  # a file: daemons would keep a pipe open
        with output.open("w+") as out:
            done = subprocess.run(
                [*enter, *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=env,
                timeout=speed.seconds(300),
            )
        text = output.read_text()
        output.unlink()
        if check and done.returncode:
            raise RuntimeError(f"{node}: {' '.join(command)} ended with {done.returncode}:\n{text}")
        return subprocess.CompletedProcess(command, done.returncode, text, "")

    def sbatch(self, *words: str, cwd: Path, env: dict[str, str] | None = None) -> str:
        """Submit from the login node; returns the job id."""
        return self.on("ctl", "sbatch", "--parsable", *words, cwd=cwd, env=env).stdout.split()[-1]

    def job(self, job_id: str) -> dict[str, str]:
        """What slurmctld knows about a job or an array's task (id_task), also a finished one, in scontrol's words."""
        # Not --json: it ignores which task of an array is asked for.
        answer = self.on("ctl", "scontrol", "--oneliner", "show", "job", job_id).stdout
        return dict(re.findall(r"(\w+)=(\S*)", answer))

    def wait(self, job_id: str, seconds: float = 90) -> dict[str, str]:
        """The job once it is over, requeues included; TimeoutError with all that is known of it otherwise."""
        unfinished = {"PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING"}
        end = time.monotonic() + speed.seconds(seconds)
        while (job := self.job(job_id))["JobState"] in unfinished:
            if time.monotonic() > end:
                raise TimeoutError(f"job {job_id} is not over after {seconds} s: {job}")
            time.sleep(0.1)
        return job

    def close(self) -> None:
        """End every node; its processes, mounts and addresses go with it."""
        for holder in reversed(self.holders.values()):
            holder.kill()
            holder.wait()
