"""What of a rendered conversation is learned: the character spans of the learned turns, found in its own output.

Stock chat templates do not say which text the assistant wrote. A conversation is therefore rendered twice: as it is,
and with marks around every learned content (`trainer/data/tokens/marking.py`); a template that rewrites what it is given ends in
a DataError, never in a wrong mask. Templates with `{% generation %}` blocks are taken at their word. Conversations with tools,
calls or thoughts are marked turn by turn (`trainer/data/tokens/tool_call_masks.py`).
"""

from __future__ import annotations

import re
import resource
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError, DataError
from trainer.data.config import LearnConfig, LearnTurns, Reasoning
from trainer.data.document import THINK, Message, RefusedDocument, texts_in, thought_of
from trainer.data.tokens.clock import with_date
from trainer.data.tokens.compat import render_conversations
from trainer.data.tokens.marking import (
    BEGIN,
    END,
    RESERVED,
    SpanFinder,
    Spans,
    leading_token_pattern,
    mark_trimmed,
    mark_whole,
    render_marked,
)
from trainer.data.tokens.tool_call_masks import Chat, TurnSpanFinder, template_refusal, thought_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_RESERVED = re.compile(f"[{RESERVED}]")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
ROLES = ("system", "user", "assistant")
MAX_CPU_SECONDS = 30
"""Processor seconds for one call of a template: thousands of times what a batch of conversations takes."""
MAX_EXTRA_BYTES = 4 * 2**30
"""Memory that one call may add to its process."""
Tools = list[dict[str, Any]] | None
RenderJob = tuple[list[Message], list[int], str, Chat | None]


@dataclass(slots=True)
class RenderedText:
    """A conversation as text, and the [begin, end) character spans of it that are learned, ascending.

    `apart`: control tokens that its texts spell are broken, see `trainer/data/tokens/characters.py`. `weights`: what each span
    counts for in the loss; None where all count as 1.
    """

    text: str
    spans: list[tuple[int, int]]
    escaped: bool = False
    weights: list[float] | None = None


