"""How a chat template wants tool calls and their results (its dialect), found by trial; conversations are put into that form."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from trainer.data.document import Message
from trainer.data.tokens.marking import RESERVED_CHARACTERS, Render

CALL_MARK = RESERVED_CHARACTERS[3]
"""Stands before and after the name, the arguments and the keys of a call."""
TURN_EDGE_MARK = RESERVED_CHARACTERS[4]
"""Stands where one turn ends or the next begins."""
_TOOL_RESPONSE_REGEX = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)


@dataclass(slots=True)
class ToolCallDialect:
    """How a chat template wants tool calls and their results. Templates differ, and do not say so."""

    arguments_as_text: bool = False
    """Arguments as a JSON text instead of an object."""
    null_content: bool = False
    """null for the content of a turn that only calls, instead of an empty text."""
    template_wraps_results: bool = False
    """Whether the template itself writes `<tool_response>` around results."""
    end_tokens: frozenset[str] = frozenset()
    """Tokens that close a turn with calls."""


def find_dialect_by_trial(render: Render, added_tokens: list[str]) -> ToolCallDialect:
    """Find out how a chat template wants tool calls: the first way to give one in which it writes name and argument whole.

    Renders a small conversation with one call in each way: arguments as an object or as JSON text, the content beside the call an
    empty text or None. If no way works, the dialect is the default one, and the conversations of the data say what is wrong.

    `added_tokens`: those of the tokenizer. The last of them behind the call is taken for the one that closes a turn with calls.
    """
    # With private-use characters (not as marks here), so that no text of the template itself is taken for them.
    name = f"{CALL_MARK}name"
    argument = f"{TURN_EDGE_MARK}value"
    for arguments_as_text, null_content in itertools.product((False, True), repeat=2):
        messages = _conversation_with_call(
            name, argument, arguments_as_text=arguments_as_text, null_content=null_content
        )
        try:
            text = render(messages)
        except Exception:  # noqa: BLE001 - the next way may do; if none does, the conversation itself says why
            continue
        # Python's notation of a dictionary instead of JSON: the template printed an object it expected as text.
        printed_object = f"{{'key': '{argument}" in text
        if name not in text or argument not in text or printed_object:
            continue
        end_token = _last_token(text[text.rindex(argument) + len(argument) :], added_tokens)
        return ToolCallDialect(
            arguments_as_text=arguments_as_text,
            null_content=null_content,
            template_wraps_results=_wraps_tool_results(render, messages),
            end_tokens=frozenset() if end_token is None else frozenset({end_token}),
        )
    return ToolCallDialect()


def _conversation_with_call(name: str, argument: str, *, arguments_as_text: bool, null_content: bool) -> list[Message]:
    """Make the conversation by which the dialect is found: a question, and an assistant turn with one tool call.

    It calls the function `name` with the argument {"key": `argument`}. `null_content`: None as the content beside the call, else
    "".
    """
    arguments: Any = {"key": argument}
    if arguments_as_text:
        arguments = json.dumps(arguments, ensure_ascii=False)
    # Nine letters: Mistral's templates refuse ids of another length.
    calls = [{"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": arguments}}]
    turn = {"role": "assistant", "content": None if null_content else "", "tool_calls": calls}
    return [{"role": "user", "content": "q"}, turn]


def _last_token(text: str, tokens: list[str]) -> str | None:
    """The one of `tokens` that ends last in a text; None if the text has none of them."""
    found_tokens = [token for token in tokens if token in text]
    return max(found_tokens, key=lambda token: text.rindex(token) + len(token), default=None)


def _wraps_tool_results(render: Render, messages: list[Message]) -> bool:
    """Whether the template writes `<tool_response>` around the result of the call at the end of `messages`."""
    content = f"{TURN_EDGE_MARK}result"
    answer = {"role": "tool", "content": content, "name": "name", "tool_call_id": "abcdefghi"}
    try:
        return f"<tool_response>\n{content}" in render([*messages, answer])
    except Exception:  # noqa: BLE001 - a template that refuses results says so when a conversation has one
        return False


def convert_to_dialect(messages: list[Message], dialect: ToolCallDialect) -> Iterator[Message]:
    """Put the messages of a conversation with tool calls into the form that its chat template wants.

    Calls without an id get one. Results without the id of a call answer the calls before them in order. Results that are wrapped
    in `<tool_response>` already are unwrapped if the template wraps them itself.
    """
    unanswered_ids: list[str] = []
    for turn_index, message in enumerate(messages):
        # A turn with calls: each call gets an id, and the next results answer them.
        if "tool_calls" in message:
            calls = []
            for call_index, call in enumerate(message["tool_calls"]):
                calls.append(_call_in_dialect(call, dialect, turn_index, call_index))
            unanswered_ids = [call["id"] for call in calls]
            message = {**message, "tool_calls": calls}
            if dialect.null_content and not message["content"]:
                message["content"] = None
        elif message["role"] == "tool":
            answered_id = unanswered_ids.pop(0) if unanswered_ids else None
            if answered_id and "tool_call_id" not in message:
                message = {**message, "tool_call_id": answered_id}
            if dialect.template_wraps_results:
                # The template would wrap a result that is wrapped already once more.
                wrapped = _TOOL_RESPONSE_REGEX.fullmatch(message["content"])
                if wrapped and "<tool_response>" not in wrapped.group(1):
                    message = {**message, "content": wrapped.group(1)}
        yield message


def _call_in_dialect(
    call: dict[str, Any], dialect: ToolCallDialect, turn_index: int, call_index: int
) -> dict[str, Any]:
    """Put one tool call into the form that the chat template wants, with an id.

    `turn_index` and `call_index`: where the call stands in the conversation. A missing id is a hash of that and of the call's
    content, so that it is the same in every run.
    """
    function = call["function"]
    arguments = function["arguments"]
    if dialect.arguments_as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    call_id = call.get("id")
    if not call_id:
        position_and_content = f"{turn_index} {call_index} {json.dumps(function, ensure_ascii=False)}"
        digest = hashlib.blake2b(position_and_content.encode(), digest_size=8).hexdigest()
        call_id = digest[:9]  # Mistral's templates refuse ids of another length
    return {**call, "id": call_id, "function": {**function, "arguments": arguments}}


class LabelledConversation(NamedTuple):
    """A conversation with labels in it, which show what a template writes of it."""

    messages: list[Message]
    call_labels: list[str]
    result_labels: list[str]


def label_calls_and_results(messages: list[Message]) -> LabelledConversation:
    """Put a label behind the name of each tool call and behind each result, to see afterwards which of them a template writes.

    A label is a number between private-use characters. Blank results get none.
    """
    call_labels: list[str] = []
    result_labels: list[str] = []
    labelled_messages: list[Message] = []
    for message in messages:
        if message["role"] == "tool" and (message["content"] or "").strip():
            label = f"{TURN_EDGE_MARK}{len(result_labels)}{TURN_EDGE_MARK}"
            result_labels.append(label)
            message = {**message, "content": message["content"] + label}
        calls = []
        for call in message.get("tool_calls", ()):
            label = f"{CALL_MARK}{len(call_labels)}{CALL_MARK}"
            call_labels.append(label)
            function = call["function"]
            calls.append({**call, "function": {**function, "name": function["name"] + label}})
        if calls:
            message = {**message, "tool_calls": calls}
        labelled_messages.append(message)
    return LabelledConversation(labelled_messages, call_labels, result_labels)
