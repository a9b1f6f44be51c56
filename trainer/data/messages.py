"""Turns of conversations as rows have them: roles and keys of either convention, pairs, transcripts, earlier turns, tools.

A tool becomes `{"type": "function", "function": {"name", "description", "parameters"}}`, a call `{"type": "function",
"function": {"name", "arguments"}}`, perhaps with an `id`, as chat templates read them. Arguments that are a JSON text of an
object become that object.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from trainer.data.document import Message
from trainer.data.fields import MEDIA, Refusal, is_nothing, is_texts, show_value, text_of

ROLES = {  # what rows may say -> what chat templates know
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",  # its text is the call
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
_CALL_KEYS = ("tool_calls", "function_call")
_WEIGHT_KEYS = ("weight", "loss_weight")
_MASK_KEYS = ("loss_mask", "loss", "mask")
MIN_WEIGHT = 1e-6
"""Smallest weight of a turn that is learned."""
_THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")
_CARRIERS = frozenset((*MEDIA, *_MASK_KEYS))
"""Keys of turns that nothing reads, and without which a turn means something else."""
_TEXT_PARTS = ("text", "input_text", "output_text")
_CALL_FORM = '{"name": ..., "arguments": {...}}, perhaps below "function"'
_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


def turns_of(value: Any, name: str, needs: str, ignored: Collection[str] = ()) -> list[Message]:
    """The messages of a column, with the roles and keys of either convention; `ignored` keys of turns are left out.

    A text is read as a transcript, as in the HH-RLHF data (Bai et al. 2022, arXiv:2204.05862): "\\n\\nHuman: ..." and
    "\\n\\nAssistant: ..." in turn. Raises Refusal.
    """
    if isinstance(value, str) and not needs:
        parts = _SPEAKER.split(text_of({name: value}, name))
        if parts[0].strip() or len(parts) == 1:
            raise Refusal("no_prompt", f'"{name}" is a text; add its "prompt", or give it as a list of messages')
        roles = {"Human": "user", "Assistant": "assistant"}
        spoken = zip(parts[1::2], parts[2::2], strict=True)
        value = [{"role": roles[speaker], "content": text.strip()} for speaker, text in spoken]
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        what = f'"{name}" is a JSON text, {show_value(value)}; parse it first: it must be a list of messages'
        raise Refusal("bad_messages", f"{what}, not a text of one")
    if not isinstance(value, list) or not value:
        raise Refusal("bad_messages", f'"{name}" is {show_value(value)}; it must be {needs or "a list of messages"}')
    return [_turn(turn, f"{name}[{number}]", ignored) for number, turn in enumerate(value, 1)]


def _turn(turn: Any, name: str, ignored: Collection[str]) -> Message:
    if not isinstance(turn, dict):
        raise Refusal("bad_messages", f'{name} is {show_value(turn)}; it must be {{"role": ..., "content": ...}}')
    role_key = "from" if "from" in turn and "role" not in turn else "role"
    text_key = "value" if "content" not in turn and ("value" in turn or role_key == "from") else "content"
    role = turn.get(role_key)
    if not isinstance(role, str) or role not in ROLES:
        known = role.strip().lower() if isinstance(role, str) else ""
        remedy = f"write {known!r}" if known in ROLES else f"known roles are {', '.join(ROLES)}"
        raise Refusal("unknown_role", f"{name}.{role_key} is {show_value(role)}; {remedy}")
    # most turns say something and have nothing else
    if len(turn) == 2 and role != "function_call" and isinstance(said := turn.get(text_key), str) and said.strip():
        return {"role": ROLES[role], "content": said}
    if not _CARRIERS.isdisjoint(turn):
        _refuse_carriers(turn, name, ignored)
    message: Message = {"role": ROLES[role]}
    extra = _other_fields(turn, name, ROLES[role], ignored)
    if role == "function_call":
        extra["tool_calls"] = calls_of(turn.get(text_key), f"{name}.{text_key}")
        message["content"] = ""
    elif ("tool_calls" in extra or message["role"] == "tool") and turn.get(text_key) in (None, "", []):
        message["content"] = ""
    else:
        message["content"] = _content(turn, text_key, f"{name}.{text_key}")
    weight = _weight(turn, name, ignored)
    if weight is not None:
        message["train"] = weight > 0
    if weight and weight < 1:
        message["weight"] = weight
    if weight and message["role"] == "tool":
        raise Refusal("bad_train", f"{name} is the result of a tool and marked as learned; results are context")
    return {**message, **extra}


def _other_fields(turn: dict[str, Any], name: str, role: str, ignored: Collection[str]) -> Message:
    """What a turn has beside its content: the thought and the calls of an assistant, what a result answers to."""
    extra: Message = {}
    for key in (*_THOUGHT_KEYS, *_CALL_KEYS):
        if (value := turn.get(key)) is None or key in ignored or is_nothing(value):
            continue
        if role != "assistant":
            raise Refusal(f"turn_{key}", f"{name} has {key} ({show_value(value)}), which only assistant turns may have")
        if key in _CALL_KEYS:
            extra["tool_calls"] = calls_of(value, f"{name}.{key}")
        elif extra.setdefault("reasoning_content", thought := text_of(turn, key, f"{name}.{key}")) != thought:
            raise Refusal("two_thoughts", f"{name} has two thoughts that differ ({', '.join(_THOUGHT_KEYS)})")
    if "reasoning_content" in extra and "</think>" in str(turn.get("content") or turn.get("value") or ""):
        raise Refusal("two_thoughts", f"{name} has a thought of its own and one in its content; give one of them")
    if role == "tool":
        extra |= {key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str) and turn[key]}
    return extra


def _refuse_carriers(turn: dict[str, Any], name: str, ignored: Collection[str]) -> None:
    """Raise Refusal for a key that carries meaning and that nothing reads."""
    for key in sorted(_CARRIERS.intersection(turn) - {*ignored}):
        value = turn[key]
        if value is None if key in _MASK_KEYS else is_nothing(value):
            continue
        remedy = "write what counts into its content"
        if key in _MASK_KEYS:
            remedy = 'say whether the turn is learned by "train": true or false, or by "weight": 0 to 1'
        what = f"{name} has {key} ({show_value(value)}), which nothing reads"
        raise Refusal(f"turn_{key}", f"{what}: {remedy}, or name {key} in data.ignore_columns to train without it")


def _content(turn: dict[str, Any], key: str, name: str) -> str:
    value = turn.get(key)
    if not isinstance(value, list) or is_texts(value):
        return text_of(turn, key, name)
    texts = []
    for number, part in enumerate(value, 1):
        said = (part.get("text") or part.get("value")) if isinstance(part, dict) else None
        if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS or not isinstance(said, str):
            raise Refusal(
                "not_text", f'{name}[{number}] is {show_value(part)}; parts must be {{"type": "text", "text": ...}}'
            )
        texts.append(said)
    return text_of({key: "".join(texts)}, key, name)


def _weight(turn: dict[str, Any], name: str, ignored: Collection[str]) -> float | None:
    """How much the turn is learned, from 0 (not at all) to 1, by `weight`, `train` or `masked`; None where none is given."""
    found = set()
    said = {key: turn[key] for key in (*_WEIGHT_KEYS, "train", "masked") if turn.get(key) is not None}
    for key, value in said.items():
        if key in ignored:
            continue
        if key in _WEIGHT_KEYS and isinstance(value, int | float):
            if not (value == 0 or MIN_WEIGHT <= value <= 1):  # nor is NaN
                allowed = f"a number from 0 to 1 (what is not 0 at least {MIN_WEIGHT:g})"
                raise Refusal("bad_weight", f"{name}.{key} is {show_value(value)}; it must be {allowed}")
            found.add(float(value))
        elif not isinstance(value, bool):
            what = ("bad_weight", "a number from 0 to 1") if key in _WEIGHT_KEYS else ("bad_train", "true or false")
            raise Refusal(what[0], f"{name}.{key} is {show_value(value)}; it must be {what[1]}")
        else:
            found.add(float(value is not (key == "masked")))
    least = min(found, default=None)
    if found - {least} - ({1.0} if least else set()):  # "train": true beside a weight takes nothing from it
        raise Refusal("bad_train", f"{name}: {', '.join(said)} contradict each other")
    return least


def require_learnable(turns: list[Message]) -> list[Message]:
    """The turns, if something can be learned from them. Raises Refusal."""
    roles = [turn["role"] for turn in turns]
    if roles[0] in ("assistant", "tool"):
        message = f"the conversation begins with a turn of the {roles[0]}; it must begin with a system or a user turn"
        raise Refusal(f"{roles[0]}_first", message)
    if "assistant" not in roles:
        message = f"the conversation has no assistant turn (roles: {', '.join(roles)}); there is nothing to learn"
        raise Refusal("no_assistant_turn", message)
    if not any(turn.get("train", turn["role"] == "assistant") for turn in turns):
        raise Refusal("no_learned_turn", "every assistant turn is marked as not learned; there is nothing to learn")
    return turns


def split_pair(before: list[Message], chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], ...]:
    """A preference pair as (shared prompt, chosen turns, rejected turns).

    Where chosen and rejected are whole conversations, what both begin with becomes the prompt, which must contain
    `before`. Raises Refusal: identical_pair, no_prompt, no_answer, differing_prompts, assistant_first.
    """
    if chosen == rejected:
        raise Refusal("identical_pair", '"chosen" and "rejected" are the same; there is nothing to prefer')
    if not before or chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        pairs = enumerate(zip(chosen, rejected, strict=False))
        same = next((number for number, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
        shared, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
        contents = {turn["content"].strip() for turn in shared}
        if any(turn["content"].strip() not in contents for turn in before):
            message = '"chosen" and "rejected" are conversations that do not both begin with the prompt of the row'
            raise Refusal("differing_prompts", message)
        before = shared
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer:
            raise Refusal("no_answer", f'"{name}" has no answer of its own after the turns that both share')
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        raise Refusal("differing_prompts", '"chosen" and "rejected" answer different prompts; they must share one')
    if not before:
        raise Refusal("no_prompt", '"chosen" and "rejected" have no prompt; add "prompt", or the turns before them')
    if before[0]["role"] == "assistant":
        raise Refusal("assistant_first", "the prompt begins with an assistant turn; it must begin with a user turn")
    return before, chosen, rejected


def history_of(value: Any) -> list[Message]:
    """Earlier turns from pairs of a question and its answer. Raises Refusal."""
    turns = []
    for number, pair in enumerate(value if isinstance(value, list) else [value], 1):
        if not is_texts(pair) or len(pair) != 2:
            raise Refusal("bad_history", f"history[{number}] is {show_value(pair)}; it must be [question, answer]")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append({"role": role, "content": text_of({role: text}, role, f"history[{number}]")})
    return turns


def tools_of(value: Any) -> list[dict[str, Any]] | None:
    """The tools of a column: a list, or a JSON text of one; None where there are none. Raises Refusal: bad_tools."""
    if value is None or is_nothing(value):
        return None
    found = _parse_json(value) if isinstance(value, str) else value
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, list):
        raise Refusal(
            "bad_tools", f'"tools" is {show_value(value)}; it must be a list of JSON schemas, or a JSON text of it'
        )
    tools = []
    for number, tool in enumerate(found, 1):
        bare = isinstance(tool, dict) and "function" not in tool
        tool = {"type": "function", "function": tool} if bare else tool
        inner = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"].strip():
            needs = '{"name": ..., "description": ..., "parameters": {...}}, perhaps below "function"'
            raise Refusal("bad_tools", f"tools[{number}] is {show_value(tool)}; it must be {needs}")
        tools.append(tool)
    return _as_json(tools, "tools")


def tells_tools(system: str, tools: list[dict[str, Any]]) -> bool:
    """Whether a system turn tells the tools already, as in Hermes' data, so that a template must not tell them again."""
    return "<tools>" in system and all(json.dumps(tool["function"]["name"])[1:-1] in system for tool in tools)


