"""Finds which characters of a rendered conversation are supervised, by rendering it again with marks around these contents.

A way of marking counts only if the marked text without its marks is the plain text, and every supervised turn shows its marks
once, in order.

Rendering everything twice is slow. So the text that a template puts around contents, its skeleton, is remembered for each shape
of conversation (`trainer/data/tokens/skeleton.py`). The spans of a later conversation of the same shape are read off the
skeleton, but only if skeleton and contents together are exactly its rendering.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial

from strategies.errors import DataError
from trainer.data.document import Message, RefusedDocument
from trainer.data.tokens.skeleton import ClosedText, Skeleton, Spans, cut_skeleton

RESERVED_CHARACTERS = "\U0010fb01\U0010fb02\U0010fb03\U0010fb04\U0010fb05"
"""Private-use characters of the last plane, which no font uses and no template looks for; data must not have them."""
CONTENT_BEGIN_MARK = RESERVED_CHARACTERS[0]
CONTENT_END_MARK = RESERVED_CHARACTERS[1]
"""Stand before and after the content of a turn."""
THOUGHT_MARK = RESERVED_CHARACTERS[2]
"""Stands where a thought begins."""
PLACEHOLDER_BEGIN = RESERVED_CHARACTERS[3]
PLACEHOLDER_END = RESERVED_CHARACTERS[4]
"""Stand around the number of a turn, in place of its content, while a skeleton is learned."""
_MARK_REGEX = re.compile(f"[{CONTENT_BEGIN_MARK}{CONTENT_END_MARK}{THOUGHT_MARK}]")
_THOUGHT_AND_ANSWER_REGEX = re.compile(r"(\s*<think>\s*)?(.*</think>\s*)(.*)", re.DOTALL)
_MAX_REMEMBERED_SHAPES = 4096
"""Shapes of conversations that are remembered; more are forgotten all at once, so that memory stays bounded."""
_MAX_MISFITS = 8
"""After so many conversations that their shape's skeleton does not fit, the shape is always rendered twice."""
_MIN_USES_FOR_SKELETON = 2
"""A skeleton is made when its shape comes for the second time: it costs a few renderings, which one use does not pay back."""

Render = Callable[..., str]
"""Renders messages as the chat template writes them; with `prompt=True`, with the header of the turn to come."""
Marker = Callable[[str], str]
"""Puts marks into the content of a message."""
Shape = tuple[object, ...]
"""What decides the skeleton of a conversation: ("user", "assistant", (1,), (0, ("", "\\n"))) for two roles, of which turn 1 is
supervised, and the whitespace around the content of turn 0."""
ContentWhitespace = dict[int, tuple[str, str]]
"""Whitespace (before, after) the content of each turn that has some, by the turn's index."""


@dataclass(slots=True)
class _MarkedTurn:
    """Where a supervised turn was found by marks: positions in the rendered text without marks, in characters."""

    thought_begin: int | None
    content_begin: int
    content_end: int


@dataclass(frozen=True, slots=True)
class RenderedConversation:
    """A plain conversation, as the template wrote it, and which of its turns are supervised."""

    messages: list[Message]
    supervised_indices: list[int]
    """Indices of the supervised turns in `messages`, ascending."""
    text: str
    """As the template rendered the messages, without marks."""
    location: str
    """`file:line` of the row, for errors."""

    @property
    def supervised_roles(self) -> list[str]:
        """The roles of the supervised turns."""
        return [self.messages[index]["role"] for index in self.supervised_indices]


