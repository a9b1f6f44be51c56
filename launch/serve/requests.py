"""Checks a request before the model sees it. A refusal has OpenAI's error format.

A field that the engine would silently ignore is an error, unless its value changes nothing.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ROLES = ("system", "developer", "user", "assistant", "tool")
NEUTRAL: dict[str, list[Any]] = {
    "n": [1],
    "best_of": [1],
    "logprobs": [False],
    "top_logprobs": [0],
    "echo": [False],
    "presence_penalty": [0],
    "frequency_penalty": [0],
    "logit_bias": [{}],
    "response_format": [{"type": "text"}],
    "parallel_tool_calls": [True],
    "store": [False],
    "service_tier": ["auto", "default"],
    "modalities": [["text"]],
}
"""Fields that no engine here computes, with the values at which they change nothing."""
NOTES = ("user", "metadata", "stream_options", "safety_identifier", "prompt_cache_key")
"""Fields that say who asks, or ask for what always comes: usage stands in the last part of a stream."""


class RefusedRequest(Exception):
    """A request that is not answered."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """As OpenAI's servers tell it."""
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(self.status)
        return {
            "error": {
                "message": self.message,
                "type": kind or ("invalid_request_error" if self.status < 500 else "server_error"),
                "param": self.param,
                "code": self.code,
            }
        }


def refuse(param: str, message: str, code: str | None = None) -> RefusedRequest:
    """A 400 about one field."""
    return RefusedRequest(400, f"{param}: {message}", param, code)


@dataclass(frozen=True, slots=True)
class Served:
    """What requests are checked against."""

    name: str
    tokenizer: Any
    positions: int
    """Most tokens of a prompt and its answer together."""
    max_tokens: int
    samples: bool
    """Whether the export's own generation settings draw."""
    batching: bool = False


def checked(path: str, sent: dict[str, Any], served: Served) -> dict[str, Any]:
    """The body that the engine gets. Raises RefusedRequest."""
    body = {key: value for key, value in sent.items() if value is not None and key not in NOTES}
    _neutral(body)
    named = body.get("model", served.name)
    if named != served.name:
        message = f"model: there is no {named!r} here; this server has {served.name!r} alone"
        raise RefusedRequest(404, message, "model", "model_not_found")
    asked = {"model": served.name, "stream": _one(body.pop("stream", False), bool, "stream", "true or false")}
    body.pop("model", None)
    prompt = _chat(body, asked, served) if path == CHAT else _text(body, asked, served)
    _sampling(body, asked, served)
    _lengths(body, asked, served, prompt, path)
    if body:
        raise refuse(min(body), "this server knows no such field")
    return asked


def _neutral(body: dict[str, Any]) -> None:
    for key in NEUTRAL.keys() & body.keys():
        value = body.pop(key)
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in NEUTRAL[key]):
            allowed = " or ".join(json.dumps(one) for one in NEUTRAL[key])
            raise refuse(key, f"this server computes only {allowed}", "unsupported_value")


def _one(
    value: Any, kind: type | tuple[type, ...], param: str, rule: str, holds: Callable[[Any], bool] | None = None
) -> Any:
    right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not right or (holds is not None and not holds(value)):
        shown = json.dumps(value)
        raise refuse(param, f"must be {rule}, not {shown if len(shown) < 60 else type(value).__name__}")
    return value


def _chat(body: dict[str, Any], asked: dict[str, Any], served: Served) -> int:
    """Takes messages and tools over; returns how many tokens they are."""
    messages = _one(body.pop("messages", None), list, "messages", "a list with at least one message", bool)
    for number, message in enumerate(messages):
        _message(message, f"messages[{number}]")
    asked["messages"] = messages
    choice = body.pop("tool_choice", "auto")
    tools = _one(body.pop("tools", []), list, "tools", "a list of functions")
    for number, tool in enumerate(tools):
        if not isinstance(tool, dict) or not isinstance((tool.get("function") or {}).get("name"), str):
            raise refuse(f"tools[{number}]", "must be {type: function, function: {name, ...}}")
    if choice not in ("auto", "none"):
        raise refuse("tool_choice", "this server computes only auto or none", "unsupported_value")
    if tools and choice == "auto":
        asked["tools"] = tools
    if "chat_template_kwargs" in body:
        asked["chat_template_kwargs"] = _template_words(body.pop("chat_template_kwargs"), served.tokenizer)
    return _rendered(asked, served)


def _template_words(words: Any, tokenizer: Any) -> dict[str, Any]:
    own = inspect.signature(tokenizer.apply_chat_template).parameters
    _one(words, dict, "chat_template_kwargs", "an object of the template's own words")
    for key, value in words.items():
        if key in own or not isinstance(value, bool | str | int | float):
            raise refuse(f"chat_template_kwargs.{key}", "is no word of a template, or has no plain value")
    return words


