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


def locate_this_host(launcher: LauncherConfig) -> HostPlace:
    """Where this host stands. Raises ConfigError if names or addresses do not tell, with the setting that does."""
    assert launcher.rdzv is not None
    host = launcher.rdzv.rpartition(":")[0].strip("[]")
    own_interfaces = interfaces()
    meeting_addresses = _addresses(host, f"launcher.rdzv={launcher.rdzv}")
    is_first = any(address in own_interfaces or is_loopback(address) for address in meeting_addresses)
    address = _reachable_address(launcher, host, meeting_addresses, own_interfaces, is_first=is_first)
    rank = launcher.node_rank
    if rank is None and (is_first or launcher.nodes == 2):
        rank = 0 if is_first else 1
    if rank is not None and is_first != (rank == 0):
        if is_first:
            place = "is this host"
            remedy = "leave launcher.node_rank out here"
        else:
            place = f"is another host ({', '.join(meeting_addresses)})"
            remedy = "give launcher.rdzv an address of that host"
        raise ConfigError(
            f"launcher.node_rank={rank}: launcher.rdzv={launcher.rdzv} {place}, and the ranks meet on the host with index 0; "
            f"{remedy}"
        )
    return HostPlace(rank, address, own_interfaces[address], is_first)


def _reachable_address(
    launcher: LauncherConfig,
    host: str,
    meeting_addresses: list[str],
    own_interfaces: dict[str, str],
    *,
    is_first: bool,
) -> str:
    """The address at which other hosts reach this one. Raises ConfigError if there is none, or it is not clear which.

    `host` is the name in `launcher.rdzv`, and `meeting_addresses` what this host takes it for.
    """
    if launcher.address is not None:
        for address in _addresses(launcher.address, _address_setting(launcher)):
            if address in own_interfaces:
                if is_loopback(address):
                    break
                return address
        raise ConfigError(
            f"{_address_setting(launcher)}: is no address of this host that others reach; it has "
            f"{_list_addresses(own_interfaces)}"
        )
    if is_first:
        for address in meeting_addresses:
            if address in own_interfaces and not is_loopback(address):
                return address
        return _only_reachable_address(host, own_interfaces)
    assert launcher.rdzv is not None
    address = local_address_towards(meeting_addresses[0], launcher.rdzv)
    if address not in own_interfaces or is_loopback(address):
        raise ConfigError(
            f"launcher.rdzv={launcher.rdzv}: no interface of this host leads there; it has "
            f"{_list_addresses(own_interfaces)}"
        )
    return address


def interfaces() -> dict[str, str]:
    """The interface of each address that this host has."""
    import psutil

    interface_of = {}
    for interface, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family in (socket.AF_INET, socket.AF_INET6):
                # An IPv6 address of a link carries its interface behind a %.
                interface_of[address.address.partition("%")[0]] = interface
    return interface_of


def _addresses(host: str, setting: str) -> list[str]:
    try:
        answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(
            f"{setting}: this host does not know {host} ({error.strerror or error}); give its address"
        ) from error
    return list(dict.fromkeys(str(answer[4][0]).partition("%")[0] for answer in answers))


def local_address_towards(address: str, rdzv: str) -> str:
    """The address of this host from which `address` is reached. Raises ConfigError if there is no route."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # a datagram socket only looks its route up: nothing is sent
        except OSError as error:
            raise ConfigError(f"launcher.rdzv={rdzv}: this host has no way to {address} ({error.strerror})") from error
        return str(probe.getsockname()[0]).partition("%")[0]


def _only_reachable_address(host: str, own_interfaces: dict[str, str]) -> str:
    """The one address that others may reach, if `host` means this host by its loopback. Raises ConfigError for several."""
    reachable = [address for address in own_interfaces if ":" not in address and not is_loopback(address)]
    if len(reachable) != 1:
        raise ConfigError(
            f"launcher.rdzv: {host} means this host by a loopback address here, and so no interface; set launcher.address to "
            f"one of {', '.join(reachable) or 'its addresses'}, or name an address in launcher.rdzv"
        )
    return reachable[0]


def is_loopback(address: str) -> bool:
    """Whether an address means the host itself."""
    return ipaddress.ip_address(address).is_loopback


def _address_setting(launcher: LauncherConfig) -> str:
    return f"launcher.address={launcher.address}"


def _list_addresses(own_interfaces: dict[str, str]) -> str:
    return (
        ", ".join(f"{address} ({name})" for address, name in own_interfaces.items() if not is_loopback(address))
        or "none"
    )
