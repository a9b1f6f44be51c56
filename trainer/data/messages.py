"""Reads the turns of conversations from columns of rows: roles and keys of either convention, pairs, transcripts, tools.

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
from trainer.data.fields import MEDIA_KEYS, Refusal, is_blank_value, is_list_of_texts, parse_text, show_value

ROLE_NAMES = {  # what rows may say -> what chat templates know
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
_UNREAD_KEYS = frozenset((*MEDIA_KEYS, *_MASK_KEYS))
"""Keys of turns that nothing reads, and without which a turn means something else."""
_TEXT_PARTS = ("text", "input_text", "output_text")
_CALL_FORM = '{"name": ..., "arguments": {...}}, perhaps below "function"'
_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


def parse_turns(column: Any, name: str, needs: str, ignored: Collection[str] = ()) -> list[Message]:
    """The messages in the column `name` of a row, with the roles and keys of either convention.

    `ignored`: keys of turns that are left out. `needs` says in error messages what the column must be. If it is empty, a text is
    read as a transcript, as in the HH-RLHF data (Bai et al. 2022, arXiv:2204.05862): "\\n\\nHuman: ..." and
    "\\n\\nAssistant: ..." in turn. Raises Refusal.
    """
    if isinstance(column, str) and not needs:
        column = _transcript_turns(column, name)
    if isinstance(column, str) and column.lstrip().startswith(("[", "{")):
        fault = f'"{name}" is a JSON text, {show_value(column)}; parse it first: it must be a list of messages'
        raise Refusal("bad_messages", f"{fault}, not a text of one")
    if not isinstance(column, list) or not column:
        raise Refusal("bad_messages", f'"{name}" is {show_value(column)}; it must be {needs or "a list of messages"}')
    return [_read_turn(turn, f"{name}[{number}]", ignored) for number, turn in enumerate(column, 1)]


def _transcript_turns(transcript: str, name: str) -> list[dict[str, str]]:
    """The turns of a text in which every one begins with its speaker, "Human:" or "Assistant:". Raises Refusal.

    Example: "\\n\\nHuman: Hi\\n\\nAssistant: Hello" -> [{"role": "user", "content": "Hi"}, {"role": "assistant", "content":
    "Hello"}]. `name`: the column, for messages.
    """
    # The split gives what stands before the first speaker, then speaker and text in turn: ["", "Human", " Hi", ...].
    before_first, *speakers_and_texts = _SPEAKER.split(parse_text({name: transcript}, name))
    if before_first.strip() or not speakers_and_texts:
        raise Refusal("no_prompt", f'"{name}" is a text; add its "prompt", or give it as a list of messages')
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = []
    for speaker, text in zip(speakers_and_texts[::2], speakers_and_texts[1::2], strict=True):
        turns.append({"role": roles[speaker], "content": text.strip()})
    return turns


def _read_turn(turn: Any, name: str, ignored: Collection[str]) -> Message:
    """A turn of a row as a `Message`. `name` is what error messages call it, such as `messages[2]`. Raises Refusal.

    Example: {"from": "human", "value": "Hi"} -> {"role": "user", "content": "Hi"}. `ignored`: keys that are left out.
    """
    if not isinstance(turn, dict):
        raise Refusal("bad_messages", f'{name} is {show_value(turn)}; it must be {{"role": ..., "content": ...}}')
    # Role and text. OpenAI's convention is role and content, that of ShareGPT is from and value.
    role_key = "from" if "from" in turn and "role" not in turn else "role"
    text_key = "content"
    if "content" not in turn and ("value" in turn or role_key == "from"):
        text_key = "value"
    row_role = turn.get(role_key)
    role = _template_role(row_role, f"{name}.{role_key}")
    is_call = row_role == "function_call"
    text = turn.get(text_key)
    # Most turns have a text and nothing else.
    if len(turn) == 2 and not is_call and isinstance(text, str) and text.strip():
        return {"role": role, "content": text}
    if not _UNREAD_KEYS.isdisjoint(turn):
        _refuse_unread_keys(turn, name, ignored)

    # Content, thought and calls of any other turn.
    message: Message = {"role": role}
    other_fields = _thought_and_calls(turn, name, role, ignored)
    # ShareGPT's function_call turn holds the call as its text.
    if is_call:
        other_fields["tool_calls"] = parse_tool_calls(text, f"{name}.{text_key}")
        message["content"] = ""
    elif ("tool_calls" in other_fields or role == "tool") and text in (None, "", []):
        message["content"] = ""
    else:
        message["content"] = _content(turn, text_key, f"{name}.{text_key}")

    # Whether the turn is learned.
    weight = _loss_weight(turn, name, ignored)
    if weight is not None:
        # A weight of 1 is the usual case, and not written down.
        message["train"] = weight > 0
        if 0 < weight < 1:
            message["weight"] = weight
        if weight > 0 and role == "tool":
            raise Refusal("bad_train", f"{name} is the result of a tool and marked as learned; results are context")
    return {**message, **other_fields}


def _template_role(row_role: Any, name: str) -> str:
    """The role that chat templates know for a role in a row. Raises Refusal: unknown_role."""
    if isinstance(row_role, str) and row_role in ROLE_NAMES:
        return ROLE_NAMES[row_role]
    spelling = row_role.strip().lower() if isinstance(row_role, str) else ""
    remedy = f"write {spelling!r}" if spelling in ROLE_NAMES else f"known roles are {', '.join(ROLE_NAMES)}"
    raise Refusal("unknown_role", f"{name} is {show_value(row_role)}; {remedy}")


def _thought_and_calls(turn: dict[str, Any], name: str, role: str, ignored: Collection[str]) -> Message:
    """The fields of a turn besides its content: an assistant's thought and tool calls, and which call a tool's result answers.

    Example: {"role": "assistant", "thinking": "Hm.", ...} -> {"reasoning_content": "Hm."}. `name` is what error messages call the
    turn. Raises Refusal.
    """
    fields: Message = {}
    # Thought and calls, whichever of their keys the row uses.
    for key in (*_THOUGHT_KEYS, *_CALL_KEYS):
        field_value = turn.get(key)
        if field_value is None or key in ignored or is_blank_value(field_value):
            continue
        if role != "assistant":
            raise Refusal(
                f"turn_{key}", f"{name} has {key} ({show_value(field_value)}), which only assistant turns may have"
            )
        if key in _CALL_KEYS:
            fields["tool_calls"] = parse_tool_calls(field_value, f"{name}.{key}")
            continue
        thought = parse_text(turn, key, f"{name}.{key}")
        if fields.setdefault("reasoning_content", thought) != thought:
            raise Refusal("two_thoughts", f"{name} has two thoughts that differ ({', '.join(_THOUGHT_KEYS)})")
    if "reasoning_content" in fields and "</think>" in str(turn.get("content") or turn.get("value") or ""):
        raise Refusal("two_thoughts", f"{name} has a thought of its own and one in its content; give one of them")
    if role == "tool":
        for key in ("name", "tool_call_id"):
            if isinstance(turn.get(key), str) and turn[key]:
                fields[key] = turn[key]
    return fields


def _refuse_unread_keys(turn: dict[str, Any], name: str, ignored: Collection[str]) -> None:
    """Raise Refusal if a turn has a key that carries meaning and that nothing reads: images and sound, or a mask."""
    for key in sorted(_UNREAD_KEYS.intersection(turn) - {*ignored}):
        field_value = turn[key]
        is_mask = key in _MASK_KEYS
        # An empty image is none; a mask of 0 says something.
        if field_value is None or (not is_mask and is_blank_value(field_value)):
            continue
        remedy = "write what counts into its content"
        if is_mask:
            remedy = 'use "train": false to exclude the turn, or "weight": 0 to 1'
        fault = f"{name} has {key} ({show_value(field_value)}), which shardtune does not know"
        raise Refusal(f"turn_{key}", f"{fault}: {remedy}, or name {key} in data.ignore_columns to train without it")


def _content(turn: dict[str, Any], key: str, name: str) -> str:
    """The text of a turn, which stands under `key`; a text in parts (OpenAI's `{"type": "text", ...}`) is joined.

    `name` is what error messages call the text. Raises Refusal.
    """
    content = turn.get(key)
    if not isinstance(content, list) or is_list_of_texts(content):
        return parse_text(turn, key, name)
    texts = []
    for number, part in enumerate(content, 1):
        text = None
        if isinstance(part, dict) and part.get("type") in _TEXT_PARTS:
            text = part.get("text") or part.get("value")
        if not isinstance(text, str):
            raise Refusal(
                "not_text", f'{name}[{number}] is {show_value(part)}; parts must be {{"type": "text", "text": ...}}'
            )
        texts.append(text)
    return parse_text({key: "".join(texts)}, key, name)


def _loss_weight(turn: dict[str, Any], name: str, ignored: Collection[str]) -> float | None:
    """How much a turn counts in the loss, from 0 (not learned) to 1, by its `weight`, `train` or `masked`.

    {"weight": 0.5} -> 0.5; {"train": false} -> 0; {"masked": true} -> 0; {"train": true, "weight": 0.5} -> 0.5. None if it has
    none of these. Raises Refusal if one has a wrong value, or if they contradict each other.
    """
    keys = [key for key in (*_WEIGHT_KEYS, "train", "masked") if turn.get(key) is not None]
    weights: set[float] = set()
    for key in keys:
        setting = turn[key]
        if key in ignored:
            continue
        # A weight is a number; `train` and `masked` are true or false.
        if key in _WEIGHT_KEYS and isinstance(setting, int | float):
            if not (setting == 0 or MIN_WEIGHT <= setting <= 1):  # nor is NaN
                allowed = f"a number from 0 to 1 (what is not 0 at least {MIN_WEIGHT:g})"
                raise Refusal("bad_weight", f"{name}.{key} is {show_value(setting)}; it must be {allowed}")
            weights.add(float(setting))
        elif key in _WEIGHT_KEYS:
            raise Refusal("bad_weight", f"{name}.{key} is {show_value(setting)}; it must be a number from 0 to 1")
        elif not isinstance(setting, bool):
            raise Refusal("bad_train", f"{name}.{key} is {show_value(setting)}; it must be true or false")
        else:
            is_learned = not setting if key == "masked" else setting
            weights.add(1.0 if is_learned else 0.0)
    if not weights:
        return None
    # What the keys say must agree.
    least = min(weights)
    agreeing = {least}
    if least > 0:  # "train": true beside a weight takes nothing from it
        agreeing.add(1.0)
    if weights - agreeing:
        raise Refusal("bad_train", f"{name}: {', '.join(keys)} contradict each other")
    return least


def require_learnable(turns: list[Message]) -> list[Message]:
    """The same turns, after a check that the conversation begins as it must and has a turn to train on. Raises Refusal."""
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


def split_pair(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], ...]:
    """A preference pair as (shared prompt, chosen turns, rejected turns).

    If chosen and rejected are whole conversations, the turns that both begin with become the prompt, which must contain
    `prompt`. Raises Refusal: identical_pair, no_prompt, no_answer, differing_prompts, assistant_first.
    """
    if chosen == rejected:
        raise Refusal("identical_pair", '"chosen" and "rejected" are the same; there is nothing to prefer')
    # Whole conversations: what both begin with becomes the prompt.
    if not prompt or chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        num_shared = _num_shared_turns(chosen, rejected)
        shared = chosen[:num_shared]
        chosen = chosen[num_shared:]
        rejected = rejected[num_shared:]
        shared_contents = {turn["content"].strip() for turn in shared}
        if any(turn["content"].strip() not in shared_contents for turn in prompt):
            message = '"chosen" and "rejected" are conversations that do not both begin with the prompt of the row'
            raise Refusal("differing_prompts", message)
        # From here on the prompt is what both conversations begin with.
        prompt = shared
    # By now there must be a prompt that does not begin with an answer, and an answer of the assistant on either side.
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer:
            raise Refusal("no_answer", f'"{name}" has no answer of its own after the turns that both share')
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        raise Refusal("differing_prompts", '"chosen" and "rejected" answer different prompts; they must share one')
    if not prompt:
        raise Refusal("no_prompt", '"chosen" and "rejected" have no prompt; add "prompt", or the turns before them')
    if prompt[0]["role"] == "assistant":
        raise Refusal("assistant_first", "the prompt begins with an assistant turn; it must begin with a user turn")
    return prompt, chosen, rejected


def _num_shared_turns(first: list[Message], second: list[Message]) -> int:
    """With how many equal turns two conversations begin."""
    for number, (turn, other_turn) in enumerate(zip(first, second, strict=False)):
        if turn != other_turn:
            return number
    return min(len(first), len(second))


def parse_history(column: Any) -> list[Message]:
    """Earlier turns of a conversation from a column of pairs [question, answer], or of one pair. Raises Refusal.

    Example: [["Hi", "Hello"]] -> [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}].
    """
    pairs = column if isinstance(column, list) else [column]
    turns = []
    for number, pair in enumerate(pairs, 1):
        if not is_list_of_texts(pair) or len(pair) != 2:
            raise Refusal("bad_history", f"history[{number}] is {show_value(pair)}; it must be [question, answer]")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append({"role": role, "content": parse_text({role: text}, role, f"history[{number}]")})
    return turns


def parse_tools(column: Any) -> list[dict[str, Any]] | None:
    """The tools of a column: a list, or a JSON text of one; None if there are none. Raises Refusal: bad_tools."""
    if column is None or is_blank_value(column):
        return None
    row_tools = _json_list(column)
    if not isinstance(row_tools, list):
        raise Refusal(
            "bad_tools", f'"tools" is {show_value(column)}; it must be a list of JSON schemas, or a JSON text of it'
        )
    tools = []
    for number, tool in enumerate(row_tools, 1):
        if isinstance(tool, dict) and "function" not in tool:
            # OpenAI's older form has the function without its wrapping.
            tool = {"type": "function", "function": tool}
        function = tool.get("function") if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name.strip():
            needs = '{"name": ..., "description": ..., "parameters": {...}}, perhaps below "function"'
            raise Refusal("bad_tools", f"tools[{number}] is {show_value(tool)}; it must be {needs}")
        tools.append(tool)
    return _require_json(tools, "tools")


def lists_all_tools(system: str, tools: list[dict[str, Any]]) -> bool:
    """Whether a system turn lists the tools already, as in Hermes' data, so that a template must not list them again."""
    if "<tools>" not in system:
        return False
    # As the names stand in JSON, without its quotes.
    names = [json.dumps(tool["function"]["name"])[1:-1] for tool in tools]
    return all(name in system for name in names)


