"""Which of several hosts this one is, by names and addresses alone; tests/slurm/test_hosts.py starts two of them."""

import re
import socket

import pytest

from launch.cluster import hosts
from launch.cluster.hosts import ThisHost, locate_this_host
from strategies.errors import ConfigError
from trainer.config.run import LauncherConfig

OWN = {"127.0.0.1": "lo", "10.0.0.1": "eth0", "192.168.7.1": "eno2"}
KNOWN = {"a": "10.0.0.1", "b": "10.0.0.2", "here": "127.0.1.1", "mine": "192.168.7.1"}


@pytest.fixture(autouse=True)
def host_a(monkeypatch):
    """A host with two interfaces, whose own name means a loopback address."""
    monkeypatch.setattr(hosts, "interface_by_address", lambda: dict(OWN))
    monkeypatch.setattr(hosts, "local_address_towards", lambda address, setting: "10.0.0.1")

    def known(host, *_, **__):
        if host not in KNOWN and not host[0].isdigit():
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, 1, 6, "", (KNOWN.get(host, host), 0))]

    monkeypatch.setattr(hosts.socket, "getaddrinfo", known)


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({"rdzv": "a:29400"}, ThisHost(0, "10.0.0.1", "eth0", True)),
        ({"rdzv": "10.0.0.1:29400"}, ThisHost(0, "10.0.0.1", "eth0", True)),
        ({"rdzv": "b:29400"}, ThisHost(1, "10.0.0.1", "eth0", False)),
        ({"rdzv": "b:29400", "address": "mine"}, ThisHost(1, "192.168.7.1", "eno2", False)),
        ({"rdzv": "here:29400", "address": "10.0.0.1"}, ThisHost(0, "10.0.0.1", "eth0", True)),
        ({"rdzv": "b:29400", "nodes": 3}, ThisHost(None, "10.0.0.1", "eth0", False)),
        ({"rdzv": "b:29400", "nodes": 3, "node_rank": 2}, ThisHost(2, "10.0.0.1", "eth0", False)),
    ],
)
def test_the_place_of_this_host(settings, place):
    assert locate_this_host(LauncherConfig(**{"nodes": 2, **settings})) == place


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rdzv": "here:29400"}, "set launcher.address to one of 10.0.0.1, 192.168.7.1"),
        ({"rdzv": "nowhere:29400"}, "launcher.rdzv=nowhere:29400: this host does not know nowhere"),
        (
            {"rdzv": "b:29400", "address": "b"},
            "launcher.address=b: is no address of this host that others reach; it has 10.0.0.1 (eth0)",
        ),
        ({"rdzv": "b:29400", "address": "here"}, "is no address of this host that others reach"),
        ({"rdzv": "b:29400", "node_rank": 0}, "launcher.node_rank=0: launcher.rdzv=b:29400 is another host (10.0.0.2)"),
        ({"rdzv": "a:29400", "node_rank": 1}, "launcher.node_rank=1: launcher.rdzv=a:29400 is this host"),
    ],
)
def test_host_settings_that_do_not_identify_it_are_refused_with_those_that_do(settings, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        locate_this_host(LauncherConfig(nodes=2, **settings))


def test_the_addresses_of_this_machine(monkeypatch):
    monkeypatch.undo()
    assert "127.0.0.1" in hosts.interface_by_address()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect(("127.0.0.1", 9))
    assert hosts.local_address_towards("127.0.0.1", "launcher.rdzv=x:1") == "127.0.0.1"