def calls_of(value: Any, name: str) -> list[dict[str, Any]]:
    """The calls of a turn: one or a list, or a JSON text of it. Raises Refusal: bad_tool_calls."""
    found = _parse_json(value) if isinstance(value, str) else value
    calls = []
    for number, call in enumerate([found] if isinstance(found, dict) else found if isinstance(found, list) else [], 1):
        inner = call.get("function", call) if isinstance(call, dict) else None
        called = inner.get("name") if isinstance(inner, dict) else None
        arguments: Any = (inner or {}).get("arguments", (inner or {}).get("parameters"))
        parsed = _parse_json(arguments) if isinstance(arguments, str) else arguments
        arguments = parsed if isinstance(parsed, dict) else {} if arguments in (None, "") else arguments
        if not isinstance(called, str) or not called.strip() or not isinstance(arguments, dict | str):
            raise Refusal("bad_tool_calls", f"{name}[{number}] is {show_value(call)}; a call must be {_CALL_FORM}")
        own = {"id": call["id"]} if isinstance(call.get("id"), str) and call["id"] else {}
        calls.append({**own, "type": "function", "function": {"name": called, "arguments": arguments}})
    if not calls:
        raise Refusal(
            "bad_tool_calls", f"{name} is {show_value(value)}; it must be a call or a list of calls, each {_CALL_FORM}"
        )
    return _as_json(calls, name)


def _as_json(value: Any, name: str) -> Any:
    """The value, if it is one that JSON and UTF-8 can have. Raises Refusal."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise Refusal("bad_tools", f"{name} cannot be written as JSON: {error}") from None
    return value


def _parse_json(text: str) -> Any:
    """The value of a JSON text; the text itself where it is none, or where reading it would lose a key."""
    try:
        return json.loads(text, object_pairs_hook=_refuse_doubled_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text


def _refuse_doubled_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(name)