def parse_tool_calls(column: Any, name: str) -> list[dict[str, Any]]:
    """The tool calls of a turn, from one call, a list, or a JSON text of it. Raises Refusal: bad_tool_calls."""
    row_calls = _json_list(column)
    if not isinstance(row_calls, list) or not row_calls:
        raise Refusal(
            "bad_tool_calls", f"{name} is {show_value(column)}; it must be a call or a list of calls, each {_CALL_FORM}"
        )
    calls = [_read_call(call, f"{name}[{number}]") for number, call in enumerate(row_calls, 1)]
    return _require_json(calls, name)


def _read_call(row_call: Any, name: str) -> dict[str, Any]:
    """A tool call of a row as `{"type": "function", "function": {"name", "arguments"}}`, perhaps with its `id`.

    The row may have it with or without "function" around it, and arguments as an object or as a JSON text of one: {"name":
    "search", "arguments": "{\\"query\\": \\"weather\\"}"} gets the arguments {"query": "weather"}.

    `name` is what error messages call it. Raises Refusal.
    """
    function = row_call.get("function", row_call) if isinstance(row_call, dict) else None
    if not isinstance(function, dict):
        function = {}
    function_name = function.get("name")
    arguments: Any = function.get("arguments", function.get("parameters"))
    parsed_arguments = _parse_json(arguments)
    if isinstance(parsed_arguments, dict):
        arguments = parsed_arguments
    elif arguments in (None, ""):
        arguments = {}
    is_named = isinstance(function_name, str) and bool(function_name.strip())
    if not is_named or not isinstance(arguments, dict | str):
        raise Refusal("bad_tool_calls", f"{name} is {show_value(row_call)}; a call must be {_CALL_FORM}")
    call: dict[str, Any] = {}
    if isinstance(row_call.get("id"), str) and row_call["id"]:
        call["id"] = row_call["id"]
    return {**call, "type": "function", "function": {"name": function_name, "arguments": arguments}}


