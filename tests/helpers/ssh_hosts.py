"""Hosts with an sshd of their own, each in a network namespace, on one bridge with this one: reached by ssh as any other.

They share this machine's files, as hosts of a cluster share a file system; nothing of the machine's own sshd, keys or
configuration is used or changed.
"""

import contextlib
import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.speed import seconds

CONFIG = """\
Port 22
HostKey {keys}/host
AuthorizedKeysFile {keys}/user.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
PrintMotd no
"""


def missing() -> str | None:
    """Why there can be none here; None where there can."""
    absent = [name for name in ("ssh", "sshd", "ssh-keygen") if _program(name) is None]
    if absent:
        return f"{' and '.join(absent)} not installed (openssh-server, openssh-client)"
    return missing_networks()


def missing_networks() -> str | None:
    """Why there can be no hosts without ssh; None where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if _program("ip") is None:
        return "ip not installed (iproute2)"
    try:
        _ip("netns", "list")
        subprocess.run(["unshare", "--net", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return "this kernel or container allows no network namespaces"
    return None


@dataclass
class Hosts:
    """Two hosts, `names`, and how ssh is told of them."""

    directory: Path
    net: str
    names: tuple[str, str]
    servers: list[subprocess.Popen]

    @property
    def options(self) -> list[str]:
        """What ssh needs to know of them."""
        return ["-F", str(self.directory / "config")]

    def address(self, number: int) -> str:
        return f"{self.net}.{number + 1}"

    def command(self, number: int) -> list[str]:
        """What runs the command behind it on a host, without ssh."""
        return [str(_program("ip")), "netns", "exec", self._space(number)]

    def link(self, number: int, state: str) -> None:
        """Take a host's network `down`, or `up`."""
        _ip("-n", self._space(number), "link", "set", "eth0", state)

    def processes(self, number: int) -> list[int]:
        """Those that run on a host, but for its sshd."""
        done = subprocess.run(["ip", "netns", "pids", self._space(number)], capture_output=True, text=True)
        return [
            int(word)
            for word in done.stdout.split()
            if _name(int(word)) not in ("sshd", "sshd-session", "sshd-auth", "")
        ]

    def _space(self, number: int) -> str:
        return f"st{os.getpid()}{'ab'[number]}"


@contextlib.contextmanager
def two_hosts(directory: Path) -> Iterator[Hosts]:
    """Two hosts on a network of their own; all of it is gone afterwards."""
    keys = directory / "keys"
    keys.mkdir(parents=True)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)], check=True)
    (keys / "sshd_config").write_text(CONFIG.format(keys=keys))
    hosts = Hosts(directory, f"10.214.{os.getpid() % 256}", ("alpha", "beta"), [])
    user = pwd.getpwuid(os.getuid()).pw_name
    (directory / "config").write_text(
        "".join(f"Host {name}\n  HostName {hosts.address(number)}\n" for number, name in enumerate(hosts.names))
        + f"Host *\n  User {user}\n  IdentityFile {keys}/user\n  IdentitiesOnly yes\n  StrictHostKeyChecking accept-new\n"
        f"  UserKnownHostsFile {keys}/known\n  LogLevel ERROR\n"
    )
    with _networks(hosts), contextlib.ExitStack() as undo:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd parts from its privileges
        for number in range(2):
            space = hosts._space(number)
            sshd = [_program("sshd"), "-D", "-e", "-f", str(keys / "sshd_config")]
            with (directory / f"sshd-{number}.log").open("wb") as log:
                server = subprocess.Popen(["ip", "netns", "exec", space, *sshd], stderr=log, start_new_session=True)
            hosts.servers.append(server)
            undo.callback(server.wait)
            undo.callback(server.kill)
        for name in hosts.names:
            _until_reached(hosts, name)
        yield hosts


@contextlib.contextmanager
def two_networks(directory: Path) -> Iterator[Hosts]:
    """The same without ssh: what runs there is started by `Hosts.command`."""
    hosts = Hosts(directory, f"10.214.{os.getpid() % 256}", ("alpha", "beta"), [])
    with _networks(hosts):
        yield hosts


@contextlib.contextmanager
def _networks(hosts: Hosts) -> Iterator[None]:
    bridge = f"st{os.getpid()}"
    with contextlib.ExitStack() as undo:
        _ip("link", "add", bridge, "type", "bridge")
        undo.callback(_ip, "link", "del", bridge)
        _ip("addr", "add", f"{hosts.net}.254/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for number in range(2):
            space = hosts._space(number)
            _ip("netns", "add", space)
            undo.callback(_ip, "netns", "del", space)
            _ip("link", "add", f"{space}v", "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", f"{space}v", "master", bridge, "up")
            for words in (["addr", "add", f"{hosts.address(number)}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
                _ip("-n", space, *words)
            _ip("-n", space, "link", "set", "lo", "up")
            undo.callback(_end, hosts, number)
        yield


def _end(hosts: Hosts, number: int) -> None:
    done = subprocess.run(["ip", "netns", "pids", hosts._space(number)], capture_output=True, text=True)
    for word in done.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(word), 9)


def _until_reached(hosts: Hosts, name: str) -> None:
    deadline = time.monotonic() + seconds(20)
    while True:
        done = subprocess.run(["ssh", *hosts.options, name, "true"], capture_output=True, text=True)
        if done.returncode == 0:
            return
        assert time.monotonic() < deadline, (done.stderr, [p.read_text() for p in hosts.directory.glob("sshd-*.log")])
        time.sleep(0.1)


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _ip(*words: str) -> None:
    subprocess.run([str(_program("ip")), *words], check=True, capture_output=True)