class SpanFinder:
    """Finds the character spans of supervised turns with one chat template, closing tokens included.

    A span is what the model learns to write in a turn: its content, and the end-of-turn token that the template writes behind it.
    """

    def __init__(
        self, render: Render, added_tokens: list[str], end_patterns: dict[str, re.Pattern[str]], eos: str
    ) -> None:
        """Set up the search with one chat template.

        `render`: renders messages with the template. `added_tokens`: the tokenizer's added tokens; any of them closes the last
        turn if it follows. `end_patterns`: what closes a turn, by role. `eos` is put after the last turn if the template does not
        close it.
        """
        self._render = render
        self._added_tokens = added_tokens
        self._end_patterns = end_patterns
        self._eos = eos
        self._any_added_token_pattern = leading_token_pattern(added_tokens)
        self._skeletons: dict[Shape, Skeleton | None] = {}
        """None for a shape that has no skeleton: its conversations are always rendered twice."""
        self._times_seen: dict[Shape, int] = {}
        """How often a shape without a skeleton came."""
        self._num_misfits: dict[Shape, int] = {}
        """How often the skeleton of a shape did not fit a conversation."""

    def find_spans(self, conversation: RenderedConversation, *, try_skeleton: bool = True) -> ClosedText:
        """Find which characters of a rendered conversation are supervised: its closed text, with one span for each such turn.

        "Closed" means that the last turn ends with an end-of-turn token, even if the template writes none there.

        `try_skeleton`: read spans off the remembered text around contents, which is fast; False always renders a second time.

        Raises DataError if the spans cannot be told, RefusedDocument if the template drops the `<think>` part of the last turn.
        """
        closed_text = self._spans_by_skeleton(conversation) if try_skeleton else None
        if closed_text is None:
            return self._spans_by_marking(conversation)
        return closed_text

    def _spans_by_skeleton(self, conversation: RenderedConversation) -> ClosedText | None:
        """Find the supervised spans without a second rendering; None if the conversation must be rendered again, with marks.

        Conversations of one shape (roles, supervised turns, outer whitespace) share a skeleton: what the template writes around
        their contents, such as "<user>", "<assistant>" and "</s>". It is remembered by shape, and fitted to the contents.

        Returns the text, closed by an end-of-turn token, and its spans.
        """
        roles: list[str] = []
        contents: list[str] = []
        whitespace: ContentWhitespace = {}
        for index, message in enumerate(conversation.messages):
            content = message["content"]
            trimmed = content.strip()
            # A template may leave empty contents out, move or hide thoughts, and write fields beside role and content.
            has_fixed_surroundings = trimmed and "</think>" not in trimmed and len(message) == 2
            if not has_fixed_surroundings:
                return None
            if len(trimmed) != len(content):
                before, _, after = content.partition(trimmed)
                whitespace[index] = (before, after)
            roles.append(message["role"])
            contents.append(trimmed)
        shape = (*roles, tuple(conversation.supervised_indices), *whitespace.items())
        if shape in self._skeletons:
            skeleton = self._skeletons[shape]
        else:
            skeleton = self._learn_skeleton(shape, roles, conversation.supervised_indices, whitespace)
        if skeleton is None:
            return None
        closed_text = skeleton.fit(contents, conversation.text)
        if closed_text is None:
            self._forget_misfit(shape)
        return closed_text

    def _forget_misfit(self, shape: Shape) -> None:
        """Forget the skeleton of a shape of conversations, because it did not fit one; after `_MAX_MISFITS` times, for good.

        A skeleton is the text that the template writes around the contents of conversations with the same roles. Either the
        template writes the time, and a skeleton that is learned anew will fit; or it looks into contents, and none ever will.
        """
        self._num_misfits[shape] = self._num_misfits.get(shape, 0) + 1
        if self._num_misfits[shape] < _MAX_MISFITS:
            del self._skeletons[shape]
        else:
            # Remembered as a shape without a skeleton: its conversations are always rendered a second time.
            self._skeletons[shape] = None

    def _learn_skeleton(
        self, shape: Shape, roles: list[str], supervised_indices: list[int], whitespace: ContentWhitespace
    ) -> Skeleton | None:
        """Learn and remember the skeleton of a shape: what the template writes around the contents of such conversations.

        Called for a conversation whose shape has no remembered skeleton. The parameters after `shape` are its parts: roles of
        the turns, indices of the supervised ones, and whitespace around contents.

        Returns None if the shape has come only once so far, since a skeleton costs renderings that one use does not pay back.
        None also if the template has no fixed skeleton for it, which is remembered too.
        """
        self._times_seen[shape] = self._times_seen.get(shape, 0) + 1
        if self._times_seen[shape] < _MIN_USES_FOR_SKELETON:
            if len(self._times_seen) > _MAX_REMEMBERED_SHAPES:
                self._times_seen.clear()
            return None
        if len(self._skeletons) >= _MAX_REMEMBERED_SHAPES:
            self._skeletons.clear()
        self._skeletons[shape] = self._make_skeleton(roles, supervised_indices, whitespace)
        return self._skeletons[shape]

    def _make_skeleton(
        self, roles: list[str], supervised_indices: list[int], whitespace: ContentWhitespace
    ) -> Skeleton | None:
        """Find what the template writes around contents, by rendering a conversation whose contents are placeholders.

        `roles`: one a turn. `supervised_indices`: the supervised turns. `whitespace`: what stands around the content of a turn,
        by its index.

        None if the template refuses the placeholders, or writes something else than them with a fixed text around.
        """
        placeholders: list[str] = []
        messages: list[Message] = []
        for index, role in enumerate(roles):
            # The turn's index between two private-use characters.
            placeholder = f"{PLACEHOLDER_BEGIN}{index}{PLACEHOLDER_END}"
            before, after = whitespace.get(index, ("", ""))
            placeholders.append(placeholder)
            messages.append({"role": role, "content": before + placeholder + after})
        try:
            text = self._render(messages)
            closed_text = self._spans_by_marking(RenderedConversation(messages, supervised_indices, text, location=""))
            return cut_skeleton(placeholders, text, closed_text, self._added_tokens)
        except Exception:  # noqa: BLE001 - a template that dislikes placeholders is asked about each conversation
            return None

    def _spans_by_marking(self, conversation: RenderedConversation) -> ClosedText:
        """Find the supervised spans the slow way: render the conversation again, with marks around supervised contents.

        Marks are private-use characters: where they come out in the rendered text, the contents begin and end. The spans are then
        widened by the tokens that close the turns.

        Returns the text, closed by an end-of-turn token, and its spans. Raises what `find_spans` raises.
        """
        try:
            spans = self._content_spans(conversation)
        except DataError:
            # The template may write the time, so that the text differs from a rendering of now.
            text_now = self._render(conversation.messages)
            if text_now == conversation.text:
                raise
            conversation = replace(conversation, text=text_now)
            spans = self._content_spans(conversation)
        return self.close_turns(conversation.text, spans, conversation.supervised_roles)

    def _content_spans(self, conversation: RenderedConversation) -> Spans:
        """Find the spans of supervised contents in a conversation's text, one for each of its `supervised_indices`.

        Marks are characters around a content that show where it comes out. A template may trim contents, or take thoughts out of
        them. So marks are put there in three ways, and the first that leaves the rest of the text unchanged is taken.

        A turn whose thought (`<think>`) was marked begins where generation would begin. Raises DataError if all three ways change
        the text, RefusedDocument if the thought of the last turn is lost.
        """
        for mark_content in (mark_whole, mark_trimmed, mark_thought):
            markers = dict.fromkeys(conversation.supervised_indices, mark_content)
            turns = render_marked(self._render, conversation.messages, conversation.text, markers)
            if turns is None:  # with these marks the template writes something else
                continue
            if mark_content is mark_trimmed:
                # Marks inside the outer whitespace leave out what of it the template keeps.
                turns = self._with_kept_whitespace(conversation, turns)
            spans = []
            for number, turn in enumerate(turns):
                if turn.thought_begin is None:
                    begin = turn.content_begin
                    self._check_thought_not_lost(conversation, number, turn)
                else:
                    begin = self._thought_turn_begin(conversation, number, turn.thought_begin)
                spans.append((begin, turn.content_end))
            return spans
        role = conversation.supervised_roles[-1]
        article = "an" if role == "assistant" else "a"
        raise DataError(
            f"{conversation.location}: the chat template changes the text of {article} {role} turn (more than "
            "trimming it), so that what is to be learned cannot be told; give a template with {% generation %} blocks in "
            "model.chat_template"
        )

    def _with_kept_whitespace(self, conversation: RenderedConversation, turns: list[_MarkedTurn]) -> list[_MarkedTurn]:
        """Widen the positions of turns by the outer whitespace of their contents that the template keeps: it is learned too.

        `turns`: the positions of the supervised turns, found with marks inside that whitespace. A template may trim some turns
        only, or line ends only.
        """
        widened_turns = []
        for number, (index, turn) in enumerate(zip(conversation.supervised_indices, turns, strict=True)):
            content = conversation.messages[index]["content"]
            if content != content.strip():
                # By (begin, end): the turn, if marks around content[begin:end] leave the text as it is. Each is a rendering.
                find_turn = cache(partial(self._find_turn_with_marks, conversation, number))
                turn = _widest_turn(content, find_turn) or turn
            widened_turns.append(turn)
        return widened_turns

    def _find_turn_with_marks(
        self, conversation: RenderedConversation, number: int, begin: int, end: int
    ) -> _MarkedTurn | None:
        """Find a supervised turn with marks around content[begin:end]; None if these marks change the text.

        Used to try how much of the content's outer whitespace the template keeps. `number`: which supervised turn, from 0.
        """
        # The other turns get marks that are known to leave the text as it is.
        markers: dict[int, Marker] = dict.fromkeys(conversation.supervised_indices, mark_trimmed)
        markers[conversation.supervised_indices[number]] = partial(mark_between, begin=begin, end=end)
        turns = render_marked(self._render, conversation.messages, conversation.text, markers)
        return None if turns is None else turns[number]

    @staticmethod
    def _check_thought_not_lost(conversation: RenderedConversation, number: int, turn: _MarkedTurn) -> None:
        """Raise RefusedDocument if the last supervised turn has a `<think>` part that the template threw away.

        Templates drop the thoughts of earlier turns on purpose, but a model that is to learn thoughts needs the last one.

        `turn`: where supervised turn `number` (from 0) stands in the text.
        """
        has_thought = "</think>" in conversation.messages[conversation.supervised_indices[number]]["content"]
        is_last = number == len(conversation.supervised_indices) - 1
        if has_thought and is_last and "</think>" not in conversation.text[turn.content_begin : turn.content_end]:
            raise RefusedDocument(
                conversation.location,
                "thought_lost",
                "the chat template throws away the <think> part of the last assistant turn; remove it from the data "
                "or give another template in model.chat_template",
            )

    def _thought_turn_begin(self, conversation: RenderedConversation, number: int, thought_begin: int) -> int:
        """Find where generation of a turn with a `<think>` part would begin: right behind the prompt for it.

        The model must learn from there on. Where the thought itself begins (`thought_begin`) is too late, because the template
        may write the opening tag.

        `number`: which supervised turn, from 0. Raises RefusedDocument if the text does not begin with the prompt.
        """
        # The turns before this one, with the header of an assistant turn, such as "<|im_start|>assistant".
        earlier_turns = conversation.messages[: conversation.supervised_indices[number]]
        prompt = self._render(earlier_turns, prompt=True)
        if not conversation.text.startswith(prompt) or len(prompt) > thought_begin:
            message = f"cannot tell where assistant turn {number + 1} begins, with its <think> part"
            raise RefusedDocument(conversation.location, "thought_lost", message)
        return len(prompt)

    def close_turns(
        self, text: str, spans: Spans, roles: list[str], already_closed: tuple[str, ...] = ()
    ) -> ClosedText:
        """Widen supervised spans by the end-of-turn tokens that follow them, so that the model learns to stop.

        `spans`: [begin, end) in characters of `text`. `roles`: of the turns that the spans belong to. `already_closed`: tokens
        that a span may end with already. For each span:
        - it ends with one of `already_closed`: it stays as it is;
        - an end-of-turn token follows (after the last turn: any added token of the tokenizer): the span is widened by that;
        - nothing closes the last turn: the rest of the text joins the span, with EOS in place of whitespace at its end.

        Returns the text, which has changed in the last case alone, and the widened spans.
        """
        closed_spans = []
        for number, ((begin, end), role) in enumerate(zip(spans, roles, strict=True)):
            is_final = number == len(spans) - 1
            is_closed = bool(already_closed) and text[begin:end].rstrip().endswith(already_closed)
            if not is_closed:
                end_pattern = self._any_added_token_pattern if is_final else self._end_patterns[role]
                end_token = end_pattern.match(text, end)
                if end_token:
                    end = end_token.end()
                elif is_final:
                    text = text[:end] + text[end:].rstrip() + self._eos
                    end = len(text)
            closed_spans.append((begin, end))
        return ClosedText(text, closed_spans)


