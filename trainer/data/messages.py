"""Reads the turns of conversations from columns of rows: roles and keys of either convention, pairs, transcripts, tools.

A tool becomes `{"type": "function", "function": {"name", "description", "parameters"}}`, a call `{"type": "function",
"function": {"name", "arguments"}}`, perhaps with an `id`, as chat templates read them. Arguments that are a JSON text of an
object become that object.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any, NamedTuple

from trainer.data.document import Message
from trainer.data.fields import MEDIA_KEYS, RowError, is_blank_value, is_list_of_texts, parse_text, show_value

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
_TEXT_PART_TYPES = ("text", "input_text", "output_text")
_CALL_FORM = '{"name": ..., "arguments": {...}}, perhaps below "function"'
_SPEAKER_REGEX = re.compile(r"(?:\A|\n\n)(Human|Assistant):")  # the speaker at the beginning of a turn: "\n\nHuman:"


def parse_turns(value: Any, column: str, required_form: str, ignored_keys: Collection[str] = ()) -> list[Message]:
    """Read the messages of a conversation in a column of a row, with the roles and keys of either convention. Raises RowError.

    Example: [{"from": "human", "value": "Hi"}] -> [{"role": "user", "content": "Hi"}]. `value`: that of the column.
    `required_form` says in error messages what it must be. `ignored_keys`: keys of turns that are left out.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        fault = f'"{column}" is a JSON text, {show_value(value)}; parse it first: it must be a list of messages'
        raise RowError("bad_messages", f"{fault}, not a text of one")
    if not isinstance(value, list) or not value:
        raise RowError("bad_messages", f'"{column}" is {show_value(value)}; it must be {required_form}')
    return [_read_turn(turn, f"{column}[{index}]", ignored_keys) for index, turn in enumerate(value)]


def parse_transcript(transcript: str, column: str) -> list[Message]:
    r"""Read a conversation from a text in which every turn begins with its speaker, as in the HH-RLHF data. Raises RowError.

    Example: "\n\nHuman: Hi\n\nAssistant: Hello" -> [{"role": "user", "content": "Hi"}, {"role": "assistant", "content":
    "Hello"}]. `column`: the column that holds it, for messages. The data: Bai et al. 2022, arXiv:2204.05862.
    """
    text = parse_text({column: transcript}, column)  # raises for an empty one
    speakers = list(_SPEAKER_REGEX.finditer(text))
    if not speakers or text[: speakers[0].start()].strip():
        raise RowError("no_prompt", f'"{column}" is a text; add its "prompt", or give it as a list of messages')
    role_by_speaker = {"Human": "user", "Assistant": "assistant"}
    turns = []
    for number, speaker in enumerate(speakers):
        is_last = number == len(speakers) - 1
        end = len(text) if is_last else speakers[number + 1].start()
        turns.append({"role": role_by_speaker[speaker[1]], "content": text[speaker.end() : end].strip()})
    return parse_turns(turns, column, required_form="a list of messages")


def _read_turn(turn: Any, shown_name: str, ignored_keys: Collection[str]) -> Message:
    """Read one turn of a conversation in a row, in the form that chat templates take. Raises RowError.

    Example: {"from": "human", "value": "Hi"} -> {"role": "user", "content": "Hi"}. `shown_name`: what error messages call the
    turn, such as `messages[2]`. `ignored_keys`: keys that are left out.
    """
    if not isinstance(turn, dict):
        raise RowError(
            "bad_messages", f'{shown_name} is {show_value(turn)}; it must be {{"role": ..., "content": ...}}'
        )
    # OpenAI's convention is role and content, that of ShareGPT is from and value.
    role_key = "from" if "from" in turn and "role" not in turn else "role"
    text_key = "content"
    if "content" not in turn and ("value" in turn or role_key == "from"):
        text_key = "value"
    raw_role = turn.get(role_key)
    role = _template_role(raw_role, f"{shown_name}.{role_key}")
    is_call = raw_role == "function_call"  # a role of ShareGPT: the text of the turn is the call
    text = turn.get(text_key)
    # The fast way to what the code below would return: most turns have a text and nothing else.
    if len(turn) == 2 and not is_call and isinstance(text, str) and text.strip():
        return {"role": role, "content": text}

    if not _UNREAD_KEYS.isdisjoint(turn):
        _check_no_unread_keys(turn, shown_name, ignored_keys)
    fields = _parse_thought_calls_and_ids(turn, shown_name, role, ignored_keys)
    may_be_empty = "tool_calls" in fields or role == "tool"
    if is_call:
        fields["tool_calls"] = parse_tool_calls(text, f"{shown_name}.{text_key}")
        content = ""
    elif may_be_empty and text in (None, "", []):
        content = ""
    else:
        content = _parse_content(turn, text_key, f"{shown_name}.{text_key}")
    return {"role": role, "content": content, **_parse_training_fields(turn, shown_name, role, ignored_keys), **fields}


