"""A client of an OpenAI-compatible server: its address, key and models; its refusals in our words.

Requests go through the `openai` package, which waits and tries again where a server is busy (408, 409, 429, 5xx, no connection;
it obeys Retry-After). The key comes from an environment variable, whose name alone is a setting.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from strategies.errors import ConfigError, ShardtuneError
from strategies.redaction import HIDDEN_PLACEHOLDER
from trainer.evaluation.endpoint.config import EndpointConfig

PLACEHOLDER_API_KEY = "none"
"""What servers without keys are sent."""
Result = TypeVar("Result")


class EndpointFailed(ShardtuneError):
    """A server does not answer, however often it is asked."""


@dataclass(slots=True)
class Client:
    """Sends requests, and turns refusals and failures into errors that name settings below `setting_prefix`."""

    config: EndpointConfig
    setting_prefix: str
    """The setting below which `config` stands, such as `evaluation.judge`, for the text of errors."""
    _openai: Any = field(default=None, repr=False)

    @property
    def openai_client(self) -> Any:
        """The client of the `openai` package, made at the first use."""
        if self._openai is None:
            from openai import OpenAI

            self._openai = OpenAI(
                base_url=self.config.url,
                api_key=self._api_key() or PLACEHOLDER_API_KEY,
                max_retries=self.config.retries,
                timeout=self.config.timeout_s,
            )
        return self._openai

    def _api_key(self) -> str:
        """The server's key, from the environment; empty if it needs none."""
        return os.environ.get(self.config.key_env or "", "")

    def send(self, call_client: Callable[[Any], Result]) -> Result:
        """Make one request to the server: calls `call_client` with the `openai` client, and returns what it returns.

        Raises ConfigError if the server refuses the request, EndpointFailed if it does not answer. The server's key is never
        in the message.
        """
        from openai import APIConnectionError, APIStatusError, OpenAIError

        try:
            return call_client(self.openai_client)
        except APIConnectionError as error:
            raise EndpointFailed(
                f"{self.setting_prefix}.url={self.config.url}: no answer after {self.config.retries + 1} attempts "
                f"({type(error).__name__}: {self._without_key(str(error.__cause__ or error))}); does the server run?"
            ) from None
        except APIStatusError as error:
            raise self._error_of_http_status(error.status_code, self._without_key(_error_text(error))) from None
        # Anything else that the package raises, such as an answer that it cannot read.
        except OpenAIError as error:
            raise EndpointFailed(
                f"{self.setting_prefix}.url={self.config.url}: {self._without_key(str(error))}"
            ) from None

    def _error_of_http_status(self, status: int, answer_text: str) -> ShardtuneError:
        """Turn the HTTP status of a refused request into an error that names the setting to change.

        `answer_text`: the server's words.

        - 401, 403: ConfigError, since the server does not take the API key.
        - 404: ConfigError, since address or model are wrong.
        - Others below 500, but 429: ConfigError, since the server refuses the request.
        - 429 (too many requests) and from 500 on: EndpointFailed, after all attempts.
        """
        prefix = self.setting_prefix
        url = self.config.url
        if status in (401, 403):
            return ConfigError(
                f"{prefix}.key_env={self.config.key_env}: the server at {url} does not take the key ({status}: {answer_text})"
            )
        if status == 404:
            return ConfigError(
                f"{prefix}.url={url}: has no such address or model ({status}: {answer_text}); mend it, or {prefix}.model"
            )
        if status < 500 and status != 429:
            return ConfigError(f"{prefix}.url={url}: the server refuses a request ({status}: {answer_text})")
        return EndpointFailed(
            f"{prefix}.url={url}: the server answered {status} {self.config.retries + 1} times ({answer_text}); try "
            f"later, lower {prefix}.parallel, or raise {prefix}.retries"
        )

    def _without_key(self, text: str) -> str:
        """The text without the key, which a server may repeat in an error."""
        key = self._api_key()
        return text.replace(key, HIDDEN_PLACEHOLDER) if key else text

    def list_models(self) -> list[dict[str, Any]]:
        """The models that the server lists (/v1/models)."""
        return self.send(lambda api: [model.to_dict() for model in api.models.list()])

    def resolve_model_name(self) -> str:
        """Find out which model of the server to ask: `model` of the settings, else the only one that it serves.

        In the latter case also sets `config.model`, so that the server is asked once. Raises ConfigError if none is set and
        the server does not serve exactly one.
        """
        if self.config.model is not None:
            return self.config.model
        names = [str(model["id"]) for model in self.list_models()]
        if len(names) != 1:
            raise ConfigError(
                f"{self.setting_prefix}.model: not set, and the server at {self.config.url} serves "
                f"{', '.join(names[:20]) or 'none'}; name it"
            )
        self.config.model = names[0]
        return names[0]


def tokens_used(answer: Any, field_name: str) -> int | None:
    """A number of the `usage` of a server's answer, such as `total_tokens`; None if the server does not send it."""
    tokens = getattr(getattr(answer, "usage", None), field_name, None)
    return tokens if isinstance(tokens, int) else None


def first_choice(answer: Any) -> Any:
    """The first of the answer's `choices`; None if it has none, or is no answer of such a server at all."""
    choices = getattr(answer, "choices", None)
    return choices[0] if isinstance(choices, list) and choices else None


def _error_text(error: Any) -> str:
    """What the server said of a refused request, in one line of at most 300 characters."""
    message = None
    if isinstance(error.body, dict):
        message = error.body.get("message")
    return " ".join(str(message or error.message).split())[:300]