class ChatTemplate:
    """Renders conversations with the tokenizer's chat template. Raises ConfigError if it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, learn: LearnConfig | None = None) -> None:
        if not tokenizer.chat_template:
            raise ConfigError(
                "the tokenizer has no chat template, and the data has conversations; "
                "set model.chat_template=<file> or use prompt/completion rows"
            )
        if not tokenizer.eos_token:
            raise ConfigError("the tokenizer has no eos_token; set one in its tokenizer_config.json")
        self.learn = learn or LearnConfig()
        unknown = [role for role in self.learn.roles if role not in ROLES]
        if unknown or not self.learn.roles:
            raise ConfigError(f"data.learn.roles={list(self.learn.roles)} must name one or more of {', '.join(ROLES)}")
        self.tokenizer = tokenizer
        self.source: str = tokenizer.get_chat_template()
        self.marks_generation = _GENERATION.search(self.source) is not None
        self._added_tokens = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self.end_tokens, users = self._probe_end_tokens()
        """Tokens that close assistant turns."""
        self.all_end_tokens = self.end_tokens | users
        """Tokens that close a turn of any role."""
        self._end_tokens_by_role = {
            role: self.end_tokens if role == "assistant" else self.all_end_tokens for role in ROLES
        }
        patterns = {role: leading_token_pattern([*ends]) for role, ends in self._end_tokens_by_role.items()}
        self._span_finder = SpanFinder(self._apply, self._added_tokens, patterns, str(tokenizer.eos_token))

    def fix_date(self, day: date) -> None:
        """From now on write `day` for today."""
        self.source = with_date(self.source, day)

    @cached_property
    def _turn_span_finder(self) -> TurnSpanFinder:
        return TurnSpanFinder(self._apply, self.learn.reasoning, self._added_tokens, self._end_tokens_by_role)

    def learned_turns(self, messages: Sequence[Message]) -> list[int]:
        """Which messages are learned, ascending."""
        learned = []
        for number, message in enumerate(messages):
            is_learned = message.get("train")
            if is_learned or (is_learned is None and message["role"] in self.learn.roles):
                learned.append(number)
        return learned[-1:] if self.learn.turns is LearnTurns.last else learned

    def render_all(
        self, conversations: Sequence[tuple[Sequence[Message], str, Tools]], *, fast: bool = True
    ) -> list[RenderedText]:
        """Texts and spans of conversations, each with its `file:line` and tools. Turns after the last learned one are left out.

        Learned are the content of a learned turn and the end-of-turn token after it, whitespace between them included.
        A template that closes the last turn with nothing gets the eos token appended. Where nothing is learned there
        are no spans. `fast=False` renders every conversation twice. Raises RefusedDocument for one that cannot be used.
        """
        jobs = [self._make_job(messages, where, tools) for messages, where, tools in conversations]
        turns = [job for job in jobs if job[3] is None]
        in_blocks = [job for job in turns if self._uses_blocks(*job[:2])]
        plain = iter(self._apply_all([job for job in turns if not self._uses_blocks(*job[:2])]))
        with_blocks = iter(self._apply_all(in_blocks, return_assistant_tokens_mask=True))
        rendered = []
        for messages, learned, where, chat in jobs:
            if chat is not None:
                rendered.append(self._guard(self._render_with_tools, chat, learned, where=where))
            elif self._uses_blocks(messages, learned):
                rendered.append(
                    self._guard(self._spans_of_blocks, messages, learned, where, next(with_blocks), where=where)
                )
            elif not learned:
                rendered.append(RenderedText(next(plain)[0], []))
            else:
                find = partial(self._span_finder.find_spans, fast=fast)
                text, _ = next(plain)
                rendered.append(RenderedText(*self._guard(find, messages, learned, text, where, where=where)))
        return rendered

    def render_text(self, messages: Sequence[Message], where: str, tools: Tools = None) -> str:
        """A conversation as the template writes it, its last turn not closed. Raises RefusedDocument."""
        job = messages, _, _, chat = self._make_job(messages, where, tools)
        return self._apply_all([job])[0][0] if chat is None else self._guard(chat.apply, chat.messages, where=where)

    def first_content_begin(self, messages: Sequence[Message], where: str, tools: Tools = None) -> int | None:
        """Where the content of the first message that is no system turn begins in the text; None if not to be told."""
        messages, _, _, chat = self._make_job(messages, where, tools)
        index = next((i for i, message in enumerate(messages) if message["role"] != "system"), None)
        if index is None:
            return None

        def find() -> int | None:
            apply = self._apply if chat is None else chat.apply
            text = apply(messages)
            for mark in (mark_whole, mark_trimmed):
                if (turns := render_marked(apply, messages, [index], text, [mark] * len(messages))) is not None:
                    return turns[0].begin
            return None

        return self._guard(find, where=where)

    def _make_job(self, messages: Sequence[Message], where: str, tools: Tools) -> RenderJob:
        """The messages as the template gets them, up to the last learned one; with a `Chat` where they are no plain turns."""
        learned = self.learned_turns(messages)
        if learned:
            messages = messages[: learned[-1] + 1]
        for message in messages:
            for text in texts_in(message):
                if not text.isascii() and _RESERVED.search(text):
                    message_text = "the text has one of the private-use characters U+10FB01 to U+10FB05; remove it"
                    raise RefusedDocument(where, "reserved_character", message_text)
        bare = [_without_training_fields(message) if "train" in message else message for message in messages]
        thinks = self.learn.reasoning is not Reasoning.learn
        if thinks and self.learn.reasoning is Reasoning.drop:
            bare = [_without_thought(message, where) for message in bare]
        context = thinks and any("</think>" in message["content"] for message in bare)
        if not (tools or context or any(len(message) > 2 or message["role"] == "tool" for message in bare)):
            return bare, learned, where, None
        chat = self._guard(self._turn_span_finder.prepare_chat, bare, tools, where, where=where)
        return chat.messages, learned, where, chat

    def _apply_all(self, jobs: list[RenderJob], **options: Any) -> list[tuple[str, Spans]]:
        """`_rendered` of a batch; where the template refuses one of them, they are rendered one by one to tell which."""
        try:
            return self._render_batch([messages for messages, _, _, _ in jobs], **options) if jobs else []
        except TemplateLimitExceeded as error:
            raise self._limit_error(error, jobs[0][2], len(jobs)) from error
        except Exception:  # noqa: BLE001 - whatever a template raises comes again below, with its place
            return [
                self._guard(lambda job: self._render_batch([job[0]], **options)[0], job, where=job[2]) for job in jobs
            ]

    def _guard(self, work: Callable[..., Any], *args: Any, where: str) -> Any:
        """What a template raises refuses the document at `where`; a template that is none is a ConfigError."""
        from jinja2 import TemplateSyntaxError

        try:
            return work(*args)
        except DataError:
            raise
        except TemplateLimitExceeded as error:
            raise self._limit_error(error, where, 1) from error
        except TemplateSyntaxError as error:
            raise ConfigError(f"the chat template is no Jinja template: {error}; mend model.chat_template") from error
        except Exception as error:
            why = f"the chat template refuses the conversation: {error}; change the row, or give another in"
            raise template_refusal(where, f"{why} model.chat_template") from error

    def _render_with_tools(self, chat: Chat, learned: list[int]) -> RenderedText:
        """Text and spans of a conversation with tools, calls or thoughts."""
        text = self._turn_span_finder.render_checked(chat)
        if not learned:
            return RenderedText(text, [])
        if not self._uses_blocks(chat.messages, learned):
            return RenderedText(*self._turn_span_finder.find_spans(chat, learned, text, str(self.tokenizer.eos_token)))
        self._turn_span_finder.check_thought(chat, learned[-1], text)
        (text_and_blocks,) = self._render_batch([chat.messages], tools=chat.tools, return_assistant_tokens_mask=True)
        rendered = self._spans_of_blocks(chat.messages, learned, chat.where, text_and_blocks)
        if self.learn.reasoning is Reasoning.context:
            spans = zip(rendered.find_spans, learned, strict=True)
            rendered.find_spans = [(thought_end(chat, i, rendered.text, *span), span[1]) for span, i in spans]
        return rendered

    @staticmethod
    def _limit_error(error: TemplateLimitExceeded, where: str, conversations: int) -> ConfigError:
        count = "a conversation" if conversations == 1 else f"{conversations} conversations"
        return ConfigError(
            f"the chat template {error} for {count} ({where}{' on' if conversations > 1 else ''}): it loops, or multiplies; "
            "give another in model.chat_template"
        )

    def _render_batch(self, conversations: list[list[Message]], **options: Any) -> list[tuple[str, Spans]]:
        """Texts of conversations; each with its spans of generation blocks where a mask is asked for, else with none."""
        special = self.tokenizer.special_tokens_map
        with resource_limits():
            texts, blocks = render_conversations(conversations, self.source, **options, **special)
        return list(zip(texts, blocks, strict=True))

    def _apply(self, messages: list[Message], *, prompt: bool = False, tools: Tools = None) -> str:
        return self._render_batch([messages], add_generation_prompt=prompt, tools=tools)[0][0]

    def _uses_blocks(self, messages: list[Message], learned: list[int]) -> bool:
        """Whether the template's generation blocks tell the learned turns: they are about assistant turns alone."""
        return self.marks_generation and bool(learned) and all(messages[i]["role"] == "assistant" for i in learned)

    def _spans_of_blocks(
        self, messages: list[Message], learned: list[int], where: str, text_and_blocks: tuple[str, Spans]
    ) -> RenderedText:
        """Text and spans by the generation blocks that `text_and_blocks` has."""
        spans = [(int(begin), int(end)) for begin, end in text_and_blocks[1]]
        if not spans or any(begin >= end for begin, end in spans):
            message = "the {% generation %} blocks of the chat template are empty here"
            raise template_refusal(where, message)
        assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if assistants != learned:
            if len(spans) != len(assistants):
                raise template_refusal(
                    where,
                    f"only some assistant turns are to be learned, but the chat template has {len(spans)} "
                    f"{{% generation %}} blocks for {len(assistants)} turns; learn all turns or give another template "
                    "in model.chat_template",
                )
            spans = [spans[assistants.index(i)] for i in learned]
        return RenderedText(
            *self._span_finder.close_turns(
                text_and_blocks[0], spans, ["assistant"] * len(spans), tuple(self.end_tokens)
            )
        )

    def _probe_end_tokens(self) -> tuple[set[str], set[str]]:
        """Tokens with which the template closes assistant turns, in the middle and at the end; and user turns."""
        end_tokens = {str(self.tokenizer.eos_token)}
        roles = ("user", "assistant", "user", "assistant")
        turn = [{"role": "user", "content": BEGIN}]
        try:
            text = self._apply([{"role": role, "content": f"{BEGIN}{role}{END}"} for role in roles])
        except TemplateLimitExceeded as error:
            raise self._limit_error(error, "the first look at it", 1) from error
        except Exception:  # noqa: BLE001 - a template that dislikes the probe is left to the conversations themselves
            return end_tokens, set()
        any_token = leading_token_pattern(self._added_tokens)
        parts = re.split(f"{BEGIN}[^{END}]*{END}", text)
        if len(parts) != 5:
            return end_tokens, set()
        header, after_user, middle, _, tail = parts
        shared = 0  # what precedes the first user content, as far as it precedes the second too, opens a user turn
        while shared < min(len(header), len(middle)) and header[-shared - 1] == middle[-shared - 1]:
            shared += 1
        matches = [any_token.match(part) for part in (middle[: len(middle) - shared], tail)]
        end_tokens |= {match.group(1) for match in matches if match}
        try:
            bare, prompt = self._apply(turn), self._apply(turn, prompt=True)
        except TemplateLimitExceeded as error:
            raise self._limit_error(error, "the first look at it", 1) from error
        except Exception:  # noqa: BLE001 - as above
            return end_tokens, set()
        opening = prompt[len(bare) :] if prompt.startswith(bare) else ""
        user = any_token.match(after_user.removesuffix(opening))
        return end_tokens, {user.group(1)} if user else set()


