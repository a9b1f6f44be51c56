"""transformers' own server around one model, behind our middleware."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from launch.serve.config import ServeConfig
from launch.serve.middleware import TransformersMiddleware
from launch.serve.requests import ServedTextModel
from strategies.errors import ConfigError
from strategies.extras import install_command

if TYPE_CHECKING:
    from launch.serve.models import ChatModel

REQUIRED_PACKAGES = ("fastapi", "uvicorn", "openai")


def check_server_packages() -> None:
    """Raise ConfigError if a package that the server needs, such as fastapi, is not installed."""
    missing_packages = [name for name in REQUIRED_PACKAGES if find_spec(name) is None]
    if missing_packages:
        raise ConfigError(f"serve: needs {', '.join(missing_packages)}; {install_command('serve')}")


def build_application(chat_model: ChatModel, config: ServeConfig) -> TransformersMiddleware:
    """Build the ASGI application that answers OpenAI-compatible requests: transformers' server behind our checks.

    `chat_model`: the loaded model with its tokenizer; `config`: the settings `serve.<name>`. By `serve.batching`:
    - without batching: one answer at a time, so that each has the seed of its own request;
    - with batching: all answers are generated with the same settings, so no request can choose how its answer is sampled. The
      model decodes greedily (set here), unless the export's own settings sample.
    """
    # Imported here: the packages that it needs are checked first.
    from launch.serve.compat import SingleModelManager, build_text_server, set_seed_of_each_request

    manager = SingleModelManager(chat_model.name, chat_model.model, chat_model.tokenizer, chat_model.context_length)
    server = build_text_server(manager, batching=config.batching)
    if not config.batching:
        set_seed_of_each_request(chat_model.model)
    elif not chat_model.samples_by_default:
        generation_config = chat_model.generation_config
        generation_config.do_sample = False
        generation_config.temperature = None
        generation_config.top_p = None
        generation_config.top_k = None
    served_model = ServedTextModel(
        name=chat_model.name,
        tokenizer=chat_model.tokenizer,
        context_length=chat_model.context_length,
        max_tokens=config.max_tokens,
        samples_by_default=chat_model.samples_by_default,
        batches_requests=config.batching,
    )
    middleware = TransformersMiddleware(server.application, served_model, config)
    middleware.close = server.shut_down
    return middleware
