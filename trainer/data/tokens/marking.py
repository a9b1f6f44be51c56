"""Where the learned contents are in a rendered conversation, by rendering it again with marks around them.

A way of marking counts only if the marked text without its marks is the plain text, character by character, and every
learned turn shows its marks once, in order.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from strategies.errors import DataError
from trainer.data.document import Message, Refused
from trainer.data.tokens.probing import RESERVED

# Private-use characters of the last plane: no font uses them and no template looks for them.
BEGIN, END, THOUGHT = RESERVED[0], RESERVED[1], RESERVED[2]
_MARKS = re.compile(f"([{BEGIN}{END}{THOUGHT}])")
_THOUGHT = re.compile(r"(\s*<think>\s*)?(.*</think>\s*)(.*)", re.DOTALL)


class Apply(Protocol):
    """Renders messages, with the header of the turn to come if `prompt`."""

    def __call__(self, messages: list[Message], *, prompt: bool = False) -> str: ...


@dataclass(slots=True)
class _Turn:
    """Positions in the text without marks: of a thought, if the template kept it, and of the content."""

    thought: int | None
    begin: int
    end: int


class Marker:
    """Finds contents with one template."""

    def __init__(self, apply: Apply) -> None:
        self._apply = apply

    def content_begin(self, messages: list[Message], index: int, text: str) -> int | None:
        """Where the content of one message begins in `text`; None if the template does not tell."""
        for mark in (mark_whole, mark_trimmed):
            turns = self._marked(messages, [index], text, [mark] * len(messages))
            if turns is not None:
                return turns[0].begin
        return None

    def contents(self, messages: list[Message], learned: list[int], text: str, where: str) -> list[tuple[int, int]]:
        """Spans of the learned contents in `text`, by the first way of marking that leaves the text unchanged."""
        for mark in (mark_whole, mark_trimmed, mark_thought):
            turns = self._marked(messages, learned, text, [mark] * len(messages))
            if turns is None:
                continue
            if mark is mark_trimmed:
                self._widen(messages, learned, text, turns)
            return [
                (self._begin(messages, learned, text, number, turn, where), turn.end)
                for number, turn in enumerate(turns)
            ]
        role = messages[learned[-1]]["role"]
        article = "an" if role == "assistant" else "a"
        raise DataError(
            f"{where}: the chat template changes the text of {article} {role} turn (more than trimming it), so that "
            "what is to be learned cannot be told; give a template with {% generation %} blocks in model.chat_template"
        )

    def _marked(
        self, messages: list[Message], learned: list[int], text: str, marks: list[Callable[[str], str]]
    ) -> list[_Turn] | None:
        """Render with marks; None unless every learned turn shows them once, in order, and the text is the same."""
        wrapped = list(messages)
        for i in learned:
            wrapped[i] = {**messages[i], "content": marks[i](messages[i]["content"])}
        pieces = _MARKS.split(self._apply(wrapped))
        if "".join(pieces[::2]) != text:
            return None
        turns: list[_Turn] = []
        position, thought, begin = 0, None, None
        for piece, mark in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
            position += len(piece)
            if mark == THOUGHT and thought is None and begin is None:
                thought = position
            elif mark == BEGIN and begin is None:
                begin = position
            elif mark == END and begin is not None:
                turns.append(_Turn(thought, begin, position))
                thought = begin = None
            elif mark:
                return None
        return turns if begin is None and thought is None and len(turns) == len(learned) else None

    def _widen(self, messages: list[Message], learned: list[int], text: str, turns: list[_Turn]) -> None:
        """A template may trim some turns only, or line ends only: what it keeps of the outer whitespace of one is learned too."""
        for number, index in enumerate(learned):
            content = messages[index]["content"]
            before = len(content) - len(content.lstrip())
            after = before + len(content.strip())

            def found(first: int, last: int, number: int = number, index: int = index) -> bool:
                marks: list[Callable[[str], str]] = [mark_trimmed] * len(messages)
                marks[index] = partial(mark_between, first=first, last=last)
                wider = self._marked(messages, learned, text, marks)
                if wider is not None:
                    turns[number] = wider[number]
                return wider is not None

            if content == content.strip() or found(0, len(content)):
                continue
            # What is trimmed is a beginning or an end: a mark within it keeps it from being trimmed, and the text differs.
            first = bisect_left(range(before), True, key=lambda at: found(at, after))
            last = len(content)
            last -= bisect_left(range(last - after), True, key=lambda rest: found(first, last - rest))

    def _begin(
        self, messages: list[Message], learned: list[int], text: str, number: int, turn: _Turn, where: str
    ) -> int:
        """Where learning begins: at the content; with a thought, where generation would have begun."""
        has_thought = "</think>" in messages[learned[number]]["content"]
        if turn.thought is None:
            if has_thought and number == len(learned) - 1 and "</think>" not in text[turn.begin : turn.end]:
                raise Refused(
                    where,
                    "thought_lost",
                    "the chat template throws away the <think> part of the last assistant turn; remove it from the data "
                    "or give another template in model.chat_template",
                )
            return turn.begin
        prompt = self._apply(messages[: learned[number]], prompt=True)
        if not text.startswith(prompt) or len(prompt) > turn.thought:
            message = f"cannot tell where assistant turn {number + 1} begins, with its <think> part"
            raise Refused(where, "thought_lost", message)
        return len(prompt)


def mark_whole(content: str) -> str:
    """Marks around everything."""
    return f"{BEGIN}{content}{END}"


def mark_between(content: str, first: int, last: int) -> str:
    """Marks around a part."""
    return f"{content[:first]}{BEGIN}{content[first:last]}{END}{content[last:]}"


def mark_trimmed(content: str) -> str:
    """Marks inside the outer whitespace, so that the template still trims it, if it trims."""
    core = content.strip()
    at = len(content) - len(content.lstrip())
    return f"{content[:at]}{BEGIN}{core}{END}{content[at + len(core) :]}"


def mark_thought(content: str) -> str:
    """Marks for templates that take a <think> part out of the content and put it elsewhere, or nowhere."""
    match = _THOUGHT.fullmatch(content)
    if match is None:
        return mark_trimmed(content)
    return f"{match.group(1) or ''}{THOUGHT}{match.group(2)}{mark_trimmed(match.group(3))}"


def mark_thought_alone(content: str) -> str:
    """The same without marks around a blank answer, which templates may ask for beside calls."""
    return mark_thought(content).removesuffix(BEGIN + END)
