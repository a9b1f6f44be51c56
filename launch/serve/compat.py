"""What the gateway uses of transformers' server. Read in transformers 5.24.

`transformers serve` is a command. Its parts, in `transformers.cli.serving`, are no public interface, and the command itself
cannot be used: it loads whatever model a request names, and has neither a key nor limits. So the gateway puts `build_server`
around one model that is loaded already. tests/compat/test_transformers_server.py asks the application.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import BaseHandler, GenerationState

_SEED = "seed_of_this_request"


class _Closed:
    """Stands for the handler of an address that the gateway never passes on."""

    async def handle_request(self, *_: Any) -> Any:
        raise AssertionError("the gateway closes this address")


class OneModel(ModelManager):
    """A model manager that has one model, loaded before it, and loads no other.

    Overrides `process_model_name`, `load_model_and_processor` and `list_models`, and sets `force_model`.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, positions: int) -> None:
        """`positions`: most tokens of a prompt and its answer together, which clients are told."""
        super().__init__()
        self.force_model = name
        self._loaded = model, tokenizer
        self._listed = {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "shardtune",
            "max_model_len": positions,
        }

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """The name as it is: it is no repository of a hub."""
        return model_id

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The model and its tokenizer. Raises ValueError for any other name."""
        if model_id_and_revision != self.force_model:
            raise ValueError(f"this server has {self.force_model} alone")
        return self._loaded

    def list_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """The one model, in OpenAI's form."""
        return [self._listed]


def text_server(manager: OneModel, *, batching: bool) -> tuple[Any, Callable[[], None]]:
    """(the ASGI application that writes chats and texts with the one model, what ends its computing).

    `batching`: many requests are computed at once. Uses `build_server`, `GenerationState` and the handlers of chats and texts.
    A request's seed travels with the request's own settings; `seed_by_request` has it take effect.
    """
    logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)  # else a warning for each request
    state = GenerationState(continuous_batching=batching)
    closed: Any = _Closed()  # has the one method that the server calls of the handlers it stands for
    application = build_server(
        manager,
        chat_handler=_seeded(ChatCompletionHandler)(manager, state),
        completion_handler=_seeded(CompletionHandler)(manager, state),
        response_handler=closed,
        transcription_handler=closed,
        systemone_handler=closed,
        generation_state=state,
    )
    return application, state.shutdown


def _seeded(handler: type[BaseHandler]) -> Any:
    """The handler, without setting the seed when a request arrives: another answer may be being written then.

    Overrides `BaseHandler._build_generation_config`, which sets the seed of the whole process.
    """

    class Seeded(handler):  # type: ignore[misc, valid-type]
        def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            seed = body.pop("seed", None)
            settings = super()._build_generation_config(body, *args, **kwargs)
            if seed is not None:
                setattr(settings, _SEED, seed)
            return settings

    return Seeded


def seed_by_request(model: Any) -> None:
    """Have a model's `generate`, which answers one request after the other, begin with the seed of its own request.

    Replaces `generate` of this one model: the server calls it in a thread of its own and gives no place before it.
    """
    generate = model.generate

    def begin(*args: Any, generation_config: Any = None, **kwargs: Any) -> Any:
        if (seed := getattr(generation_config, _SEED, None)) is not None:
            delattr(generation_config, _SEED)
            torch.manual_seed(seed)
        return generate(*args, generation_config=generation_config, **kwargs)

    model.generate = begin
