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
class ThisHost:
    """This host among the hosts of a run."""

    node_rank: int | None
    """Its index among the hosts; None if the hosts must find out among themselves."""
    address: str
    """The IP address at which the other hosts reach it."""
    interface: str
    """The network interface with that address."""
    is_first: bool
    """Whether it is the host that `launcher.rdzv` names, where the ranks meet."""


def locate_this_host(launcher: LauncherConfig) -> ThisHost:
    """Find out which of a run's hosts this one is, and how the others reach it, when the same command is typed on each host.

    By `launcher.rdzv`, which names the host where ranks meet, and this host's interfaces. Raises ConfigError if no address is
    found at which others reach this host, or if `launcher.node_rank` contradicts `launcher.rdzv`. The message names the setting
    that would help.
    """
    assert launcher.rdzv is not None
    # "host:port" or "[IPv6]:port"
    first_host = launcher.rdzv.rpartition(":")[0].strip("[]")
    own_interfaces = interface_by_address()
    first_host_addresses = _resolve_addresses(first_host, f"launcher.rdzv={launcher.rdzv}")
    is_first = any(address in own_interfaces or is_loopback(address) for address in first_host_addresses)
    own_address = _address_others_reach(launcher, first_host, first_host_addresses, own_interfaces, is_first=is_first)
    return ThisHost(
        node_rank=_node_rank_of_this_host(launcher, first_host_addresses, is_first=is_first),
        address=own_address,
        interface=own_interfaces[own_address],
        is_first=is_first,
    )


def _node_rank_of_this_host(launcher: LauncherConfig, first_host_addresses: list[str], *, is_first: bool) -> int | None:
    """This host's index among the hosts of a run: `launcher.node_rank` if that is set, else derived from `launcher.rdzv`.

    0 on the host in `launcher.rdzv` (`is_first`), 1 on the other one of two hosts, and None (not known yet) otherwise.
    `first_host_addresses`: those of the host in `launcher.rdzv`, for the message.
    Raises ConfigError if the two settings contradict each other, since ranks meet on the host with index 0.
    """
    node_rank = launcher.node_rank
    if node_rank is None and is_first:
        node_rank = 0
    elif node_rank is None and launcher.nodes == 2:
        node_rank = 1
    if is_first == (node_rank == 0):
        return node_rank
    if is_first:
        contradiction = "is this host"
        remedy = "leave launcher.node_rank out here"
    else:
        contradiction = f"is another host ({', '.join(first_host_addresses)})"
        remedy = "give launcher.rdzv an address of that host"
    raise ConfigError(
        f"launcher.node_rank={node_rank}: launcher.rdzv={launcher.rdzv} {contradiction}, and the ranks meet on the host with "
        f"index 0; {remedy}"
    )


def _address_others_reach(
    launcher: LauncherConfig,
    first_host: str,
    first_host_addresses: list[str],
    own_interfaces: dict[str, str],
    *,
    is_first: bool,
) -> str:
    """The IP address at which the other hosts of a run reach this one; ConfigError if there is none, or if it is not clear which.

    - `launcher.address` is set: the first IP address of it that belongs to this host. Refused if that is a loopback.
    - `is_first`: the IP address of `first_host`, unless that is a loopback. Then this host's only other IPv4 address.
    - Any other host: the address from which its packets to the first host leave.

    `first_host`: the host in `launcher.rdzv`.
    `first_host_addresses`: what this host resolves its name to.
    `is_first`: whether it is this host.
    `own_interfaces`: interface name by address of this host, such as {"10.0.0.3": "eth0"}.
    """
    if launcher.address is not None:
        return _configured_address(launcher.address, own_interfaces)
    if is_first:
        for address in first_host_addresses:
            if address in own_interfaces and not is_loopback(address):
                return address
        return _only_ipv4_address(first_host, own_interfaces)
    setting = f"launcher.rdzv={launcher.rdzv}"
    address = local_address_towards(first_host_addresses[0], setting)
    if address not in own_interfaces or is_loopback(address):
        raise ConfigError(
            f"{setting}: no interface of this host leads there; it has {_describe_addresses(own_interfaces)}"
        )
    return address


def _configured_address(configured_host: str, own_interfaces: dict[str, str]) -> str:
    """The first IP address of the name or address in `launcher.address` that belongs to this host.

    `own_interfaces`: interface name by address of this host, such as {"10.0.0.3": "eth0"}.
    Raises ConfigError if none does, or if that is a loopback address, at which no other host reaches this one.
    """
    setting = f"launcher.address={configured_host}"
    own_address = next(
        (address for address in _resolve_addresses(configured_host, setting) if address in own_interfaces), None
    )
    if own_address is None or is_loopback(own_address):
        raise ConfigError(
            f"{setting}: is no address of this host that others reach; it has {_describe_addresses(own_interfaces)}"
        )
    return own_address


def interface_by_address() -> dict[str, str]:
    """The network interface of each IP address of this host: {"10.0.0.3": "eth0", "127.0.0.1": "lo"}."""
    import psutil

    interfaces = {}
    for interface, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family in (socket.AF_INET, socket.AF_INET6):
                # An IPv6 address of a link carries its interface behind a %.
                ip_address = address.address.partition("%")[0]
                interfaces[ip_address] = interface
    return interfaces


def _resolve_addresses(host: str, setting: str) -> list[str]:
    """The IP addresses that this host's resolver gives for a name, each once. Raises ConfigError if there are none.

    `setting`: key and value that name the host, such as "launcher.rdzv=node1:29500", for the message.
    """
    try:
        address_infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(
            f"{setting}: this host does not know {host} ({error.strerror or error}); give its address"
        ) from error
    # The part behind a % is the interface of an IPv6 address of a link.
    addresses = [str(socket_address[0]).partition("%")[0] for *_, socket_address in address_infos]
    return list(dict.fromkeys(addresses))


def local_address_towards(address: str, setting: str) -> str:
    """The IP address of this host from which packets to `address` leave, so that others can answer to it.

    `setting`: the key and value that named the address, such as "launcher.rdzv=node1:29500", for the message.
    Raises ConfigError if there is no route.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # a datagram socket only looks its route up: nothing is sent
        except OSError as error:
            raise ConfigError(f"{setting}: this host has no way to {address} ({error.strerror})") from error
        return str(probe.getsockname()[0]).partition("%")[0]


def _only_ipv4_address(first_host: str, own_interfaces: dict[str, str]) -> str:
    """The one IPv4 address of this host that is no loopback; ConfigError if there are several, or none, so that it is unclear.

    `first_host`: the host in `launcher.rdzv`, which resolves to a loopback here; for the message.
    `own_interfaces`: interface name by address, {"10.0.0.3": "eth0"}.
    """
    candidates = [address for address in own_interfaces if ":" not in address and not is_loopback(address)]
    if len(candidates) != 1:
        raise ConfigError(
            f"launcher.rdzv: {first_host} means this host by a loopback address here, and so no interface; set launcher.address "
            f"to one of {', '.join(candidates) or 'its addresses'}, or name an address in launcher.rdzv"
        )
    return candidates[0]


def is_loopback(address: str) -> bool:
    """Whether an IP address such as 127.0.0.1 means the host itself."""
    return ipaddress.ip_address(address).is_loopback


def _describe_addresses(own_interfaces: dict[str, str]) -> str:
    """This host's addresses that are no loopback, with their interfaces: "10.0.0.3 (eth0), fd00::3 (eth1)", or "none"."""
    descriptions = []
    for address, interface in own_interfaces.items():
        if not is_loopback(address):
            descriptions.append(f"{address} ({interface})")
    return ", ".join(descriptions) or "none"
