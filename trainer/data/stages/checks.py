"""What is wrong with the values of a row, which refuses it, and what looks wrong in a document, which a policy decides.

Refused always: what is no text or teaches nothing. Counted, or put into quarantine where the settings say so: turns out
of order or said twice, trailing turns, empty texts, damaged encoding, control characters, texts beyond a length.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from trainer.data.document import Document, Message, Tally

ROLES = {  # what rows may say -> what chat templates know
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Columns, and keys of turns, that hold what is no text."""
_CALLS = ("tool_calls", "function_call")
_WEIGHTS = ("loss_weight", "loss_mask", "loss", "mask")
_CARRIERS = frozenset((*MEDIA, *_CALLS, *_WEIGHTS, "reasoning_content", "thinking"))
"""Keys of turns that nothing reads, and without which a turn means something else."""
_OF_TOOLS = ("tool", "function", "function_call", "observation", "ipython")
_TEXT_PARTS = ("text", "input_text", "output_text")
_VERDICTS = {"up": True, "true": True, "1": True, "down": False, "false": False, "0": False}
_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist = 3, 8, 4


class Refusal(Exception):
    """Why a row is no document: a reason code to count by, and a message with the value and the constraint."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


def shown(value: Any) -> str:
    """A value as messages show it, shortened."""
    return _SHORT.repr(value)


def is_nothing(value: Any) -> bool:
    """Whether a value is one of those by which tables and files say that there is none."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, dict | list):
        return all(is_nothing(item) for item in (value.values() if isinstance(value, dict) else value))
    return value is None


def is_texts(value: Any) -> bool:
    """Whether a value is a list of texts, as some tables keep the one text that there is."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def text_of(fields: dict[str, Any], key: str, name: str | None = None) -> str:
    """The text in a column, or the one in its list. Raises Refusal: not_text, empty_text, surrogate."""
    value: Any = fields.get(key)
    name = name or f'"{key}"'
    if is_texts(value):
        if len(value) > 1:
            raise Refusal(
                "not_text",
                f"{name} is a list of {len(value)} texts, {shown(value)}, and one is meant: join them, or choose one of a "
                f"column with data.columns, as in data.columns.{key}={key}.0",
            )
        value = value[0]
    if not isinstance(value, str):
        raise Refusal("not_text", f"{name} is {shown(value) if key in fields else 'missing'}; it must be a text")
    if not value or value.isspace():
        raise Refusal("empty_text", f"{name} is an empty text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"half a surrogate pair (character {error.start + 1})"
        raise Refusal("surrogate", f"{name} holds {half}, which is no character") from None
    return value


def label_of(value: Any) -> str:
    """The class label as text: a name, a whole number, or true/false. Raises Refusal: bad_label."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and value.strip():
        return text_of({"label": value}, "label").strip()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    raise Refusal("bad_label", f'"label" is {shown(value)}; it must be a name, a whole number or true/false')


def verdict_of(value: Any) -> bool | None:
    """Thumbs up (True) or down (False) of true/false, 1/0, up/down; None for anything else."""
    if isinstance(value, bool | str | int):
        return _VERDICTS.get(str(int(value)) if isinstance(value, bool) else str(value).strip().lower())
    return None


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
    if not isinstance(value, list) or not value:
        raise Refusal("bad_messages", f'"{name}" is {shown(value)}; it must be {needs or "a list of messages"}')
    return [_turn(turn, f"{name}[{number}]", ignored) for number, turn in enumerate(value, 1)]


def _turn(turn: Any, name: str, ignored: Collection[str]) -> Message:
    if not isinstance(turn, dict):
        raise Refusal("bad_messages", f'{name} is {shown(turn)}; it must be {{"role": ..., "content": ...}}')
    role_key = "from" if "from" in turn and "role" not in turn else "role"
    text_key = "value" if "content" not in turn and ("value" in turn or role_key == "from") else "content"
    role = turn.get(role_key)
    if not isinstance(role, str) or role not in ROLES:
        tools = "; calls of tools and their results are not supported" if role in _OF_TOOLS else ""
        raise Refusal("unknown_role", f"{name}.{role_key} is {shown(role)}; known roles are {', '.join(ROLES)}{tools}")
    if not _CARRIERS.isdisjoint(turn):
        _refuse_carriers(turn, name, ignored)
    message: Message = {"role": ROLES[role], "content": _content(turn, text_key, f"{name}.{text_key}")}
    train = _train(turn, name)
    if train is not None:
        message["train"] = train
    return message


