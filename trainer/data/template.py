"""What of a rendered conversation is learned: the character spans of assistant turns, found in its own output.

Stock chat templates do not say which text the assistant wrote. The conversation is therefore rendered twice: as it is,
and with marks around every assistant content. The spans count only if the second text without its marks is the first
one, character by character; a template that rewrites what it is given ends in a DataError, never in a wrong mask.
Templates with `{% generation %}` blocks are taken at their word.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Private-use characters of the last plane: no font uses them and no template looks for them.
BEGIN, END, THOUGHT = "\U0010fb01", "\U0010fb02", "\U0010fb03"
_MARKS = re.compile(f"([{BEGIN}{END}{THOUGHT}])")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THOUGHT = re.compile(r"(\s*<think>\s*)?(.*</think>\s*)(.*)", re.DOTALL)

Messages = list[dict[str, str]]


@dataclass(slots=True)
class Rendered:
    """A conversation as text, and the [begin, end) character spans of it that are learned, ascending."""

    text: str
    spans: list[tuple[int, int]]


@dataclass(slots=True)
class _Turn:
    """Positions in the text without marks: of a thought, if the template kept it, and of the content."""

    thought: int | None
    begin: int
    end: int


class ChatTemplate:
    """Renders conversations with the tokenizer's chat template. Raises ConfigError if it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if not tokenizer.chat_template:
            raise ConfigError(
                "the tokenizer has no chat template, and the data has conversations; "
                "set model.chat_template=<file> or use prompt/completion rows"
            )
        if not tokenizer.eos_token:
            raise ConfigError("the tokenizer has no eos_token; set one in its tokenizer_config.json")
        self.tokenizer = tokenizer
        self.source: str = tokenizer.get_chat_template()
        self.marks_generation = _GENERATION.search(self.source) is not None
        added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._any_token = re.compile(r"\s*(" + "|".join(map(re.escape, added)) + ")")
        self.end_tokens = {str(tokenizer.eos_token)} | self._learn_end_tokens()
        known = sorted(self.end_tokens, key=len, reverse=True)
        self._end_token = re.compile(r"\s*(" + "|".join(map(re.escape, known)) + ")")

    def render(self, messages: Messages, where: str) -> Rendered:
        """Text and spans of one conversation. Turns after the last assistant turn teach nothing and are left out.

        Supervised are each assistant content and the end-of-turn token after it, whitespace between them included. A
        template that closes the last turn with nothing gets the eos token appended. Raises DataError, led by `where`.
        """
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        messages = messages[: last + 1]
        if any(_MARKS.search(message["content"]) for message in messages):
            raise DataError(f"{where}: the text has one of the private-use characters U+10FB01 to U+10FB03; remove it")
        try:
            if self.marks_generation:
                text, spans = self._render_generation(messages)
                if not spans or any(begin >= end for begin, end in spans):
                    raise DataError(f"{where}: the {{% generation %}} blocks of the chat template are empty here")
            else:
                text = self._apply(messages)
                spans = self._contents(messages, text, where)
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{where}: the chat template refuses the conversation: {error}") from error
        return self._close(text, spans)

    def _apply(self, messages: Messages, *, prompt: bool = False) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))

    def _render_generation(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, spans = render_jinja_template(
            conversations=[messages],
            chat_template=self.source,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return texts[0], [(int(begin), int(end)) for begin, end in spans[0]]

    def _contents(self, messages: Messages, text: str, where: str) -> list[tuple[int, int]]:
        """Spans of the assistant contents in `text`, by the first way of marking that leaves the text unchanged."""
        for mark in (_mark_whole, _mark_trimmed, _mark_thought):
            turns = self._marked(messages, text, [mark] * len(messages))
            if turns is None:
                continue
            if mark is _mark_trimmed:
                self._widen(messages, text, turns)
            return [(self._begin(messages, text, number, turn, where), turn.end) for number, turn in enumerate(turns)]
        raise DataError(
            f"{where}: the chat template changes the text of an assistant turn (more than trimming it), so that what "
            "is to be learned cannot be told; give a template with {% generation %} blocks in model.chat_template"
        )

    def _marked(self, messages: Messages, text: str, marks: list[Callable[[str], str]]) -> list[_Turn] | None:
        """Render with marks; None unless every assistant turn shows them once, in order, and the text is the same."""
        wrapped = [
            {**message, "content": mark(message["content"])} if message["role"] == "assistant" else message
            for message, mark in zip(messages, marks, strict=True)
        ]
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
        wanted = sum(message["role"] == "assistant" for message in messages)
        return turns if begin is None and thought is None and len(turns) == wanted else None

    def _widen(self, messages: Messages, text: str, turns: list[_Turn]) -> None:
        """A template may trim some turns only: where it keeps the outer whitespace of one, that is learned too."""
        assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for number, index in enumerate(assistants):
            content = messages[index]["content"]
            if content != content.strip():
                marks: list[Callable[[str], str]] = [_mark_trimmed] * len(messages)
                marks[index] = _mark_whole
                wider = self._marked(messages, text, marks)
                if wider is not None:
                    turns[number] = wider[number]

    def _begin(self, messages: Messages, text: str, number: int, turn: _Turn, where: str) -> int:
        """Where learning begins: at the content; with a thought, where generation would have begun."""
        assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        has_thought = "</think>" in messages[assistants[number]]["content"]
        if turn.thought is None:
            if has_thought and number == len(assistants) - 1 and "</think>" not in text[turn.begin : turn.end]:
                raise DataError(
                    f"{where}: the chat template throws away the <think> part of the last assistant turn; "
                    "remove it from the data or give another template in model.chat_template"
                )
            return turn.begin
        prompt = self._apply(messages[: assistants[number]], prompt=True)
        if not text.startswith(prompt) or len(prompt) > turn.thought:
            raise DataError(f"{where}: cannot tell where assistant turn {number + 1} begins, with its <think> part")
        return len(prompt)

    def _close(self, text: str, spans: list[tuple[int, int]]) -> Rendered:
        """Add the end-of-turn token to every span."""
        closed = []
        for number, (begin, end) in enumerate(spans):
            final = number == len(spans) - 1
            inside = text[begin:end].rstrip()
            if self.marks_generation and any(inside.endswith(token) for token in self.end_tokens):
                closed.append((begin, end))
                continue
            match = (self._any_token if final else self._end_token).match(text, end)
            if match:
                end = match.end()
            elif final:  # nothing but words or whitespace follows: what words the template adds are learned, then eos
                text = text[:end] + text[end:].rstrip() + str(self.tokenizer.eos_token)
                end = len(text)
            closed.append((begin, end))
        return Rendered(text, closed)

    def _learn_end_tokens(self) -> set[str]:
        """Tokens with which the template closes assistant turns, in the middle and at the end of a conversation."""
        probe = [
            {"role": role, "content": f"{BEGIN}{role}{END}"} for role in ("user", "assistant", "user", "assistant")
        ]
        try:
            parts = re.split(f"{BEGIN}[^{END}]*{END}", self._apply(probe))
        except Exception:  # noqa: BLE001 - a template that dislikes the probe is left to the conversations themselves
            return set()
        if len(parts) != 5:
            return set()
        header, middle, tail = parts[0], parts[2], parts[4]
        shared = 0  # what precedes the first user content, as far as it precedes the second too, opens a user turn
        while shared < min(len(header), len(middle)) and header[-shared - 1] == middle[-shared - 1]:
            shared += 1
        found = [self._any_token.match(part) for part in (middle[: len(middle) - shared], tail)]
        return {match.group(1) for match in found if match}


def _mark_whole(content: str) -> str:
    return f"{BEGIN}{content}{END}"


def _mark_trimmed(content: str) -> str:
    """Marks inside the outer whitespace, so that the template still trims it, if it trims."""
    core = content.strip()
    at = content.index(core)
    return f"{content[:at]}{BEGIN}{core}{END}{content[at + len(core) :]}"


def _mark_thought(content: str) -> str:
    """Marks for templates that take a <think> part out of the content and put it elsewhere, or nowhere."""
    match = _THOUGHT.fullmatch(content)
    if match is None or not match.group(3).strip():
        return _mark_trimmed(content)
    return f"{match.group(1) or ''}{THOUGHT}{match.group(2)}{_mark_trimmed(match.group(3))}"


def describe(template: ChatTemplate) -> dict[str, Any]:
    """What the report says about the template."""
    return {"generation_blocks": template.marks_generation, "end_tokens": sorted(template.end_tokens)}