def _parse_training_fields(turn: dict[str, Any], shown_name: str, role: str, ignored_keys: Collection[str]) -> Message:
    """Read how a turn is to be learned: {"train": whether}, and "weight", what it counts for in the loss, if between 0 and 1.

    Empty if the turn does not say. `shown_name`: what error messages call it. Raises RowError for a tool's result that is to be
    learned.
    """
    weight = _parse_loss_weight(turn, shown_name, ignored_keys)
    if weight is None:
        return {}
    if weight > 0 and role == "tool":
        raise RowError("bad_train", f"{shown_name} is the result of a tool and marked as learned; results are context")
    fields: Message = {"train": weight > 0}
    if 0 < weight < 1:  # a learned turn without a weight counts as 1
        fields["weight"] = weight
    return fields


def _template_role(raw_role: Any, shown_name: str) -> str:
    """Find the role that chat templates know for a role in a row: "human" -> "user". Raises RowError: unknown_role."""
    if isinstance(raw_role, str) and raw_role in ROLE_NAMES:
        return ROLE_NAMES[raw_role]
    lower_case_role = raw_role.strip().lower() if isinstance(raw_role, str) else ""
    if lower_case_role in ROLE_NAMES:
        remedy = f"write {lower_case_role!r}"
    else:
        remedy = f"known roles are {', '.join(ROLE_NAMES)}"
    raise RowError("unknown_role", f"{shown_name} is {show_value(raw_role)}; {remedy}")


def _parse_thought_calls_and_ids(
    turn: dict[str, Any], shown_name: str, role: str, ignored_keys: Collection[str]
) -> Message:
    """Read what a turn has beside role and content: its thought, its tool calls, and the ids of a tool's result.

    Example: {"role": "assistant", "thinking": "Hm.", ...} -> {"reasoning_content": "Hm."}. A turn may have its thought or its
    calls under several keys. `ignored_keys`: keys that are left out. Raises RowError for a thought or a call outside an assistant
    turn, and for two thoughts that differ.
    """
    fields: Message = {}
    for key in (*_THOUGHT_KEYS, *_CALL_KEYS):
        value = turn.get(key)
        if value is None or key in ignored_keys or is_blank_value(value):
            continue
        if role != "assistant":
            raise RowError(
                f"turn_{key}", f"{shown_name} has {key} ({show_value(value)}), which only assistant turns may have"
            )
        if key in _CALL_KEYS:
            fields["tool_calls"] = parse_tool_calls(value, f"{shown_name}.{key}")
            continue
        thought = parse_text(turn, key, f"{shown_name}.{key}")
        if fields.setdefault("reasoning_content", thought) != thought:
            raise RowError("two_thoughts", f"{shown_name} has two thoughts that differ ({', '.join(_THOUGHT_KEYS)})")
    if "reasoning_content" in fields and "</think>" in str(turn.get("content") or turn.get("value") or ""):
        raise RowError(
            "two_thoughts", f"{shown_name} has a thought of its own and one in its content; give one of them"
        )
    if role == "tool":
        # Which tool answers, and which call it answers.
        for key in ("name", "tool_call_id"):
            if isinstance(turn.get(key), str) and turn[key]:
                fields[key] = turn[key]
    return fields


def _check_no_unread_keys(turn: dict[str, Any], shown_name: str, ignored_keys: Collection[str]) -> None:
    """Raise RowError if a turn has a key that nothing reads and that changes its meaning: images and sound, or a mask.

    Null counts as no value; an empty image does too, but not an empty mask or a mask of 0, which says something. `ignored_keys`:
    keys that the user allows to ignore.
    """
    for key in sorted(_UNREAD_KEYS.intersection(turn) - {*ignored_keys}):
        value = turn[key]
        is_mask = key in _MASK_KEYS
        if value is None or (not is_mask and is_blank_value(value)):
            continue
        remedy = "write what counts into its content"
        if is_mask:
            remedy = 'use "train": false to exclude the turn, or "weight": 0 to 1'
        fault = f"{shown_name} has {key} ({show_value(value)}), which shardtune does not know"
        raise RowError(f"turn_{key}", f"{fault}: {remedy}, or name {key} in data.ignore_columns to train without it")


