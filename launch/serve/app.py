"""transformers' own server around one model, behind our middleware."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from launch.serve.config import ServeConfig
from launch.serve.middleware import Guard
from launch.serve.requests import Served
from strategies.errors import ConfigError
from strategies.extras import install_command

if TYPE_CHECKING:
    from launch.serve.models import Talking

PACKAGES = ("fastapi", "uvicorn", "openai")


def check_packages() -> None:
    """Raises ConfigError where what it stands on is not installed."""
    if lacking := [name for name in PACKAGES if find_spec(name) is None]:
        raise ConfigError(f"serve: needs {', '.join(lacking)}; {install_command('serve')}")


def application(talking: Talking, config: ServeConfig) -> Guard:
    """The ASGI application that answers for `talking`."""
    # Imported here: the packages that it needs are checked first.
    from launch.serve.compat import OneModel, seed_by_request, text_server

    manager = OneModel(talking.name, talking.model, talking.tokenizer, talking.positions)
    app, shut_down = text_server(manager, batching=config.batching)
    if not config.batching:
        seed_by_request(talking.model)
    elif not talking.samples:  # what is drawn is decided here, for all requests
        own = talking.own
        own.do_sample, own.temperature, own.top_p, own.top_k = False, None, None, None
    served = Served(
        talking.name, talking.tokenizer, talking.positions, config.max_tokens, talking.samples, config.batching
    )
    guard = Guard(app, served, config)
    guard.close = shut_down
    return guard
