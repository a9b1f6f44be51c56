"""Tools that a model may call, and its calls, in the spellings that rows have, as OpenAI's, which chat templates read.

A tool is `{"type": "function", "function": {"name", "description", "parameters"}}`, a call is `{"type": "function",
"function": {"name", "arguments"}}`, perhaps with an `id`. Arguments that are a JSON text of an object become that object.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from trainer.data.fields import Refusal, is_nothing, shown

_EACH = '{"name": ..., "arguments": {...}}, perhaps below "function"'


def tools_of(value: Any) -> list[dict[str, Any]] | None:
    """The tools of a column: a list, or a JSON text of one; None where there are none. Raises Refusal: bad_tools."""
    if is_nothing(value):
        return None
    found = _parsed(value) if isinstance(value, str) else value
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, list):
        raise Refusal(
            "bad_tools", f'"tools" is {shown(value)}; it must be a list of JSON schemas, or a JSON text of it'
        )
    tools = []
    for number, tool in enumerate(found, 1):
        bare = isinstance(tool, dict) and "function" not in tool
        tool = {"type": "function", "function": tool} if bare else tool
        inner = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"].strip():
            needs = '{"name": ..., "description": ..., "parameters": {...}}, perhaps below "function"'
            raise Refusal("bad_tools", f"tools[{number}] is {shown(tool)}; it must be {needs}")
        tools.append(tool)
    return _as_json(tools, "tools")


def are_told(system: str, tools: list[dict[str, Any]]) -> bool:
    """Whether a system turn tells the tools already, as in Hermes' data, so that a template must not tell them again."""
    return "<tools>" in system and all(json.dumps(tool["function"]["name"])[1:-1] in system for tool in tools)


def calls_of(value: Any, name: str) -> list[dict[str, Any]]:
    """The calls of a turn: one or a list, or a JSON text of it. Raises Refusal: bad_tool_calls."""
    found = _parsed(value) if isinstance(value, str) else value
    calls = []
    for number, call in enumerate([found] if isinstance(found, dict) else found if isinstance(found, list) else [], 1):
        inner = call.get("function", call) if isinstance(call, dict) else None
        called = inner.get("name") if isinstance(inner, dict) else None
        arguments: Any = (inner or {}).get("arguments", (inner or {}).get("parameters"))
        parsed = _parsed(arguments) if isinstance(arguments, str) else arguments
        arguments = parsed if isinstance(parsed, dict) else {} if arguments in (None, "") else arguments
        if not isinstance(called, str) or not called.strip() or not isinstance(arguments, dict | str):
            raise Refusal("bad_tool_calls", f"{name}[{number}] is {shown(call)}; a call must be {_EACH}")
        own = {"id": call["id"]} if isinstance(call.get("id"), str) and call["id"] else {}
        calls.append({**own, "type": "function", "function": {"name": called, "arguments": arguments}})
    if not calls:
        raise Refusal("bad_tool_calls", f"{name} is {shown(value)}; it must be a call or a list of calls, each {_EACH}")
    return _as_json(calls, name)


def texts_of(value: Any) -> Iterator[str]:
    """The texts in the arguments of calls (a list of calls, or anything inside), without names and keys."""
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, dict):
        for inner in [value["function"]["arguments"]] if "function" in value else value.values():
            yield from texts_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_of(inner)


def with_texts(value: Any, change: Callable[[str], str], key: Callable[[str], str] = str) -> Any:
    """Arguments of a call with every text changed, and every key by `key`."""
    if isinstance(value, str):
        return change(value) if value.strip() else value
    if isinstance(value, dict):
        return {key(name): with_texts(inner, change, key) for name, inner in value.items()}
    return [with_texts(inner, change, key) for inner in value] if isinstance(value, list) else value


def _as_json(value: Any, name: str) -> Any:
    """The value, if it is one that JSON and UTF-8 can have. Raises Refusal."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise Refusal("bad_tools", f"{name} cannot be written as JSON: {error}") from None
    return value


def _parsed(text: str) -> Any:
    """The value of a JSON text; the text itself where it is none, or where reading it would lose a key."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(name)