def _without_thought(message: Message, where: str) -> Message:
    """An assistant turn without its thought. Raises RefusedDocument where nothing is left."""
    if message["role"] != "assistant" or thought_of(message) is None:
        return message
    content = THINK.sub("", message["content"], count=1) if THINK.match(message["content"]) else message["content"]
    if not content.strip() and "tool_calls" not in message:
        raise template_refusal(
            where, "an assistant turn is a thought alone, and data.learn.reasoning=drop leaves nothing"
        )
    return {
        **{key: field_value for key, field_value in message.items() if key != "reasoning_content"},
        "content": content,
    }


def _without_training_fields(message: Message) -> Message:
    return {key: field_value for key, field_value in message.items() if key not in ("train", "weight")}


class TemplateLimitExceeded(BaseException):
    """A call of a template, which is a program that came with somebody's model, went past a bound; says which.

    No Exception: a template that refuses one rendering is tried with another, and one that went past a bound must not be.
    """


@contextmanager
def resource_limits() -> Iterator[None]:
    """Raise TooMuch where the body takes more. The time is bounded in a process's main thread only, memory anywhere."""
    watched = threading.current_thread() is threading.main_thread()
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_bytes().split()[0]) * resource.getpagesize()
    least = min(limit for limit in (before, size + MAX_EXTRA_BYTES) if limit != resource.RLIM_INFINITY)
    if watched:
        handler = signal.signal(signal.SIGVTALRM, _on_time_limit)
        signal.setitimer(signal.ITIMER_VIRTUAL, MAX_CPU_SECONDS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (least, hard))
        yield
    except MemoryError as error:
        raise TemplateLimitExceeded(f"wanted more than {MAX_EXTRA_BYTES / 2**30:.3g} GiB of memory") from error
    finally:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (before, hard))
        if watched:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, handler)


def _on_time_limit(*_: Any) -> None:
    raise TemplateLimitExceeded(f"took more than {MAX_CPU_SECONDS:g} seconds")