def _widest_turn(content: str, find_turn: Callable[[int, int], _MarkedTurn | None]) -> _MarkedTurn | None:
    """Find a turn's position with as much outer whitespace of its content as the template keeps; None if it keeps none.

    `find_turn(begin, end)` renders with marks around content[begin:end], and gives the turn; None if these marks change the
    text.

    A template trims whitespace from the outside up to some character. A mark within the trimmed part changes the text, since it
    keeps that part from being trimmed; all marks further inside leave it as it is. So the outermost marks that work are found
    by bisection.
    """
    length = len(content)
    whole_turn = find_turn(0, length)
    if whole_turn is not None:
        return whole_turn
    trimmed_begin = length - len(content.lstrip())
    trimmed_end = trimmed_begin + len(content.strip())
    # Each search ends at the first candidate that works; if none works, behind the last one, which cuts all whitespace.
    begin = bisect_left(range(trimmed_begin), True, key=lambda position: find_turn(position, trimmed_end) is not None)
    # The same from the right: how many characters of the whitespace at the end must be outside of the marks.
    num_cut = bisect_left(
        range(length - trimmed_end), True, key=lambda num_cut: find_turn(begin, length - num_cut) is not None
    )
    end = length - num_cut
    if (begin, end) == (trimmed_begin, trimmed_end):
        return None
    return find_turn(begin, end)


