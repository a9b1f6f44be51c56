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
_SKELETON_AT_USE = 2  # a skeleton costs a few renderings, which a shape that comes only once does not pay back

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
    """What a template writes around the n contents of a conversation, and where the learned spans lie in it."""

    literals: list[str]
    """n + 1 of them: before the first content, between the contents, after the last."""
    ending: str
    """What the last literal becomes once the last turn is closed."""
    edges: list[tuple[int, int, int, int]]
    """Per span: how many contents are before its begin, how many characters of literals; the same two for its end."""

    def fit(self, cores: list[str], text: str) -> tuple[str, Spans] | None:
        """The closed text and its spans, if `text` is the skeleton with these contents."""
        pieces = [self.literals[0]]
        lengths_before = [0]
        for core, literal in zip(cores, self.literals[1:], strict=True):
            pieces += (core, literal)
            lengths_before.append(lengths_before[-1] + len(core))
        if "".join(pieces) != text:
            return None
        last_literal = self.literals[-1]
        if self.ending != last_literal:
            text = text[: len(text) - len(last_literal)] + self.ending
        return text, [(lengths_before[i] + begin, lengths_before[j] + end) for i, begin, j, end in self.edges]


class SpanFinder:
    """Finds the character spans of learned turns with one chat template, closing tokens included.

    `added_tokens`: the tokenizer's added tokens; any of them closes the last turn if it follows. `end_patterns`: what closes
    a turn, by role. `eos` is put after the last turn if the template does not close it.
    """

    def __init__(
        self, apply: Apply, added_tokens: list[str], end_patterns: dict[str, re.Pattern[str]], eos: str
    ) -> None:
        self._apply = apply
        self._added_tokens = added_tokens
        self._end_patterns = end_patterns
        self._eos = eos
        self._any_token = leading_token_pattern(added_tokens)
        self._skeletons: dict[Shape, _Skeleton | None] = {}
        """None for a shape that has no skeleton: its conversations are always rendered twice."""
        self._times_seen: dict[Shape, int] = {}
        self._misses: dict[Shape, int] = {}

    def find_spans(
        self, messages: list[Message], learned: list[int], text: str, location: str, *, fast: bool = True
    ) -> tuple[str, Spans]:
        """(closed text, spans) of a conversation that is rendered as `text`. Errors: DataError, RefusedDocument."""
        text_and_spans = self._spans_by_skeleton(messages, learned, text) if fast else None
        if text_and_spans is None:
            return self._spans_by_marking(messages, learned, text, location)
        return text_and_spans

    def _spans_by_skeleton(self, messages: list[Message], learned: list[int], text: str) -> tuple[str, Spans] | None:
        """Closed text and spans by the skeleton of the conversation's shape; None if it must be rendered with marks."""
        roles: list[str] = []
        cores: list[str] = []
        spaces: list[tuple[int, str, str]] = []
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
        if shape in self._skeletons:
            skeleton = self._skeletons[shape]
        else:
            skeleton = self._learn_skeleton(shape, roles, learned, spaces)
        if skeleton is None:
            return None
        text_and_spans = skeleton.fit(cores, text)
        if text_and_spans is not None:
            return text_and_spans
        # Either the template writes the time, and a skeleton learned anew will fit; or it looks into contents, and none
        # ever does. After `_MAX_MISSES` we assume the latter.
        self._misses[shape] = self._misses.get(shape, 0) + 1
        self._skeletons[shape] = None
        if self._misses[shape] < _MAX_MISSES:
            del self._skeletons[shape]
        return None

    def _learn_skeleton(
        self, shape: Shape, roles: list[str], learned: list[int], spaces: list[tuple[int, str, str]]
    ) -> _Skeleton | None:
        """Make the skeleton of a shape that comes again, by marking a conversation of placeholders.

        `spaces`: (turn, whitespace before its content, whitespace after it).
        """
        self._times_seen[shape] = self._times_seen.get(shape, 0) + 1
        if self._times_seen[shape] < _SKELETON_AT_USE:
            if len(self._times_seen) > _MAX_SHAPES:
                self._times_seen.clear()
            return None
        if len(self._skeletons) >= _MAX_SHAPES:
            self._skeletons.clear()
        whitespace = {number: (before, after) for number, before, after in spaces}
        placeholders: list[str] = []
        messages: list[Message] = []
        for number, role in enumerate(roles):
            placeholder = f"{RESERVED[3]}{number}{RESERVED[4]}"
            before, after = whitespace.get(number, ("", ""))
            placeholders.append(placeholder)
            messages.append({"role": role, "content": before + placeholder + after})
        self._skeletons[shape] = None
        try:
            text = self._apply(messages)
            closed, spans = self._spans_by_marking(messages, learned, text, "")
            self._skeletons[shape] = self._cut_skeleton(placeholders, text, closed, spans)
        except Exception:  # noqa: BLE001 - a template that dislikes placeholders is asked about each conversation
            return None
        return self._skeletons[shape]

    def _spans_by_marking(
        self, messages: list[Message], learned: list[int], text: str, location: str
    ) -> tuple[str, Spans]:
        """Closed text and spans by rendering the conversation a second time, with marks around the learned contents."""
        try:
            spans = self._content_spans(messages, learned, text, location)
        except DataError:
            fresh_text = self._apply(messages)
            if fresh_text == text:
                raise
            text = fresh_text  # the template writes the date, and a day ended between the two renderings
            spans = self._content_spans(messages, learned, text, location)
        return self.close_turns(text, spans, [messages[i]["role"] for i in learned])

    def _content_spans(self, messages: list[Message], learned: list[int], text: str, location: str) -> Spans:
        """Spans of the learned contents in `text`, by the first way of marking that leaves the text unchanged."""
        for mark in (mark_whole, mark_trimmed, mark_thought):
            turns = render_marked(self._apply, messages, learned, text, [mark] * len(messages))
            if turns is None:
                continue
            if mark is mark_trimmed:
                self._include_kept_whitespace(messages, learned, text, turns)
            spans = []
            for number, turn in enumerate(turns):
                begin = self._learning_begin(messages, learned, text, number, turn, location)
                spans.append((begin, turn.end))
            return spans
        role = messages[learned[-1]]["role"]
        raise DataError(
            f"{location}: the chat template changes the text of {'an' if role == 'assistant' else 'a'} {role} turn (more than "
            "trimming it), so that what is to be learned cannot be told; give a template with {% generation %} blocks in "
            "model.chat_template"
        )

    def _include_kept_whitespace(
        self, messages: list[Message], learned: list[int], text: str, turns: list[_MarkedTurn]
    ) -> None:
        """Widen each turn by the outer whitespace that the template keeps: it may trim some turns only, or line ends only."""
        for number, index in enumerate(learned):
            content = messages[index]["content"]
            core_begin = len(content) - len(content.lstrip())
            core_end = core_begin + len(content.strip())

            def try_marks(first: int, last: int, number: int = number, index: int = index) -> bool:
                """Whether marks around content[first:last] leave the text unchanged; if so, the turn takes this span."""
                marks: list[Callable[[str], str]] = [mark_trimmed] * len(messages)
                marks[index] = partial(mark_between, first=first, last=last)
                wider = render_marked(self._apply, messages, learned, text, marks)
                if wider is not None:
                    turns[number] = wider[number]
                return wider is not None

            if content == content.strip() or try_marks(0, len(content)):
                continue
            # A template trims a beginning or an end of the whitespace. A mark inside that part would keep it from being
            # trimmed, and the text would differ. So the outermost mark that works is found by bisection.
            first = bisect_left(range(core_begin), True, key=lambda at: try_marks(at, core_end))
            last = len(content)
            last -= bisect_left(range(last - core_end), True, key=lambda left_out: try_marks(first, last - left_out))

    def _learning_begin(
        self, messages: list[Message], learned: list[int], text: str, number: int, turn: _MarkedTurn, location: str
    ) -> int:
        """Where learning begins: at the content; with a thought, where generation would have begun.

        `turn` is the `number`th learned turn.
        """
        has_thought = "</think>" in messages[learned[number]]["content"]
        is_last = number == len(learned) - 1
        if turn.thought_begin is None:
            # Templates drop thoughts of earlier turns on purpose; without that of the last one there is nothing to learn.
            if has_thought and is_last and "</think>" not in text[turn.begin : turn.end]:
                raise RefusedDocument(
                    location,
                    "thought_lost",
                    "the chat template throws away the <think> part of the last assistant turn; remove it from the data "
                    "or give another template in model.chat_template",
                )
            return turn.begin
        prompt = self._apply(messages[: learned[number]], prompt=True)
        if not text.startswith(prompt) or len(prompt) > turn.thought_begin:
            message = f"cannot tell where assistant turn {number + 1} begins, with its <think> part"
            raise RefusedDocument(location, "thought_lost", message)
        return len(prompt)

    def close_turns(
        self, text: str, spans: Spans, roles: list[str], already_closed: tuple[str, ...] = ()
    ) -> tuple[str, Spans]:
        """Extend every span by its end-of-turn token, unless it ends with one of `already_closed`; append EOS if needed."""
        closed_spans = []
        for number, ((begin, end), role) in enumerate(zip(spans, roles, strict=True)):
            is_final = number == len(spans) - 1
            if not (already_closed and text[begin:end].rstrip().endswith(already_closed)):
                pattern = self._any_token if is_final else self._end_patterns[role]
                match = pattern.match(text, end)
                if match:
                    end = match.end()
                elif is_final:  # only words or whitespace follow: what words the template adds are learned, then eos
                    text = text[:end] + text[end:].rstrip() + self._eos
                    end = len(text)
            closed_spans.append((begin, end))
        return text, closed_spans

    def _cut_skeleton(self, placeholders: list[str], text: str, closed: str, spans: Spans) -> _Skeleton | None:
        """Take the placeholders out of a text; None unless it has each of them once, in order."""
        literals: list[str] = []
        starts: list[int] = []
        position = 0
        for placeholder in placeholders:
            at = text.find(placeholder, position)
            if at < 0 or text.count(placeholder) != 1:
                return None
            literals.append(text[position:at])
            starts.append(at)
            position = at + len(placeholder)
        if closed[:position] != text[:position]:
            return None
        literals.append(text[position:])

        def split_position(at: int) -> tuple[int, int] | None:
            """(placeholders before a position, characters of literals before it); None inside a placeholder."""
            count = bisect_left(starts, at)
            if count and at < starts[count - 1] + len(placeholders[count - 1]):
                return None
            return count, at - sum(map(len, placeholders[:count]))

        edges = []
        for begin, end in spans:
            begin_edge = split_position(begin)
            end_edge = split_position(end)
            if begin_edge is None or end_edge is None:
                return None
            # A content that begins like a token must not be taken into the token that closes the turn before it.
            contents_before_end = end_edge[0]
            if contents_before_end < len(placeholders):
                literal = literals[contents_before_end].lstrip()
                if any(len(token) > len(literal) and token.startswith(literal) for token in self._added_tokens):
                    return None
            edges.append((*begin_edge, *end_edge))
        return _Skeleton(literals, closed[position:], edges)


def render_marked(
    apply: Apply, messages: list[Message], learned: list[int], text: str, marks: list[Callable[[str], str]]
) -> list[_MarkedTurn] | None:
    """Render with marks; None unless every learned turn shows them once, in order, and the text is the same."""
    marked_messages = list(messages)
    for i in learned:
        marked_messages[i] = {**messages[i], "content": marks[i](messages[i]["content"])}
    # Text and marks alternate: pieces[0::2] is text, pieces[1::2] are marks.
    pieces = _MARKS.split(apply(marked_messages))
    if "".join(pieces[::2]) != text:
        return None
    turns: list[_MarkedTurn] = []
    position = 0
    thought = None
    begin = None
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
    if begin is not None or thought is not None or len(turns) != len(learned):
        return None
    return turns


def leading_token_pattern(tokens: list[str]) -> re.Pattern[str]:
    """Matches one of the tokens, the longest first, after whitespace."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(r"\s*(" + "|".join(map(re.escape, longest_first)) + ")")


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
    """As `mark_thought`, but a blank answer gets no marks: templates may test for an empty content beside calls."""
    return mark_thought(content).removesuffix(BEGIN + END)
