"""How a chat template wants calls of tools and their results: found by a probe, once a template."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from trainer.data.document import Message
from trainer.data.tokens.skeleton import RESERVED

CALL, EDGE = RESERVED[3], RESERVED[4]
_RESPONSE = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)


class Apply(Protocol):
    """Renders messages with tools, with the header of the turn to come if `prompt`."""

    def __call__(
        self, messages: list[Message], *, prompt: bool = False, tools: list[dict[str, Any]] | None = None
    ) -> str: ...


@dataclass(slots=True)
class Dialect:
    """What a template wants."""

    as_text: bool = False
    """Arguments as a JSON text instead of an object."""
    null: bool = False
    """null for the content of a turn that only calls, instead of an empty text."""
    wraps: bool = False
    """Whether it writes `<tool_response>` around results itself."""
    ends: frozenset[str] = frozenset()
    """Tokens that close a turn with calls."""


def probed(apply: Apply, added: list[str]) -> Dialect:
    """The first way to give calls in which the template writes their name and their arguments as JSON or text."""
    name, value, result = f"{CALL}name", f"{EDGE}value", f"{EDGE}result"
    for as_text, null in ((False, False), (False, True), (True, False), (True, True)):
        given: Any = {"key": value}
        turn = _call(name, json.dumps(given, ensure_ascii=False) if as_text else given, "abcdefghi")
        messages = [{"role": "user", "content": "q"}, {**turn, "content": None if null else ""}]
        try:
            text = apply(messages)
        except Exception:  # noqa: BLE001 - the next way may do; if none does, the conversation itself says why
            continue
        if name not in text or value not in text or f"{{'key': '{value}" in text:
            continue
        tail = text[text.rindex(value) + len(value) :]
        ends = [token for token in added if token in tail]
        end = max(ends, key=lambda token: tail.rindex(token) + len(token), default="")
        answer = {"role": "tool", "content": result, "name": "name", "tool_call_id": "abcdefghi"}
        try:
            wraps = f"<tool_response>\n{result}" in apply([*messages, answer])
        except Exception:  # noqa: BLE001 - as above
            wraps = False
        return Dialect(as_text, null, wraps, frozenset({end} - {""}))
    return Dialect()


def in_dialect(messages: list[Message], dialect: Dialect) -> Iterator[Message]:
    """The messages as the template wants them; calls without an id get one, and results answer calls in order."""
    waiting: list[str] = []
    for number, message in enumerate(messages):
        if "tool_calls" in message:
            calls = []
            for place, call in enumerate(message["tool_calls"]):
                inner, given = call["function"], call["function"]["arguments"]
                if dialect.as_text and not isinstance(given, str):
                    given = json.dumps(given, ensure_ascii=False)
                seed = f"{number} {place} {json.dumps(inner, ensure_ascii=False)}".encode()
                own = call.get("id") or hashlib.blake2b(seed, digest_size=8).hexdigest()[:9]
                calls.append({**call, "id": own, "function": {**inner, "arguments": given}})
            waiting = [call["id"] for call in calls]
            message = {**message, "tool_calls": calls}
            if dialect.null and not message["content"]:
                message["content"] = None
        elif message["role"] == "tool":
            answers = waiting.pop(0) if waiting else None
            if answers and "tool_call_id" not in message:
                message = {**message, "tool_call_id": answers}
            wrapped = _RESPONSE.fullmatch(message["content"]) if dialect.wraps else None
            if wrapped and "<tool_response>" not in wrapped.group(1):
                message = {**message, "content": wrapped.group(1)}
        yield message


def _call(name: str, arguments: Any, identity: str) -> Message:
    call = {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}