def _parse_content(turn: dict[str, Any], key: str, shown_name: str) -> str:
    """Read the text of a turn, which stands under `key`; raises RowError if there is none.

    Parts as in OpenAI's convention are joined: [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}] -> "ab"; some files
    have "value" for "text" in a part. `shown_name`: what error messages call the text.
    """
    content = turn.get(key)
    # `parse_text` takes a text, also as the only one of a list, and raises for anything else.
    if not isinstance(content, list) or is_list_of_texts(content):
        return parse_text(turn, key, shown_name)
    texts = []
    for index, part in enumerate(content):
        text = None
        if isinstance(part, dict) and part.get("type") in _TEXT_PART_TYPES:
            text = part.get("text") or part.get("value")
        if not isinstance(text, str):
            needs = '{"type": "text", "text": ...}'
            raise RowError("not_text", f"{shown_name}[{index}] is {show_value(part)}; parts must be {needs}")
        texts.append(text)
    return parse_text({key: "".join(texts)}, key, shown_name)


def _parse_loss_weight(turn: dict[str, Any], shown_name: str, ignored_keys: Collection[str]) -> float | None:
    """Read how much a turn counts in the loss, from 0 (not learned) to 1; None if the turn does not say.

    Files say it by `weight` or `loss_weight`, `train` and `masked`: {"weight": 0.5} -> 0.5; {"train": false} -> 0; {"masked":
    true} -> 0; {"train": true, "weight": 0.5} -> 0.5. `ignored_keys`: keys that are left out. Raises RowError if a key has a
    wrong value, or if two keys contradict each other.
    """
    # All keys that the turn has are named in the error of a contradiction, ignored ones too.
    keys = [key for key in (*_WEIGHT_KEYS, "train", "masked") if turn.get(key) is not None]
    weights: set[float] = set()
    for key in keys:
        if key in ignored_keys:
            continue
        if key in _WEIGHT_KEYS:
            weights.add(_parse_weight(turn[key], f"{shown_name}.{key}"))
        elif not isinstance(turn[key], bool):
            raise RowError("bad_train", f"{shown_name}.{key} is {show_value(turn[key])}; it must be true or false")
        else:
            is_learned = not turn[key] if key == "masked" else turn[key]
            weights.add(1.0 if is_learned else 0.0)
    if not weights:
        return None
    lowest = min(weights)
    # "train": true (1.0) beside a weight above 0 agrees with it.
    agreeing_weights = {lowest, 1.0} if lowest > 0 else {lowest}
    if weights - agreeing_weights:
        raise RowError("bad_train", f"{shown_name}: {', '.join(keys)} contradict each other")
    return lowest


def _parse_weight(value: Any, shown_name: str) -> float:
    """Read a loss weight from a row: 0, or from `MIN_WEIGHT` to 1. Raises RowError (bad_weight) for anything else."""
    if not isinstance(value, int | float):
        raise RowError("bad_weight", f"{shown_name} is {show_value(value)}; it must be a number from 0 to 1")
    is_allowed = value == 0 or MIN_WEIGHT <= value <= 1  # NaN is neither
    if not is_allowed:
        allowed = f"a number from 0 to 1 (what is not 0 at least {MIN_WEIGHT:g})"
        raise RowError("bad_weight", f"{shown_name} is {show_value(value)}; it must be {allowed}")
    return float(value)


def require_learnable(turns: list[Message]) -> list[Message]:
    """Return the turns of a conversation, after a check that it begins as it must and has a turn to learn.

    Raises RowError: assistant_first, tool_first, no_assistant_turn, no_learned_turn.
    """
    roles = [turn["role"] for turn in turns]
    if roles[0] in ("assistant", "tool"):
        message = f"the conversation begins with a turn of the {roles[0]}; it must begin with a system or a user turn"
        raise RowError(f"{roles[0]}_first", message)
    if "assistant" not in roles:
        message = f"the conversation has no assistant turn (roles: {', '.join(roles)}); there is nothing to learn"
        raise RowError("no_assistant_turn", message)
    # By default a turn of the assistant is learned, and no other one.
    if not any(turn.get("train", turn["role"] == "assistant") for turn in turns):
        raise RowError("no_learned_turn", "every assistant turn is marked as not learned; there is nothing to learn")
    return turns


