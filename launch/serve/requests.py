"""Checks a request before the model sees it. A refusal has OpenAI's error format.

A field that the engine would silently ignore is an error, unless its value changes nothing.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CHAT_PATH = "/v1/chat/completions"
COMPLETION_PATH = "/v1/completions"
ROLES = ("system", "developer", "user", "assistant", "tool")
NEUTRAL_VALUES_BY_FIELD: dict[str, list[Any]] = {
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
IGNORED_FIELD_NAMES = ("user", "metadata", "stream_options", "safety_identifier", "prompt_cache_key")
"""Fields that say who asks, or ask for what always comes: usage stands in the last part of a stream."""


class RefusedRequest(Exception):
    """An HTTP error in place of an answer. `param`: the field of the request that is wrong; `code`: OpenAI's code."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The body of the HTTP answer: the error in OpenAI's format, from which OpenAI's clients raise errors of their own."""
        type_by_status = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        default_type = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": self.message,
                "type": type_by_status.get(self.status, default_type),
                "param": self.param,
                "code": self.code,
            }
        }


def request_field_error(param: str, message: str, code: str | None = None) -> RefusedRequest:
    """The HTTP error 400 about one field of a request: "<param>: <message>". `code`: OpenAI's code of the error."""
    return RefusedRequest(400, f"{param}: {message}", param, code)


@dataclass(frozen=True, slots=True)
class ServedTextModel:
    """What a server knows of its model, against which requests are checked."""

    name: str
    tokenizer: Any
    context_length: int
    """Most tokens of a prompt and its answer together."""
    max_tokens: int
    """Most new tokens of an answer."""
    samples_by_default: bool
    """Whether the export's own generation settings sample."""
    batches_requests: bool = False
    """Whether many requests are computed at once, all with the export's own settings."""


def translate_request(path: str, request: dict[str, Any], served: ServedTextModel) -> dict[str, Any]:
    """Check the body of a request to an OpenAI address, and translate it to what the engine computes.

    The engine is transformers' server; vLLM checks the fields of its requests itself. Fields at a value that changes nothing
    (`NEUTRAL_VALUES_BY_FIELD`) are left out. {"messages": [...], "seed": 3, "n": 1} -> {"model": ..., "stream": False,
    "messages": [...], "seed": 3, "temperature": 1.0, "max_tokens": ...}. Raises RefusedRequest for a field that the engine
    would ignore or cannot compute.
    """
    # Each step moves its fields from `body` to `engine_body`: what is left at the end is unknown.
    body = {key: value for key, value in request.items() if value is not None and key not in IGNORED_FIELD_NAMES}
    _drop_neutral_fields(body)
    model_name = body.pop("model", served.name)
    if model_name != served.name:
        message = f"model: there is no {model_name!r} here; this server has {served.name!r} alone"
        raise RefusedRequest(404, message, param="model", code="model_not_found")
    stream = _require_field(body.pop("stream", False), bool, "stream", "true or false")
    engine_body = {"model": served.name, "stream": stream}
    if path == CHAT_PATH:
        num_prompt_tokens = _move_messages_and_count_tokens(body, engine_body, served)
    else:
        num_prompt_tokens = _move_prompt_and_count_tokens(body, engine_body, served)
    _check_and_move_sampling(body, engine_body, served)
    _set_max_answer_tokens(body, engine_body, served, num_prompt_tokens, path)
    if body:
        raise request_field_error(min(body), "this server knows no such field")
    return engine_body


def _drop_neutral_fields(body: dict[str, Any]) -> None:
    """Remove fields that no engine here computes from a request, if their values ask for nothing: n=1, logit_bias={}.

    Clients send such defaults. Raises RefusedRequest for any other value, since it would be ignored.
    """
    for key in NEUTRAL_VALUES_BY_FIELD.keys() & body.keys():
        value = body.pop(key)
        if not any(_is_same_json_value(value, neutral) for neutral in NEUTRAL_VALUES_BY_FIELD[key]):
            allowed = " or ".join(json.dumps(neutral) for neutral in NEUTRAL_VALUES_BY_FIELD[key])
            raise request_field_error(key, f"this server computes only {allowed}", "unsupported_value")