def _refuse_carriers(turn: dict[str, Any], name: str, ignored: Collection[str]) -> None:
    """Raise Refusal for a key that carries meaning and that nothing reads."""
    for key in sorted(_CARRIERS.intersection(turn) - {*ignored}):
        value = turn[key]
        if value is None if key in _WEIGHTS else is_nothing(value):
            continue
        if key == "loss_weight" and value == 1:
            continue  # what every turn has anyway
        remedy = "write the call into its content" if key in _CALLS else "write what counts into its content"
        if key in _WEIGHTS:
            remedy = 'say whether the turn is learned by "train": true or false'
        reason = "tool_calls" if key in _CALLS else f"unread_{key}"
        what = f"{name} has {key} ({shown(value)}), which nothing reads"
        raise Refusal(reason, f"{what}: {remedy}, or name {key} in data.ignore_columns to train without it")


def _content(turn: dict[str, Any], key: str, name: str) -> str:
    value = turn.get(key)
    if not isinstance(value, list) or is_texts(value):
        return text_of(turn, key, name)
    texts = []
    for number, part in enumerate(value, 1):
        said = (part.get("text") or part.get("value")) if isinstance(part, dict) else None
        if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS or not isinstance(said, str):
            raise Refusal(
                "not_text", f'{name}[{number}] is {shown(part)}; parts must be {{"type": "text", "text": ...}}'
            )
        texts.append(said)
    return text_of({key: "".join(texts)}, key, name)


def _train(turn: dict[str, Any], name: str) -> bool | None:
    """Whether the turn is learned, by `train`, `weight` or `masked`; None where none of them is given."""
    found = set()
    for key, wanted in (("train", True), ("weight", True), ("masked", False)):
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, bool) and not (key == "weight" and isinstance(value, int | float) and value in (0, 1)):
            allowed = "0 or 1" if key == "weight" else "true or false"
            raise Refusal("bad_train", f"{name}.{key} is {shown(value)}; it must be {allowed}")
        found.add(bool(value) is wanted)
    if len(found) > 1:
        raise Refusal("bad_train", f'{name}: "train", "weight" and "masked" contradict each other')
    return found.pop() if found else None


def conversation(turns: list[Message]) -> list[Message]:
    """The turns, if something can be learned from them. Raises Refusal."""
    roles = [turn["role"] for turn in turns]
    if roles[0] == "assistant":
        message = "the conversation begins with an assistant turn; it must begin with a system or a user turn"
        raise Refusal("assistant_first", message)
    if "assistant" not in roles:
        message = f"the conversation has no assistant turn (roles: {', '.join(roles)}); there is nothing to learn"
        raise Refusal("no_assistant_turn", message)
    if not any(turn.get("train", turn["role"] == "assistant") for turn in turns):
        raise Refusal("no_learned_turn", "every assistant turn is marked as not learned; there is nothing to learn")
    return turns


def parted(before: list[Message], chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], ...]:
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


class Policy(StrEnum):
    """What happens to a document in which something looks wrong."""

    keep = "keep"
    quarantine = "quarantine"


@dataclass(kw_only=True, slots=True)
class ChecksConfig:
    """What is looked for in documents, and what happens to those in which it is found."""

    system_late: Policy = Policy.keep
    """Conversations with a system turn that is not the first turn."""
    assistant_before_user: Policy = Policy.keep
    """Conversations in which the assistant speaks before any user does."""
    same_role_twice: Policy = Policy.keep
    """Conversations with two user turns, or two assistant turns, in a row."""
    trailing_turns: Policy = Policy.keep
    """Conversations that end with another turn than the assistant's, which teaches nothing."""
    repeated_turn: Policy = Policy.keep
    """Conversations in which one role says the same text twice."""
    empty_text: Policy = Policy.keep
    """Documents with a text that is empty or only whitespace, as earlier stages may leave it."""
    encoding_damage: Policy = Policy.keep
    """Documents with replacement characters, or with text that was decoded with the wrong encoding (mojibake)."""
    control_characters: Policy = Policy.keep
    """Documents with control characters other than tab and line ends, or with characters that Unicode bars."""
    over_long: Policy = Policy.keep
    """Documents with a text of more than `max_chars` characters."""
    max_chars: int | None = 1_000_000
    """Longest text in characters for `over_long`; null sets no limit."""
    repeat_chars: int = 40
    """Shortest text in characters that counts for `repeated_turn`; people do say yes twice."""