class PreferencePair(NamedTuple):
    """A shared prompt, and the two answers to it; each is a list of turns."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


def split_pair(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> PreferencePair:
    """Find prompt and answers of a preference pair, from a prompt (perhaps empty) and two answers, or two whole conversations.

    If there is no prompt, or one of the two does not begin with an assistant turn, they are whole conversations. The turns with
    which both begin are then the prompt of the pair, and must contain `prompt`. `chosen` and `rejected`: each an answer, or a
    conversation with its answer at the end. Raises RowError: identical_pair, no_prompt, no_answer, differing_prompts,
    assistant_first.
    """
    if chosen == rejected:
        raise RowError("identical_pair", '"chosen" and "rejected" are the same; there is nothing to prefer')
    are_conversations = not prompt or chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant"
    if are_conversations:
        # Their common beginning is the prompt; the row may give (a part of) it once more as a column.
        num_shared = _num_shared_turns(chosen, rejected)
        shared_turns = chosen[:num_shared]
        chosen = chosen[num_shared:]
        rejected = rejected[num_shared:]
        shared_contents = {turn["content"].strip() for turn in shared_turns}
        if any(turn["content"].strip() not in shared_contents for turn in prompt):
            message = '"chosen" and "rejected" are conversations that do not both begin with the prompt of the row'
            raise RowError("differing_prompts", message)
        prompt = shared_turns
    for column, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer:
            raise RowError("no_answer", f'"{column}" has no answer of its own after the turns that both share')
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        raise RowError("differing_prompts", '"chosen" and "rejected" answer different prompts; they must share one')
    if not prompt:
        raise RowError("no_prompt", '"chosen" and "rejected" have no prompt; add "prompt", or the turns before them')
    if prompt[0]["role"] == "assistant":
        raise RowError("assistant_first", "the prompt begins with an assistant turn; it must begin with a user turn")
    return PreferencePair(prompt, chosen, rejected)


def _num_shared_turns(first: list[Message], second: list[Message]) -> int:
    """With how many equal turns two conversations begin."""
    for number, (turn_of_first, turn_of_second) in enumerate(zip(first, second, strict=False)):
        if turn_of_first != turn_of_second:
            return number
    return min(len(first), len(second))


def parse_history(value: Any) -> list[Message]:
    """Read earlier turns of a conversation from a list of pairs [question, answer], or from one such pair. Raises RowError.

    Example: [["Hi", "Hello"]] -> [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}].
    """
    pairs = value if isinstance(value, list) else [value]
    turns = []
    for index, pair in enumerate(pairs):
        if not is_list_of_texts(pair) or len(pair) != 2:
            raise RowError("bad_history", f"history[{index}] is {show_value(pair)}; it must be [question, answer]")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append({"role": role, "content": parse_text({role: text}, role, f"history[{index}]")})
    return turns


def parse_tools(value: Any) -> list[dict[str, Any]] | None:
    """Read the tools that a conversation may call: a list of JSON schemas, or a JSON text of one. None if there are none.

    A function without its wrapping, OpenAI's older form, is wrapped: {"name": "search"} -> {"type": "function", "function":
    {"name": "search"}}. Raises RowError: bad_tools.
    """
    if value is None or is_blank_value(value):
        return None
    row_tools = _as_list(value)
    if not isinstance(row_tools, list):
        raise RowError(
            "bad_tools", f'"tools" is {show_value(value)}; it must be a list of JSON schemas, or a JSON text of it'
        )
    tools = []
    for index, tool in enumerate(row_tools):
        if isinstance(tool, dict) and "function" not in tool:
            tool = {"type": "function", "function": tool}
        function = tool.get("function") if isinstance(tool, dict) else None
        function_name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function_name, str) or not function_name.strip():
            needs = '{"name": ..., "description": ..., "parameters": {...}}, perhaps below "function"'
            raise RowError("bad_tools", f"tools[{index}] is {show_value(tool)}; it must be {needs}")
        tools.append(tool)
    return _require_json_writable(tools, "tools")


def lists_all_tools(system: str, tools: list[dict[str, Any]]) -> bool:
    """Whether the text of a system turn lists all the tools already, as in Hermes' data: a template must not list them again."""
    if "<tools>" not in system:
        return False
    # Names are compared as JSON writes them, without its quotes.
    names_in_json = [json.dumps(tool["function"]["name"])[1:-1] for tool in tools]
    return all(name in system for name in names_in_json)