def render_marked(
    render: Render, messages: list[Message], text: str, markers: Mapping[int, Marker]
) -> list[_MarkedTurn] | None:
    """Render a conversation with marks in some of its contents, and find where they come out: a position for each turn.

    Marks are private-use characters, which no data has. `text`: the rendering without marks. `markers`: by the index of each
    turn that is marked, ascending, the function that puts marks into its content.

    Positions are in `text`. None if the template writes anything but the same text with marks, or unless every marked turn shows
    its marks once, in order (thought, begin, end).
    """
    marked_messages = list(messages)
    for index, put_marks in markers.items():
        marked_messages[index] = {**messages[index], "content": put_marks(messages[index]["content"])}
    marked_text = render(marked_messages)
    if _MARK_REGEX.sub("", marked_text) != text:
        return None
    turns: list[_MarkedTurn] = []
    thought_begin = None
    content_begin = None
    for num_marks_before, match in enumerate(_MARK_REGEX.finditer(marked_text)):
        mark = match.group()
        position = match.start() - num_marks_before  # in `text`, which lacks the marks of one character each
        if mark == THOUGHT_MARK and thought_begin is None and content_begin is None:
            thought_begin = position
        elif mark == CONTENT_BEGIN_MARK and content_begin is None:
            content_begin = position
        elif mark == CONTENT_END_MARK and content_begin is not None:
            turns.append(_MarkedTurn(thought_begin, content_begin, position))
            thought_begin = None
            content_begin = None
        else:  # out of order, or twice
            return None
    is_complete = content_begin is None and thought_begin is None and len(turns) == len(markers)
    return turns if is_complete else None


