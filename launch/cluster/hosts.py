"""Several hosts without SLURM: which of them this one is, and the network interface by which the others reach it.

Both are derived from `launcher.rdzv` and `launcher.address`, because a host's own name often resolves to 127.0.1.1 on
that host and to nothing elsewhere. Nothing is sent.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from strategies.errors import ConfigError

if TYPE_CHECKING:
    from trainer.config.run import LauncherConfig


@dataclass(frozen=True, slots=True)
class HostPlace:
    """This host among those of a run."""

    rank: int | None
    """Its index; None where the hosts must find out among themselves."""
    address: str
    """Where the others reach it."""
    interface: str
    """The network interface with that address."""

    first: bool
    """Whether it is the one that `launcher.rdzv` names."""


def place_of(launcher: LauncherConfig) -> HostPlace:
    """Where this host stands. Raises ConfigError where names or addresses do not tell, with the setting that does."""
    assert launcher.rdzv is not None
    host = launcher.rdzv.rpartition(":")[0].strip("[]")
    own = interfaces()
    met = _addresses(host, f"launcher.rdzv={launcher.rdzv}")
    first = bool({*met} & {*own}) or any(is_loopback(address) for address in met)
    if launcher.address is not None:
        address = next((each for each in _addresses(launcher.address, _said(launcher)) if each in own), None)
        if address is None or is_loopback(address):
            raise ConfigError(f"{_said(launcher)}: is no address of this host that others reach; it has {_list(own)}")
    elif first:
        address = next((each for each in met if each in own and not is_loopback(each)), None) or _only(host, own)
    else:
        address = towards(met[0], launcher.rdzv)
        if address not in own or is_loopback(address):
            raise ConfigError(
                f"launcher.rdzv={launcher.rdzv}: no interface of this host leads there; it has {_list(own)}"
            )
    rank = launcher.node_rank
    if rank is None and (first or launcher.nodes == 2):
        rank = 0 if first else 1
    if first != (rank == 0) and rank is not None:
        there = "is this host" if first else f"is another host ({', '.join(met)})"
        raise ConfigError(
            f"launcher.node_rank={rank}: launcher.rdzv={launcher.rdzv} {there}, and the ranks meet on the host with index 0; "
            f"{'leave launcher.node_rank out here' if first else 'give launcher.rdzv an address of that host'}"
        )
    return HostPlace(rank, address, own[address], first)


def interfaces() -> dict[str, str]:
    """The interface of each address that this host has."""
    import psutil

    families = (socket.AF_INET, socket.AF_INET6)
    return {
        address.address.partition("%")[0]: name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family in families
    }


def _addresses(host: str, said: str) -> list[str]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(
            f"{said}: this host does not know {host} ({error.strerror or error}); give its address"
        ) from error
    return list(dict.fromkeys(str(each[4][0]).partition("%")[0] for each in found))


def towards(address: str, rdzv: str) -> str:
    """The address of this host from which another one is reached; a route is looked up, nothing is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as way:
        try:
            way.connect((address, 9))
        except OSError as error:
            raise ConfigError(f"launcher.rdzv={rdzv}: this host has no way to {address} ({error.strerror})") from error
        return str(way.getsockname()[0]).partition("%")[0]


def _only(host: str, own: dict[str, str]) -> str:
    """The one address that others may reach, where a name means this host by its loopback. Raises ConfigError for several."""
    real = [each for each in own if ":" not in each and not is_loopback(each)]
    if len(real) != 1:
        raise ConfigError(
            f"launcher.rdzv: {host} means this host by a loopback address here, and so no interface; set launcher.address to "
            f"one of {', '.join(real) or 'its addresses'}, or name an address in launcher.rdzv"
        )
    return real[0]


def is_loopback(address: str) -> bool:
    """Whether an address means the host itself."""
    return ipaddress.ip_address(address).is_loopback


def _said(launcher: LauncherConfig) -> str:
    return f"launcher.address={launcher.address}"


def _list(own: dict[str, str]) -> str:
    return ", ".join(f"{address} ({name})" for address, name in own.items() if not is_loopback(address)) or "none"