def _require_json(calls_or_tools: Any, name: str) -> Any:
    """The calls or tools themselves, if they can be written as JSON in UTF-8. Raises Refusal."""
    try:
        json.dumps(calls_or_tools, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise Refusal("bad_tools", f"{name} cannot be written as JSON: {error}") from None
    return calls_or_tools


def _json_list(column: Any) -> Any:
    """A column that holds a list, or one object of it alone, or a JSON text of either: the list. Anything else as it is.

    Examples: [a, b] -> [a, b]; {"name": "x"} -> [{"name": "x"}]; the text '[{"name": "x"}]' -> [{"name": "x"}]; "x" -> "x".
    """
    parsed = _parse_json(column)
    if isinstance(parsed, dict):
        return [parsed]
    return parsed


def _parse_json(column: Any) -> Any:
    """What a JSON text holds. Anything else as it is, also a text that reading would change: a key twice, or NaN."""
    if not isinstance(column, str):
        return column
    try:
        return json.loads(column, object_pairs_hook=_refuse_doubled_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return column


def _refuse_doubled_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs. Raises ValueError for a key that is there twice, of which json would keep the last."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key is there twice")
    return fields


def _refuse_constant(name: str) -> Any:
    """Raise ValueError for NaN and Infinity, which Python's json reads although they are not JSON."""
    raise ValueError(name)