def content_begin_by_marking(render: Render, messages: list[Message], index: int) -> int | None:
    """Find where the content of message `index` begins in the rendered conversation; None if marks change the text.

    The conversation is rendered again with marks, private-use characters, around that content. Whitespace before the content
    counts as content if the template keeps it: so marks outside of it are tried first.
    """
    text = render(messages)
    for mark_content in (mark_whole, mark_trimmed):
        turns = render_marked(render, messages, text, {index: mark_content})
        if turns is not None:
            return turns[0].content_begin
    return None


def leading_token_pattern(tokens: list[str]) -> re.Pattern[str]:
    """Make a pattern that matches any whitespace and then one of the tokens (group 1), the longest that fits."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(r"\s*(" + "|".join(map(re.escape, longest_first)) + ")")


def mark_whole(content: str) -> str:
    """A message's content with marks around all of it."""
    return f"{CONTENT_BEGIN_MARK}{content}{CONTENT_END_MARK}"


def mark_between(content: str, begin: int, end: int) -> str:
    """A message's content with marks around content[begin:end]."""
    return f"{content[:begin]}{CONTENT_BEGIN_MARK}{content[begin:end]}{CONTENT_END_MARK}{content[end:]}"


def mark_trimmed(content: str) -> str:
    """A message's content with marks inside its outer whitespace, so that a template that trims still does."""
    begin = len(content) - len(content.lstrip())
    return mark_between(content, begin, begin + len(content.strip()))


def mark_thought(content: str) -> str:
    """Put marks into a message's content for templates that take a <think> part out and put it elsewhere, or nowhere.

    Where the marks come out in the rendered text, thought and answer stand. With ^ for `THOUGHT_MARK`, and [ and ] for the marks
    of the content: "<think>hm</think>yes" -> "<think>^hm</think>[yes]". A content without a thought gets the marks of
    `mark_trimmed`.
    """
    match = _THOUGHT_AND_ANSWER_REGEX.fullmatch(content)
    if match is None:
        return mark_trimmed(content)
    opening, thought, answer = match.groups()
    return f"{opening or ''}{THOUGHT_MARK}{thought}{mark_trimmed(answer)}"


def mark_thought_alone(content: str) -> str:
    """The marks of `mark_thought`, but none around a blank answer: templates may test for an empty content beside calls."""
    return mark_thought(content).removesuffix(CONTENT_BEGIN_MARK + CONTENT_END_MARK)
