"""Starts the server, prints its address, and shuts it down."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

from launch.serve.config import ServeConfig
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.serve.exported import ExportedModel


def bind_socket(config: ServeConfig) -> socket.socket:
    """Take the address of the server before the model is loaded, which takes long: opens a socket at `serve.host` and port.

    Raises ConfigError if the address is taken, or cannot be used.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    # A server that has just ended leaves connections behind, which would keep its address taken for a minute.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(
            f"serve.host={config.host} serve.port={config.port}: cannot be listened on ({error}); name another, or "
            "serve.port=0 for a free one"
        ) from error
    return listener


def server_url(config: ServeConfig, listener: socket.socket) -> str:
    """The URL that clients use, such as "http://127.0.0.1:8000/v1", with the port that the socket got (of serve.port=0)."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{listener.getsockname()[1]}/v1"


class LoadedServer(NamedTuple):
    """uvicorn's server with a loaded model behind it."""

    server: Any
    model_name: str
    """The name by which clients ask for the model."""
    stop_generating: Callable[[], None]
    """Ends the threads that generate answers; to be called once the server has stopped."""


def load_server(exported: ExportedModel, config: ServeConfig, listener: socket.socket) -> LoadedServer:
    """Load the model and set up the web server (uvicorn), which does not run yet. Raises ConfigError if loading fails.

    From now on connections to the socket wait until the server takes them.
    """
    import uvicorn

    from launch.serve.app import build_application
    from launch.serve.models import load_chat_model

    chat_model = load_chat_model(exported, device=config.device, dtype=config.dtype)
    if config.name:
        chat_model.name = config.name
    app = build_application(chat_model, config)
    uvicorn_config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=30)
    listener.listen(uvicorn_config.backlog)
    return LoadedServer(uvicorn.Server(uvicorn_config), chat_model.name, stop_generating=app.close)


def serve(exported: ExportedModel, config: ServeConfig) -> None:
    """Serve an exported model by transformers' server, in this process, until a signal ends it.

    The address is taken first, then the model is loaded, and its URL is printed once clients can connect.
    Raises ConfigError if the address is taken or the model cannot be loaded.
    """
    key_text = f"the key in {config.key_env}" if config.key_env else "no key"
    with closing(bind_socket(config)) as listener:
        loaded = load_server(exported, config, listener)
        url = server_url(config, listener)
        print(f"serving {loaded.model_name} at {url} (transformers, {key_text}); Ctrl-C ends it", flush=True)
        try:
            loaded.server.run(sockets=[listener])
        finally:
            loaded.stop_generating()
            sys.stdout.flush()