def _message(message: Any, param: str) -> None:
    _one(message, dict, param, "an object with role and content")
    _one(message.get("role"), str, f"{param}.role", f"one of {', '.join(ROLES)}", lambda role: role in ROLES)
    calls = message.get("tool_calls")
    if calls:
        _one(calls, list, f"{param}.tool_calls", "a list")
        for call in calls:
            function = call.get("function") if isinstance(call, dict) else None
            arguments = function.get("arguments") if isinstance(function, dict) else None
            if not isinstance(arguments, str | dict) or not isinstance(function.get("name"), str):  # type: ignore[union-attr]
                raise refuse(f"{param}.tool_calls", "each must be {function: {name, arguments}}")
            try:
                parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
            except ValueError:
                parsed = None
            _one(parsed, dict, f"{param}.tool_calls", "calls with arguments that are a JSON object")
        return
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise refuse(f"{param}.content", "this model reads text: parts must be {type: text, text: ...}")
        return
    _one(content, str, f"{param}.content", "a text")


def _rendered(asked: dict[str, Any], served: Served) -> int:
    if served.tokenizer.chat_template is None:
        raise RefusedRequest(400, f"{served.name} has no chat template; send the whole prompt to {TEXT}", "messages")
    messages = [{**each, "content": _plain(each.get("content"))} for each in asked["messages"]]
    for each in messages:
        calls = [dict(call) for call in each.get("tool_calls") or []]
        for call in calls:
            if isinstance((call.get("function") or {}).get("arguments"), str):
                call["function"] = {**call["function"], "arguments": json.loads(call["function"]["arguments"])}
        if calls:
            each["tool_calls"] = calls
    words = asked.get("chat_template_kwargs", {})
    try:
        ids = served.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tools=asked.get("tools"), return_dict=False, **words
        )
    except Exception as error:  # noqa: BLE001 - what a template refuses it tells in types of its own
        raise refuse("messages", f"the model's chat template refuses them ({' '.join(str(error).split())})") from None
    return len(ids)


def _plain(content: Any) -> str:
    return " ".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def _text(body: dict[str, Any], asked: dict[str, Any], served: Served) -> int:
    asked["prompt"] = _one(
        body.pop("prompt", None), str, "prompt", "a text (this server takes no lists and no token ids)"
    )
    if "suffix" in body:
        raise refuse("suffix", "this server fills no gaps; leave it out", "unsupported_value")
    try:
        ids = served.tokenizer(asked["prompt"])["input_ids"]
    except Exception as error:  # noqa: BLE001 - a text that is no Unicode has an error type of the tokenizer's
        raise refuse("prompt", f"cannot be read as text ({' '.join(str(error).split())[:80]})") from None
    if not ids:
        raise refuse("prompt", "is empty")
    return len(ids)


def _sampling(body: dict[str, Any], asked: dict[str, Any], served: Served) -> None:
    """Temperature is always told to the engine: it draws or not as the export does where nobody says."""
    number = (int, float)
    found = {}
    if "temperature" in body:
        rule = "a number from 0 to 2"
        found["temperature"] = _one(body.pop("temperature"), number, "temperature", rule, lambda v: 0 <= v <= 2)
    if "top_p" in body:
        rule = "a number above 0 and at most 1"
        found["top_p"] = _one(body.pop("top_p"), number, "top_p", rule, lambda v: 0 < v <= 1)
    if "seed" in body:
        rule = "a whole number from 0 to 2^63 - 1"
        found["seed"] = _one(body.pop("seed"), int, "seed", rule, lambda v: 0 <= v < 2**63)
    if "stop" in body:
        stop = body.pop("stop")
        stop = [stop] if isinstance(stop, str) else stop
        rule = "a text, or up to 4 texts that are not empty"
        good = isinstance(stop, list) and 0 < len(stop) <= 4 and all(isinstance(each, str) and each for each in stop)
        found["stop"] = _one(stop, list, "stop", rule, lambda _: good)
    if found and served.batching:
        why = "this server answers many requests at once (serve.batching=true), all sampled as the export says"
        raise refuse(min(found), f"{why}; leave it out", "unsupported_value")
    if not served.batching and "temperature" not in found and not served.samples:
        found["temperature"] = 1.0 if "top_p" in found or "seed" in found else 0.0
    asked |= found


def _lengths(body: dict[str, Any], asked: dict[str, Any], served: Served, prompt: int, path: str) -> None:
    room = served.positions - prompt
    key = "max_completion_tokens" if path == CHAT and "max_completion_tokens" in body else "max_tokens"
    wanted = body.pop(key, None)
    body.pop("max_tokens", None)  # where a client sends both, the newer name holds
    if wanted is not None:
        rule = f"a whole number from 1 to {served.max_tokens} (serve.max_tokens)"
        _one(wanted, int, key, rule, lambda value: 1 <= value <= served.max_tokens)
    if room < (wanted or 1):
        raise RefusedRequest(
            400,
            f"the prompt has {prompt} tokens, the answer {wanted or 'at least 1'}; the model takes {served.positions} together",
            "messages" if path == CHAT else "prompt",
            "context_length_exceeded",
        )
    asked["max_tokens"] = wanted or int(min(served.max_tokens, room, math.inf))
