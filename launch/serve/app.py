"""transformers' own server around one model, behind our middleware."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from launch.serve.config import ServeConfig
from launch.serve.middleware import TransformersMiddleware
from launch.serve.requests import Served
from strategies.errors import ConfigError
from strategies.extras import install_command

if TYPE_CHECKING:
    from launch.serve.models import ChatModel

PACKAGES = ("fastapi", "uvicorn", "openai")


def refuse_missing_packages() -> None:
    """Raise ConfigError if a package that the server needs is not installed."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(f"serve: needs {', '.join(missing)}; {install_command('serve')}")


def application(chat_model: ChatModel, config: ServeConfig) -> TransformersMiddleware:
    """The ASGI application that answers for `chat_model`."""
    # Imported here: the packages that it needs are checked first.
    from launch.serve.compat import OneModel, seed_by_request, text_server

    manager = OneModel(chat_model.name, chat_model.model, chat_model.tokenizer, chat_model.positions)
    app, shut_down = text_server(manager, batching=config.batching)
    if not config.batching:
        seed_by_request(chat_model.model)
    elif not chat_model.samples_by_default:  # with batching no request can choose: all are greedy
        generation_config = chat_model.generation_config
        generation_config.do_sample = False
        generation_config.temperature = None
        generation_config.top_p = None
        generation_config.top_k = None
    served = Served(
        chat_model.name,
        chat_model.tokenizer,
        chat_model.positions,
        config.max_tokens,
        chat_model.samples_by_default,
        config.batching,
    )
    guard = TransformersMiddleware(app, served, config)
    guard.close = shut_down
    return guard