KINDS = tuple(field.name for field in fields(ChecksConfig) if field.name not in ("max_chars", "repeat_chars"))
"""What documents are checked for, in the order of verdicts."""
_CONTROL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufdd0-\ufdef\ufffe\uffff]")
# The first and a further byte of a UTF-8 character, read in another encoding. Cyrillic has such pairs of its own.
_LEADS, _FOLLOWERS = bytes(range(0xC2, 0xF5)), bytes(range(0x80, 0xC0))
_LATIN_LEADS = _LEADS.decode("cp1252") + _LEADS.decode("cp1250")
_LATIN = "".join(_FOLLOWERS.decode(name, "ignore") for name in ("latin-1", "cp1252", "cp1250"))
_CYRILLIC_LEADS, _CYRILLIC = b"\xd0\xd1\xe2".decode("cp1251"), _FOLLOWERS.decode("cp1251", "ignore")
_SUSPECT = re.compile(f"[{_LATIN_LEADS}][{_LATIN}]|(?:[{_CYRILLIC_LEADS}][{_CYRILLIC}]){{2}}|\u0432\u0402")


class Checks:
    """The stage that looks at documents and changes nothing in them."""

    name = "checks"

    def __init__(self, config: ChecksConfig) -> None:
        from ftfy.badness import is_bad

        self.config = config
        self._is_bad: Callable[[str], bool] = is_bad

    def __call__(self, document: Document, tally: Tally) -> Document | None:
        """The document, each trouble noted; None, under its first trouble, where one of them means quarantine."""
        found = self._found(document)
        for kind, place in found.items():
            if getattr(self.config, kind) == Policy.quarantine:
                tally.drop(self.name, kind, f"{document.where} ({place})")
                return None
        for kind, place in found.items():
            tally.note(self.name, kind, f"{document.where} ({place})")
        return document

    def verdicts(self, document: Document) -> list[str]:
        """The kinds of trouble in a document, in the order of `KINDS`; a pure function of it and the limits."""
        return list(self._found(document))

    def _found(self, document: Document) -> dict[str, str]:
        """Kinds of trouble, in the order of `KINDS`, each with its first place in the document."""
        places: dict[str, str] = {}
        for kind, place in self._troubles(document):
            places.setdefault(kind, place)
        return {kind: places[kind] for kind in KINDS if kind in places} if places else places

    def _troubles(self, document: Document) -> Iterator[tuple[str, str]]:
        prompt = document.messages or []
        if document.chosen is not None or document.rejected is not None:
            for name in ("chosen", "rejected"):
                yield from _order([*prompt, *(getattr(document, name) or [])], f" of {name}", self.config.repeat_chars)
        elif document.messages is not None:
            yield from _order(prompt, "", self.config.repeat_chars)
        for number, text in enumerate(document.texts(), 1):
            yield from self._text(text, f"text {number}")

    def _text(self, text: str, name: str) -> Iterator[tuple[str, str]]:
        if not text or text.isspace():
            yield "empty_text", name
        if self.config.max_chars is not None and len(text) > self.config.max_chars:
            yield "over_long", f"{name}, {len(text)} characters"
        if match := _CONTROL.search(text):
            yield "control_characters", f"{name}, U+{ord(match.group()):04X} at character {match.start() + 1}"
        if text.isascii():
            return
        at = text.find("\ufffd")
        if at >= 0:
            yield "encoding_damage", f"{name}, U+FFFD at character {at + 1}"
        elif (match := _SUSPECT.search(text)) and self._is_bad(text):
            yield "encoding_damage", f"{name}, {match.group()!r} at character {match.start() + 1}"


def _order(turns: list[Message], suffix: str, repeat_chars: int) -> Iterator[tuple[str, str]]:
    roles = [turn["role"] for turn in turns]
    said: set[tuple[str, str]] = set()
    for number, (turn, role) in enumerate(zip(turns, roles, strict=True), 1):
        where = f"turn {number}{suffix}"
        if role == "system" and number > 1:
            yield "system_late", where
        if role == "assistant" and "user" not in roles[: number - 1]:
            yield "assistant_before_user", where
        if number > 1 and role == roles[number - 2] != "system":
            yield "same_role_twice", where
        if len(turn["content"]) >= repeat_chars and (role, turn["content"]) in said:
            yield "repeated_turn", where
        said.add((role, turn["content"]))
    if roles and roles[-1] != "assistant":
        yield "trailing_turns", f"turn {len(turns)}{suffix}"
