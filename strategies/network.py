"""Finds network faults that keep ranks from meeting, and reports them before a library fails with a traceback."""

from __future__ import annotations

import errno
import os
import socket

from strategies.errors import ConfigError

GLOO_INTERFACES_VARIABLE = "GLOO_SOCKET_IFNAME"
LOOPBACK = "127.0.0.1"


def check_gloo_interfaces() -> None:
    """Raise ConfigError if the environment names a network interface for gloo (ranks on CPUs) that this host does not have.

    gloo itself would end with a message that does not name the variable.
    """
    names = os.environ.get(GLOO_INTERFACES_VARIABLE, "")
    interfaces = dict(socket.if_nameindex()).values()
    # gloo takes several, separated by commas.
    missing = [name for name in names.split(",") if name and name not in interfaces]
    if missing:
        raise ConfigError(
            f"{GLOO_INTERFACES_VARIABLE}={names}: this host has no interface {', '.join(missing)}, only {', '.join(interfaces)}; "
            f"`unset {GLOO_INTERFACES_VARIABLE}`, or name one of these"
        )


def check_loopback_address(processes: int) -> None:
    """Raise ConfigError if this host's ranks could not reach each other over its loopback address."""
    try:
        socket.create_server((LOOPBACK, 0)).close()
    except OSError as error:
        raise ConfigError(
            f"launcher.processes={processes}: ranks of one host meet at {LOOPBACK}, which this host does not have "
            f"({error.strerror or error}); bring its loopback interface up (`ip link set lo up`), or set launcher.processes=1"
        ) from error


def check_port_is_free(setting: str, port: int) -> None:
    """Raise ConfigError if the port on which the ranks are to meet is taken by another process of this host.

    `setting`: the key that has set it, for the message.
    """
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return  # the library that binds the port will report it
        raise ConfigError(
            f"{setting}: another process of this host listens on port {port}; choose another port"
        ) from error
