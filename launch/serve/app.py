"""transformers' own server around one model, behind our door.

Its application, handlers and streams are used as they are. What differs stands here: a manager that has one model and
loads no other, and a seed that holds for the answer it was sent with.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from launch.serve.config import ServeConfig
from launch.serve.middleware import Guard
from launch.serve.requests import Served
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.serve.models import Talking

PACKAGES = ("fastapi", "uvicorn", "openai")
_SEED = "seed_of_this_request"


def check_packages() -> None:
    """Raises ConfigError where what it stands on is not installed."""
    if lacking := [name for name in PACKAGES if find_spec(name) is None]:
        raise ConfigError(f"serve: needs {', '.join(lacking)}; pip install 'shardtune[serve]'")


def application(talking: Talking, config: ServeConfig) -> Guard:
    """The ASGI application that answers for `talking`."""
    import logging

    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState

    logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)  # else a warning for each request
    manager = _one_model(talking)
    state = GenerationState(continuous_batching=config.batching)
    if not config.batching:
        _seed_by_request(talking.model)
    elif not talking.samples:  # what is drawn is decided here, for all requests
        own = talking.own
        own.do_sample, own.temperature, own.top_p, own.top_k = False, None, None, None
    arguments = {"model_manager": manager, "generation_state": state}
    app = build_server(
        manager,
        chat_handler=_seeded(ChatCompletionHandler)(**arguments),
        completion_handler=_seeded(CompletionHandler)(**arguments),
        response_handler=ResponseHandler(**arguments),
        transcription_handler=TranscriptionHandler(manager, state),
        systemone_handler=SystemOneHandler(**arguments),
        generation_state=state,
    )
    served = Served(
        talking.name, talking.tokenizer, talking.positions, config.max_tokens, talking.samples, config.batching
    )
    guard = Guard(app, served, config)
    guard.close = state.shutdown
    return guard


def _one_model(talking: Talking) -> Any:
    from transformers.cli.serving.model_manager import ModelManager

    class OneModel(ModelManager):
        """Has what was loaded before it; never another."""

        def __init__(self) -> None:
            super().__init__()
            self.force_model = talking.name

        @staticmethod
        def process_model_name(model_id: str) -> str:
            return model_id

        def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            if model_id_and_revision != talking.name:
                raise ValueError(f"this server has {talking.name} alone")
            return talking.model, talking.tokenizer

        def list_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
            return [
                {
                    "id": talking.name,
                    "object": "model",
                    "created": 0,
                    "owned_by": "shardtune",
                    "max_model_len": talking.positions,
                }
            ]

    return OneModel()


def _seeded(handler: Any) -> Any:
    """The handler, which would set the seed when a request arrives, while another answer is being written."""

    class Seeded(handler):  # type: ignore[misc]
        def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            seed = body.pop("seed", None)
            config = super()._build_generation_config(body, *args, **kwargs)
            if seed is not None:
                setattr(config, _SEED, seed)
            return config

    return Seeded


def _seed_by_request(model: Any) -> None:
    """Have `generate`, which answers one request after the other, begin with the seed of its own request."""
    import torch

    generate = model.generate

    def begin(*args: Any, generation_config: Any = None, **kwargs: Any) -> Any:
        if (seed := getattr(generation_config, _SEED, None)) is not None:
            delattr(generation_config, _SEED)
            torch.manual_seed(seed)
        return generate(*args, generation_config=generation_config, **kwargs)

    model.generate = begin