def parse_tool_calls(value: Any, shown_name: str) -> list[dict[str, Any]]:
    """Read the tool calls of a turn, from one call, a list of calls, or a JSON text of either. Raises RowError: bad_tool_calls.

    `shown_name`: what error messages call them, such as `messages[2].tool_calls`.
    """
    row_calls = _as_list(value)
    if not isinstance(row_calls, list) or not row_calls:
        raise RowError(
            "bad_tool_calls",
            f"{shown_name} is {show_value(value)}; it must be a call or a list of calls, each {_CALL_FORM}",
        )
    calls = [_parse_tool_call(call, f"{shown_name}[{index}]") for index, call in enumerate(row_calls)]
    return _require_json_writable(calls, shown_name)


def _parse_tool_call(raw_call: Any, shown_name: str) -> dict[str, Any]:
    """Give a tool call of a row the form that chat templates take: `{"type": "function", "function": {"name", "arguments"}}`.

    It keeps its `id` if it has one. The row may have it with or without "function" around it: {"name": "search", "arguments":
    {"query": "weather"}}. `shown_name`: what error messages call it. Raises RowError for a call without a name, or with arguments
    of another type.
    """
    function = raw_call.get("function", raw_call) if isinstance(raw_call, dict) else None
    if not isinstance(function, dict):
        function = {}
    function_name = function.get("name")
    arguments = _parse_call_arguments(function)
    has_name = isinstance(function_name, str) and bool(function_name.strip())
    if not has_name or not isinstance(arguments, dict | str):
        raise RowError("bad_tool_calls", f"{shown_name} is {show_value(raw_call)}; a call must be {_CALL_FORM}")
    call: dict[str, Any] = {}
    if isinstance(raw_call.get("id"), str) and raw_call["id"]:
        call["id"] = raw_call["id"]
    return {**call, "type": "function", "function": {"name": function_name, "arguments": arguments}}


def _parse_call_arguments(function: dict[str, Any]) -> Any:
    """Read the arguments of a tool call, under "arguments" or, as some files have it, "parameters".

    - An object, or a JSON text of one: the object.
    - None or an empty text: {}.
    - Anything else: as it is, for the caller to refuse or keep.
    """
    raw_arguments = function.get("arguments", function.get("parameters"))
    parsed_arguments = _parse_json_text(raw_arguments)
    if isinstance(parsed_arguments, dict):
        return parsed_arguments
    return {} if raw_arguments in (None, "") else raw_arguments


def _require_json_writable(calls_or_tools: Any, shown_name: str) -> Any:
    """Return calls or tools, after a check that they can be written as JSON in UTF-8. Raises RowError: bad_tools."""
    try:
        json.dumps(calls_or_tools, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError("bad_tools", f"{shown_name} cannot be written as JSON: {error}") from None
    return calls_or_tools


def _as_list(value: Any) -> Any:
    """Make a list of a list, a single object, or a JSON text of either; any other value stays as it is.

    Examples: [a, b] -> [a, b]; {"name": "x"} -> [{"name": "x"}]; the text '[{"name": "x"}]' -> [{"name": "x"}]; "x" -> "x".
    """
    parsed = _parse_json_text(value)
    if isinstance(parsed, dict):
        return [parsed]
    return parsed


def _parse_json_text(value: Any) -> Any:
    """Read the value that a JSON text holds: "[1]" -> [1]. As it is: no text, no JSON, or JSON that has a key twice or NaN.

    Reading the last two would change what the text says.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_pairs_hook=_refuse_doubled_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return value


def _refuse_doubled_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs. Raises ValueError for a key that is there twice, of which json would keep the last."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key is there twice")
    return fields


def _refuse_constant(name: str) -> Any:
    """Raise ValueError for NaN and Infinity, which Python's json reads although they are not JSON."""
    raise ValueError(name)
