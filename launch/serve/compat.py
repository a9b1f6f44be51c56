"""What the gateway uses of transformers' server. Read in transformers 5.24.

`transformers serve` is a command. Its parts, in `transformers.cli.serving`, are no public interface, and the command itself
cannot be used: it loads whatever model a request names, and has neither a key nor limits. So the gateway puts `build_server`
around one model that is loaded already. tests/compat/test_transformers_server.py asks the application.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import BaseHandler, GenerationState

_SEED_ATTRIBUTE = "seed_of_this_request"
"""The attribute of a request's generation settings in which its seed travels to `generate`."""


class _ClosedHandler:
    """Stands for the handler of an address that the gateway never passes on."""

    async def handle_request(self, *_: Any) -> Any:
        raise AssertionError("the gateway closes this address")


class SingleModelManager(ModelManager):
    """A model manager that has one model, loaded before it, and loads no other.

    Overrides `process_model_name`, `load_model_and_processor` and `list_models`, and sets `force_model`.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, context_length: int) -> None:
        """`name`: by which clients ask for the model. `context_length`: most tokens of a prompt and its answer together.

        Clients are told the latter in the list of models, as `max_model_len`, which is vLLM's name for it.
        """
        super().__init__()
        self.force_model = name
        self._model_and_tokenizer = model, tokenizer
        self._model_entry = {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "shardtune",
            "max_model_len": context_length,
        }

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """The name as it is: it is no repository of a hub."""
        return model_id

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The model and its tokenizer. Raises ValueError for any other name."""
        if model_id_and_revision != self.force_model:
            raise ValueError(f"this server has {self.force_model} alone")
        return self._model_and_tokenizer

    def list_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """The one model, in OpenAI's form."""
        return [self._model_entry]


class TextServer(NamedTuple):
    """transformers' server around one model."""

    application: Any
    """The ASGI application that answers chats and completions."""
    shut_down: Callable[[], None]
    """Ends the threads that generate."""


def build_text_server(manager: SingleModelManager, *, batching: bool) -> TextServer:
    """Build transformers' own HTTP server around one loaded model, with its chats and completions alone.

    `batching`: many requests are computed at once. Uses `build_server`, `GenerationState` and two handlers of transformers;
    the other addresses are closed by our middleware. A request's seed travels with its generation settings, and
    `set_seed_of_each_request` makes it take effect.
    """
    logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)  # else a warning for each request
    state = GenerationState(continuous_batching=batching)
    closed_handler: Any = _ClosedHandler()  # has the one method that the server calls of the handlers it stands for
    application = build_server(
        manager,
        chat_handler=_subclass_keeping_seed(ChatCompletionHandler)(manager, state),
        completion_handler=_subclass_keeping_seed(CompletionHandler)(manager, state),
        response_handler=closed_handler,
        transcription_handler=closed_handler,
        systemone_handler=closed_handler,
        generation_state=state,
    )
    return TextServer(application, state.shutdown)


def _subclass_keeping_seed(handler: type[BaseHandler]) -> Any:
    """Derive a request handler that keeps a request's seed until its answer is generated, in place of seeding at once.

    `set_seed_of_each_request` reads it from the generation settings of the request (`_SEED_ATTRIBUTE`).

    Another answer may be being generated when a request arrives, and there is one seed for the whole process. Overrides
    `BaseHandler._build_generation_config`.
    """

    class Seeded(handler):  # type: ignore[misc, valid-type]
        def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            seed = body.pop("seed", None)
            generation_config = super()._build_generation_config(body, *args, **kwargs)
            if seed is not None:
                setattr(generation_config, _SEED_ATTRIBUTE, seed)
            return generation_config

    return Seeded


def set_seed_of_each_request(model: Any) -> None:
    """Make a model's `generate` set the seed of the request that it answers. For a server that answers one after the other.

    The handlers of `_subclass_keeping_seed` leave the seed in the request's generation settings. Replaces `generate` of this
    one model: the server calls it in a thread of its own, with no hook before it.
    """
    generate = model.generate

    def generate_seeded(*args: Any, generation_config: Any = None, **kwargs: Any) -> Any:
        seed = getattr(generation_config, _SEED_ATTRIBUTE, None)
        if seed is not None:
            delattr(generation_config, _SEED_ATTRIBUTE)
            torch.manual_seed(seed)
        return generate(*args, generation_config=generation_config, **kwargs)

    model.generate = generate_seeded