def _is_same_json_value(value: Any, neutral: Any) -> bool:
    """Whether a value is the neutral one in JSON too, where 1 and true differ: in Python they are equal."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _require_field(
    value: Any,
    expected_type: type | tuple[type, ...],
    field_name: str,
    requirement: str,
    is_valid: Callable[[Any], bool] | None = None,
) -> Any:
    """Return the value of a field of a request if it has the expected type and `is_valid` returns True for it.

    Otherwise raises RefusedRequest: "<field_name>: must be <requirement>, not <value>", such as "seed: must be a whole number
    from 0 to 2^63 - 1, not -1".
    """
    # In Python a bool is an int, so `true` would pass for a number.
    has_type = isinstance(value, expected_type) and (expected_type is bool or not isinstance(value, bool))
    if not has_type or (is_valid is not None and not is_valid(value)):
        value_text = json.dumps(value)
        # A long text would hide the requirement.
        shown_value = value_text if len(value_text) < 60 else type(value).__name__
        raise request_field_error(field_name, f"must be {requirement}, not {shown_value}")
    return value


def _move_messages_and_count_tokens(body: dict[str, Any], engine_body: dict[str, Any], served: ServedTextModel) -> int:
    """Check what a chat consists of (messages, tools, template variables), and move it from `body` to `engine_body`.

    Returns the chat's number of tokens, by which the answer's length is limited. `body`: the fields of the request that were
    not handled yet. With tool_choice "none", the tools are checked and left out. Raises RefusedRequest.
    """
    messages = _require_field(
        body.pop("messages", None), list, "messages", "a list with at least one message", is_valid=bool
    )
    for number, message in enumerate(messages):
        _check_message(message, f"messages[{number}]")
    engine_body["messages"] = messages
    _move_tools(body, engine_body)
    if "chat_template_kwargs" in body:
        engine_body["chat_template_kwargs"] = _require_template_variables(
            body.pop("chat_template_kwargs"), served.tokenizer
        )
    return _count_chat_tokens(engine_body, served)


def _move_tools(body: dict[str, Any], engine_body: dict[str, Any]) -> None:
    """Check the functions that the model may call (`tools`), and move them from `body` to `engine_body`. Raises RefusedRequest.

    With tool_choice "none" they are checked and left out: the model then does not hear of them.
    """
    choice = body.pop("tool_choice", "auto")
    tools = _require_field(body.pop("tools", []), list, "tools", "a list of functions")
    for number, tool in enumerate(tools):
        if not isinstance(tool, dict) or not isinstance((tool.get("function") or {}).get("name"), str):
            raise request_field_error(f"tools[{number}]", "must be {type: function, function: {name, ...}}")
    if choice not in ("auto", "none"):
        raise request_field_error("tool_choice", "this server computes only auto or none", "unsupported_value")
    if tools and choice == "auto":
        engine_body["tools"] = tools


def _require_template_variables(arguments: Any, tokenizer: Any) -> dict[str, Any]:
    """Return the field `chat_template_kwargs`, variables of the chat template such as {"thinking": false}, if it is usable.

    Raises RefusedRequest unless each value is a text, a number or a bool.
    """
    # A variable that is called like a parameter of apply_chat_template would set that, and not reach the template.
    own_parameters = inspect.signature(tokenizer.apply_chat_template).parameters
    _require_field(arguments, dict, "chat_template_kwargs", "an object of the template's own words")
    for key, value in arguments.items():
        if key in own_parameters or not isinstance(value, bool | str | int | float):
            raise request_field_error(f"chat_template_kwargs.{key}", "is no word of a template, or has no plain value")
    return arguments


def _check_message(message: Any, place: str) -> None:
    """Check one message of a chat: raises RefusedRequest if no chat template could render it. `place`: such as "messages[2]".

    What a message must have:
    - its role must be one of `ROLES`;
    - with tool calls: each must name a function; content is not needed;
    - else its content must be a text, or a list of parts that are texts.
    """
    _require_field(message, dict, place, "an object with role and content")
    _require_field(message.get("role"), str, f"{place}.role", f"one of {', '.join(ROLES)}", lambda role: role in ROLES)
    tool_calls = message.get("tool_calls")
    if tool_calls:
        _require_field(tool_calls, list, f"{place}.tool_calls", "a list")
        for tool_call in tool_calls:
            _check_tool_call(tool_call, f"{place}.tool_calls")
        return
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise request_field_error(
                    f"{place}.content", "this model reads text: parts must be {type: text, text: ...}"
                )
        return
    _require_field(content, str, f"{place}.content", "a text")


def _check_tool_call(tool_call: Any, place: str) -> None:
    """Check a call of a function that a message of the model contains; raises RefusedRequest if a template could not render it.

    It must have a name, and arguments that are a JSON object or its text. `place`: such as "messages[2].tool_calls".
    """
    function = tool_call.get("function") if isinstance(tool_call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise request_field_error(place, "each must be {function: {name, arguments}}")
    arguments = function.get("arguments")
    if not isinstance(arguments, str | dict):
        raise request_field_error(place, "each must be {function: {name, arguments}}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    _require_field(arguments, dict, place, "calls with arguments that are a JSON object")


def _count_chat_tokens(engine_body: dict[str, Any], served: ServedTextModel) -> int:
    """Count the tokens that a chat has when the model's chat template writes it out, to know how long the answer may be.

    `engine_body`: with the messages, tools and template variables of the chat. Raises RefusedRequest (400) if the model has no
    template, or if the template refuses the messages.
    """
    if served.tokenizer.chat_template is None:
        raise RefusedRequest(
            400, f"{served.name} has no chat template; send the whole prompt to {COMPLETION_PATH}", param="messages"
        )
    messages = [_message_for_template(message) for message in engine_body["messages"]]
    template_arguments = engine_body.get("chat_template_kwargs", {})
    try:
        ids = served.tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tools=engine_body.get("tools"),
            return_dict=False,
            **template_arguments,
        )
    except Exception as error:  # noqa: BLE001 - a template refuses by errors of its own types
        raise request_field_error(
            "messages", f"the model's chat template refuses them ({' '.join(str(error).split())})"
        ) from None
    return len(ids)


def _message_for_template(message: dict[str, Any]) -> dict[str, Any]:
    """Bring a message of OpenAI's API into the form that chat templates read: content is one text, arguments are an object.

    The API allows a list of parts as content, and has the arguments of a tool call as JSON text.
    {"role": "user", "content": [{"text": "a"}, {"text": "b"}]} -> {"role": "user", "content": "a b"}
    """
    content = message.get("content")
    if isinstance(content, list):
        content = " ".join(part["text"] for part in content)
    template_message = {**message, "content": content or ""}
    tool_calls = []
    for tool_call in message.get("tool_calls") or []:
        function = tool_call.get("function") or {}
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            tool_call = {**tool_call, "function": {**function, "arguments": json.loads(arguments)}}
        tool_calls.append(tool_call)
    if tool_calls:
        template_message["tool_calls"] = tool_calls
    return template_message


def _move_prompt_and_count_tokens(body: dict[str, Any], engine_body: dict[str, Any], served: ServedTextModel) -> int:
    """Check the prompt of a completion (a text to go on with, no chat), and move it from `body` to `engine_body`.

    Returns its number of tokens, by which the answer's length is limited. Raises RefusedRequest.
    """
    engine_body["prompt"] = _require_field(
        body.pop("prompt", None), str, "prompt", "a text (this server takes no lists and no token ids)"
    )
    if "suffix" in body:
        raise request_field_error("suffix", "this server fills no gaps; leave it out", "unsupported_value")
    try:
        ids = served.tokenizer(engine_body["prompt"])["input_ids"]
    except Exception as error:  # noqa: BLE001 - a text that is no Unicode has an error type of the tokenizer's
        raise request_field_error("prompt", f"cannot be read as text ({' '.join(str(error).split())[:80]})") from None
    if not ids:
        raise request_field_error("prompt", "is empty")
    return len(ids)


def _check_and_move_sampling(body: dict[str, Any], engine_body: dict[str, Any], served: ServedTextModel) -> None:
    """Check how a request wants its answer sampled (temperature, top_p, seed, stop), and move that to `engine_body`.

    Raises RefusedRequest.
    Without a temperature in the request, the engine gets 1.0 if the request has top_p or a seed, else 0.0 (greedy); none if the
    export's own settings sample, or the server batches requests (then any of these fields is refused).
    """
    sampling = {}
    if "temperature" in body:
        rule = "a number from 0 to 2"
        sampling["temperature"] = _require_field(
            body.pop("temperature"), (int, float), "temperature", rule, lambda v: 0 <= v <= 2
        )
    if "top_p" in body:
        rule = "a number above 0 and at most 1"
        sampling["top_p"] = _require_field(body.pop("top_p"), (int, float), "top_p", rule, lambda v: 0 < v <= 1)
    if "seed" in body:
        rule = "a whole number from 0 to 2^63 - 1"
        sampling["seed"] = _require_field(body.pop("seed"), int, "seed", rule, lambda v: 0 <= v < 2**63)
    if "stop" in body:
        stop = body.pop("stop")
        if isinstance(stop, str):
            stop = [stop]
        rule = "a text, or up to 4 texts that are not empty"
        sampling["stop"] = _require_field(stop, list, "stop", rule, _are_stop_texts)
    # What does not fit this server, and what is added.
    if sampling and served.batches_requests:
        why = "this server answers many requests at once (serve.batching=true), all sampled as the export says"
        first_field = min(sampling)  # by the alphabet: one field is named, the same one every time
        raise request_field_error(first_field, f"{why}; leave it out", "unsupported_value")
    if not served.batches_requests and "temperature" not in sampling and not served.samples_by_default:
        # A client that sends top_p or a seed wants samples; else the answer is greedy, as the export's own settings are.
        sampling["temperature"] = 1.0 if "top_p" in sampling or "seed" in sampling else 0.0
    engine_body |= sampling


def _are_stop_texts(stops: list[Any]) -> bool:
    """Whether it is a list of one to four texts that are not empty."""
    return 0 < len(stops) <= 4 and all(isinstance(text, str) and text for text in stops)


def _set_max_answer_tokens(
    body: dict[str, Any], engine_body: dict[str, Any], served: ServedTextModel, num_prompt_tokens: int, path: str
) -> None:
    """Settle how many tokens the answer may have: the length that the request asks for, moved to `engine_body` as `max_tokens`.

    Without one it is the longest that fits, at most `serve.max_tokens`. In a chat, `max_completion_tokens` counts before
    `max_tokens`. Raises RefusedRequest for a wrong length, or if prompt and answer do not fit into the model's context.
    """
    max_answer_tokens = served.context_length - num_prompt_tokens
    key = "max_tokens"
    if path == CHAT_PATH and "max_completion_tokens" in body:
        key = "max_completion_tokens"
    requested_tokens = body.pop(key, None)
    body.pop("max_tokens", None)  # if a client sends both, the newer name counts
    if requested_tokens is not None:
        rule = f"a whole number from 1 to {served.max_tokens} (serve.max_tokens)"
        _require_field(requested_tokens, int, key, rule, lambda tokens: 1 <= tokens <= served.max_tokens)
    if max_answer_tokens < (requested_tokens or 1):
        raise RefusedRequest(
            400,
            f"the prompt has {num_prompt_tokens} tokens, the answer {requested_tokens or 'at least 1'}; "
            f"the model takes {served.context_length} together",
            param="messages" if path == CHAT_PATH else "prompt",
            code="context_length_exceeded",
        )
    engine_body["max_tokens"] = requested_tokens or int(min(served.max_tokens, max_answer_tokens))
