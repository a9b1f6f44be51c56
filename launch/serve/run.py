"""Starts the server, prints its address, and shuts it down."""

from __future__ import annotations

import socket
import sys
from typing import TYPE_CHECKING, Any

from launch.serve.config import ServeConfig
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.serve.exported import Exported


def bound(config: ServeConfig) -> socket.socket:
    """A socket on the address, before anything is loaded. Raises ConfigError where it cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((config.host, config.port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise ConfigError(
            f"serve.host={config.host} serve.port={config.port}: cannot be listened on ({error}); name another, or "
            "serve.port=0 for a free one"
        ) from error
    return listening


def address(config: ServeConfig, listening: socket.socket) -> str:
    """What clients are given."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{listening.getsockname()[1]}/v1"


def server(exported: Exported, config: ServeConfig, listening: socket.socket) -> tuple[Any, str]:
    """(uvicorn's server with the model loaded, the model's name); from now on connections wait to be taken."""
    import uvicorn

    from launch.serve.app import application
    from launch.serve.models import load

    talking = load(exported, device=config.device, dtype=config.dtype)
    if config.name:
        talking.name = config.name
    app = application(talking, config)
    settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=30)
    listening.listen(settings.backlog)
    return uvicorn.Server(settings), talking.name


def serve(exported: Exported, config: ServeConfig) -> None:
    """Serve until a signal ends it. Raises ConfigError."""
    listening = bound(config)
    running, name = server(exported, config, listening)
    key = f"the key in {config.key_env}" if config.key_env else "no key"
    print(f"serving {name} at {address(config, listening)} (transformers, {key}); Ctrl-C ends it", flush=True)
    try:
        running.run(sockets=[listening])
    finally:
        listening.close()
        running.config.app.close()
        sys.stdout.flush()
