"""Which characters of a rendered conversation are learned, found by rendering it again with marks around the learned contents.

A way of marking counts only if the marked text without its marks is the plain text, character by character, and every
learned turn shows its marks once, in order. What a template puts around contents, its skeleton, is remembered for each
shape of conversation: its roles, which turns are learned, and the whitespace around each content. A later one of the shape has
its spans read off only if skeleton and contents put together are its own rendering, character by character.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from strategies.errors import DataError
from trainer.data.document import Message, RefusedDocument

RESERVED = "\U0010fb01\U0010fb02\U0010fb03\U0010fb04\U0010fb05"
"""Private-use characters of the last plane, which no font uses and no template looks for; data must not have them."""
BEGIN, END, THOUGHT = RESERVED[0], RESERVED[1], RESERVED[2]
_MARKS = re.compile(f"([{BEGIN}{END}{THOUGHT}])")
_THOUGHT = re.compile(r"(\s*<think>\s*)?(.*</think>\s*)(.*)", re.DOTALL)
_MAX_SHAPES = 4096
_MAX_MISSES = 8
_SKELETON_AT_USE = 2  # learning a shape costs a few renderings, which one that comes once does not pay back

Apply = Callable[..., str]
"""Renders messages, with the header of the turn to come if `prompt`."""
Spans = list[tuple[int, int]]
"""[begin, end) of each learned turn, ascending."""
Shape = tuple[object, ...]


@dataclass(slots=True)
class _MarkedTurn:
    """Positions in the text without marks: of a thought, if the template kept it, and of the content."""

    thought_begin: int | None
    begin: int
    end: int


@dataclass(slots=True)
class _Skeleton:
    """Text around n contents, and spans in it."""

    literals: list[str]
    """n + 1 of them: before the first content, between the contents, after the last."""
    ending: str
    """What the last literal becomes once the last turn is closed."""
    edges: list[tuple[int, int, int, int]]
    """Per span: contents before its begin, characters of literals before it; the same for its end."""

    def fit(self, cores: list[str], text: str) -> tuple[str, Spans] | None:
        """The closed text and its spans, if `text` is the skeleton with these contents."""
        pieces, lengths_before = [self.literals[0]], [0]
        for core, literal in zip(cores, self.literals[1:], strict=True):
            pieces += (core, literal)
            lengths_before.append(lengths_before[-1] + len(core))
        if "".join(pieces) != text:
            return None
        if self.ending != (last := self.literals[-1]):
            text = text[: len(text) - len(last)] + self.ending
        return text, [(lengths_before[i] + begin, lengths_before[j] + end) for i, begin, j, end in self.edges]


class SpanFinder:
    """Finds and closes learned turns with one template.

    `added` are the tokenizer's added tokens, one of which closes the last turn where it follows; `ends` match what closes a
    turn, by role, and `eos` closes the last where the template does not.
    """

    def __init__(self, apply: Apply, added: list[str], ends: dict[str, re.Pattern[str]], eos: str) -> None:
        self._apply, self._added_tokens, self._end_patterns, self._eos = apply, added, ends, eos
        self._any_token = leading_token_pattern(added)
        self._skeletons: dict[Shape, _Skeleton | None] = {}
        self._times_seen: dict[Shape, int] = {}
        self._misses: dict[Shape, int] = {}

    def find_spans(
        self, messages: list[Message], learned: list[int], text: str, where: str, *, fast: bool = True
    ) -> tuple[str, Spans]:
        """The closed text of a conversation that is rendered as `text`, and its spans. Errors: DataError, RefusedDocument."""
        spans = self._spans_by_skeleton(messages, learned, text) if fast else None
        return self._spans_by_marking(messages, learned, text, where) if spans is None else spans

    def _spans_by_skeleton(self, messages: list[Message], learned: list[int], text: str) -> tuple[str, Spans] | None:
        """The same by the skeleton of its shape; None where only the exact way tells."""
        roles, cores, spaces = [], [], []
        for number, message in enumerate(messages):
            content = message["content"]
            core = content.strip()
            # empty contents may be left out by a template, thoughts moved or hidden, other fields written as well
            if not core or "</think>" in core or len(message) > 2:
                return None
            if len(core) != len(content):
                at = content.index(core)
                spaces.append((number, content[:at], content[at + len(core) :]))
            roles.append(message["role"])
            cores.append(core)
        shape = (*roles, tuple(learned), *spaces)
        skeleton = (
            self._skeletons[shape] if shape in self._skeletons else self._learn_skeleton(shape, roles, learned, spaces)
        )
        if skeleton is None or (spans := skeleton.fit(cores, text)) is not None:
            return None if skeleton is None else spans
        # The template may write the time, and a skeleton learned anew fits; or it looks into contents, and none does.
        self._misses[shape] = self._misses.get(shape, 0) + 1
        self._skeletons[shape] = None
        if self._misses[shape] < _MAX_MISSES:
            del self._skeletons[shape]
        return None

    def _learn_skeleton(
        self, shape: Shape, roles: list[str], learned: list[int], spaces: list[tuple[int, str, str]]
    ) -> _Skeleton | None:
        """The skeleton of a shape that comes again, from the exact way with a conversation of placeholders."""
        self._times_seen[shape] = self._times_seen.get(shape, 0) + 1
        if self._times_seen[shape] < _SKELETON_AT_USE:
            if len(self._times_seen) > _MAX_SHAPES:
                self._times_seen.clear()
            return None
        if len(self._skeletons) >= _MAX_SHAPES:
            self._skeletons.clear()
        whitespace = {number: (before, after) for number, before, after in spaces}
        marks = [f"{RESERVED[3]}{number}{RESERVED[4]}" for number in range(len(roles))]
        contents = [mark.join(whitespace.get(number, ("", ""))) for number, mark in enumerate(marks)]
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        self._skeletons[shape] = None
        try:
            text = self._apply(messages)
            self._skeletons[shape] = self._cut_skeleton(
                marks, text, *self._spans_by_marking(messages, learned, text, "")
            )
        except Exception:  # noqa: BLE001 - a template that dislikes placeholders is asked about each conversation
            return None
        return self._skeletons[shape]

    def _spans_by_marking(
        self, messages: list[Message], learned: list[int], text: str, where: str
    ) -> tuple[str, Spans]:
        try:
            spans = self._content_spans(messages, learned, text, where)
        except DataError:
            fresh = self._apply(messages)
            if fresh == text:
                raise
            text = fresh  # the template writes the date, and a day ended between the two renderings
            spans = self._content_spans(messages, learned, text, where)
        return self.close_turns(text, spans, [messages[i]["role"] for i in learned])

    def _content_spans(self, messages: list[Message], learned: list[int], text: str, where: str) -> Spans:
        """Spans of the learned contents in `text`, by the first way of marking that leaves the text unchanged."""
        for mark in (mark_whole, mark_trimmed, mark_thought):
            turns = render_marked(self._apply, messages, learned, text, [mark] * len(messages))
            if turns is None:
                continue
            if mark is mark_trimmed:
                self._include_kept_whitespace(messages, learned, text, turns)
            return [
                (self._learning_begin(messages, learned, text, n, turn, where), turn.end)
                for n, turn in enumerate(turns)
            ]
        role = messages[learned[-1]]["role"]
        raise DataError(
            f"{where}: the chat template changes the text of {'an' if role == 'assistant' else 'a'} {role} turn (more than "
            "trimming it), so that what is to be learned cannot be told; give a template with {% generation %} blocks in "
            "model.chat_template"
        )

    def _include_kept_whitespace(
        self, messages: list[Message], learned: list[int], text: str, turns: list[_MarkedTurn]
    ) -> None:
        """A template may trim some turns only, or line ends only: what it keeps of the outer whitespace of one is learned too."""
        for number, index in enumerate(learned):
            content = messages[index]["content"]
            before = len(content) - len(content.lstrip())
            after = before + len(content.strip())

            def try_marks(first: int, last: int, number: int = number, index: int = index) -> bool:
                marks: list[Callable[[str], str]] = [mark_trimmed] * len(messages)
                marks[index] = partial(mark_between, first=first, last=last)
                wider = render_marked(self._apply, messages, learned, text, marks)
                if wider is not None:
                    turns[number] = wider[number]
                return wider is not None

            if content == content.strip() or try_marks(0, len(content)):
                continue
            # What is trimmed is a beginning or an end: a mark within it keeps it from being trimmed, and the text differs.
            first = bisect_left(range(before), True, key=lambda at: try_marks(at, after))
            last = len(content)
            last -= bisect_left(range(last - after), True, key=lambda left_out: try_marks(first, last - left_out))

    def _learning_begin(
        self, messages: list[Message], learned: list[int], text: str, number: int, turn: _MarkedTurn, where: str
    ) -> int:
        """Where learning begins: at the content; with a thought, where generation would have begun."""
        has_thought = "</think>" in messages[learned[number]]["content"]
        if turn.thought_begin is None:
            if has_thought and number == len(learned) - 1 and "</think>" not in text[turn.begin : turn.end]:
                said = "the chat template throws away the <think> part of the last assistant turn; remove it from the data "
                raise RefusedDocument(where, "thought_lost", f"{said}or give another template in model.chat_template")
            return turn.begin
        prompt = self._apply(messages[: learned[number]], prompt=True)
        if not text.startswith(prompt) or len(prompt) > turn.thought_begin:
            message = f"cannot tell where assistant turn {number + 1} begins, with its <think> part"
            raise RefusedDocument(where, "thought_lost", message)
        return len(prompt)

    def close_turns(
        self, text: str, spans: Spans, roles: list[str], already_closed: tuple[str, ...] = ()
    ) -> tuple[str, Spans]:
        """Extend every span by its end-of-turn token, unless it ends with one of `already_closed`; append EOS if needed."""
        closed = []
        for number, ((begin, end), role) in enumerate(zip(spans, roles, strict=True)):
            final = number == len(spans) - 1
            if not (already_closed and text[begin:end].rstrip().endswith(already_closed)):
                if match := (self._any_token if final else self._end_patterns[role]).match(text, end):
                    end = match.end()
                elif final:  # only words or whitespace follow: what words the template adds are learned, then eos
                    text = text[:end] + text[end:].rstrip() + self._eos
                    end = len(text)
            closed.append((begin, end))
        return text, closed

    def _cut_skeleton(self, marks: list[str], text: str, closed: str, spans: Spans) -> _Skeleton | None:
        """Take the placeholders out of a text that has each of them once, in order."""
        literals, starts, position = [], [], 0
        for mark in marks:
            at = text.find(mark, position)
            if at < 0 or text.count(mark) != 1:
                return None
            literals.append(text[position:at])
            starts.append(at)
            position = at + len(mark)
        if closed[:position] != text[:position]:
            return None
        literals.append(text[position:])
        edges = []
        for span in spans:
            span_edge: list[int] = []
            for at in span:  # as placeholders before it, and characters of literals before it
                count = bisect_left(starts, at)
                before = sum(map(len, marks[:count]))
                if count and at < starts[count - 1] + len(marks[count - 1]):
                    return None
                span_edge += (count, at - before)
            # A content that begins like a token must not be taken into the token that closes the turn before it.
            literal = literals[span_edge[2]].lstrip()
            if span_edge[2] < len(marks) and any(
                len(token) > len(literal) and token.startswith(literal) for token in self._added_tokens
            ):
                return None
            edges.append((span_edge[0], span_edge[1], span_edge[2], span_edge[3]))
        return _Skeleton(literals, closed[position:], edges)


def render_marked(
    apply: Apply, messages: list[Message], learned: list[int], text: str, marks: list[Callable[[str], str]]
) -> list[_MarkedTurn] | None:
    """Render with marks; None unless every learned turn shows them once, in order, and the text is the same."""
    marked_messages = list(messages)
    for i in learned:
        marked_messages[i] = {**messages[i], "content": marks[i](messages[i]["content"])}
    pieces = _MARKS.split(apply(marked_messages))
    if "".join(pieces[::2]) != text:
        return None
    turns: list[_MarkedTurn] = []
    position, thought, begin = 0, None, None
    for piece, mark in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
        position += len(piece)
        if mark == THOUGHT and thought is None and begin is None:
            thought = position
        elif mark == BEGIN and begin is None:
            begin = position
        elif mark == END and begin is not None:
            turns.append(_MarkedTurn(thought, begin, position))
            thought = begin = None
        elif mark:
            return None
    return turns if begin is None and thought is None and len(turns) == len(learned) else None


def leading_token_pattern(tokens: list[str]) -> re.Pattern[str]:
    """Matches one of the tokens, the longest first, after whitespace."""
    return re.compile(r"\s*(" + "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ")")


def mark_whole(content: str) -> str:
    """Marks around everything."""
    return f"{BEGIN}{content}{END}"


def mark_between(content: str, first: int, last: int) -> str:
    """Marks around a part."""
    return f"{content[:first]}{BEGIN}{content[first:last]}{END}{content[last:]}"


def mark_trimmed(content: str) -> str:
    """Marks inside the outer whitespace, so that the template still trims it, if it trims."""
    at = len(content) - len(content.lstrip())
    return mark_between(content, at, at + len(content.strip()))


def mark_thought(content: str) -> str:
    """Marks for templates that take a <think> part out of the content and put it elsewhere, or nowhere."""
    match = _THOUGHT.fullmatch(content)
    if match is None:
        return mark_trimmed(content)
    return f"{match.group(1) or ''}{THOUGHT}{match.group(2)}{mark_trimmed(match.group(3))}"


def mark_thought_alone(content: str) -> str:
    """The same without marks around a blank answer, which templates may ask for beside calls."""
    return mark_thought(content).removesuffix(BEGIN + END)
