"""Renders conversations with a chat template, and finds the character spans of the turns that are learned.

Stock chat templates do not say which text the assistant wrote. A conversation is therefore rendered twice: as it is, and with
marks around every learned content (`trainer/data/tokens/marking.py`). A template that rewrites what it is given ends in a
DataError, never in a wrong mask. Templates with `{% generation %}` blocks are taken at their word. Conversations with tools,
calls or thoughts are marked turn by turn (`trainer/data/tokens/tool_call_masks.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from strategies.errors import ConfigError, DataError
from trainer.data.config import LearnConfig, LearnTurns, Reasoning
from trainer.data.document import THINK_BLOCK_REGEX, Message, RefusedDocument, message_texts, thought_of
from trainer.data.tokens.clock import replace_clock_calls
from trainer.data.tokens.compat import render_conversations
from trainer.data.tokens.end_tokens import find_end_tokens
from trainer.data.tokens.marking import (
    RESERVED_CHARACTERS,
    RenderedConversation,
    SpanFinder,
    content_begin_by_marking,
    leading_token_pattern,
)
from trainer.data.tokens.skeleton import Spans
from trainer.data.tokens.template_limits import TemplateLimitExceeded, template_resource_limits
from trainer.data.tokens.tool_call_masks import TemplateConversation, TurnSpanFinder, template_refusal, thought_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_RESERVED_CHARACTER_REGEX = re.compile(f"[{RESERVED_CHARACTERS}]")
_GENERATION_BLOCK_REGEX = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
ROLES = ("system", "user", "assistant")
Tools = list[dict[str, Any]] | None


@dataclass(frozen=True, slots=True)
class PreparedConversation:
    """A conversation ready to be rendered."""

    messages: list[Message]
    """As the template gets them, up to the last learned one."""
    supervised_indices: list[int]
    """Which of them are learned."""
    location: str
    """`file:line` of the row."""
    tool_conversation: TemplateConversation | None
    """Set for conversations with tools, calls or thoughts, which are marked turn by turn."""


class TextAndBlocks(NamedTuple):
    """A conversation as the template wrote it."""

    text: str
    blocks: Spans
    """Characters of the template's `{% generation %}` blocks; empty if they were not asked for."""


@dataclass(slots=True)
class RenderedText:
    """A conversation or a plain text, and which of its characters are learned."""

    text: str
    spans: list[tuple[int, int]]
    """[begin, end) of what is learned, in characters, ascending."""
    escaped: bool = False
    """Whether marks stand within control tokens that it merely spells, so that they become ordinary characters; see
    `trainer/data/tokens/characters.py`."""
    loss_weights: list[float] | None = None
    """What each span counts for in the loss; None if all count as 1."""


class ChatTemplate:
    """Renders conversations with the tokenizer's chat template, and finds which characters of the result are supervised."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, learn: LearnConfig | None = None) -> None:
        """Find out how the template closes turns. `learn`: which turns are supervised (`data.learn`).

        Raises ConfigError if the tokenizer has no chat template or no EOS, or if `learn` names unknown roles.
        """
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
        self.has_generation_blocks = _GENERATION_BLOCK_REGEX.search(self.source) is not None
        self._added_tokens = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        # By rendering small conversations: templates do not say how they close turns.
        found_tokens = find_end_tokens(self._render_or_none, self._added_tokens)
        self.end_tokens = found_tokens.of_assistant | {str(tokenizer.eos_token)}
        """Tokens that close assistant turns; EOS always does."""
        self.all_end_tokens = self.end_tokens | found_tokens.of_user
        """Tokens that close a turn of any role."""
        # A template may close turns of other roles in either way.
        self._end_tokens_by_role = dict.fromkeys(ROLES, self.all_end_tokens) | {"assistant": self.end_tokens}
        end_patterns = {}
        for role, end_tokens in self._end_tokens_by_role.items():
            end_patterns[role] = leading_token_pattern([*end_tokens])
        self._span_finder = SpanFinder(self._render, self._added_tokens, end_patterns, str(tokenizer.eos_token))

    def fix_date(self, day: date) -> None:
        """Make the template write `day` as today's date."""
        self.source = replace_clock_calls(self.source, day)

    @cached_property
    def _turn_span_finder(self) -> TurnSpanFinder:
        return TurnSpanFinder(self._render, self.learn.reasoning, self._added_tokens, self._end_tokens_by_role)

    def supervised_turn_indices(self, messages: Sequence[Message]) -> list[int]:
        """Decide which messages of a conversation are supervised: their indices, ascending.

        A message's own `train` goes before `data.learn.roles`. With `data.learn.turns=last`, only the last of them.
        """
        supervised_indices = []
        for index, message in enumerate(messages):
            is_marked = message.get("train")  # None if the message does not say
            if is_marked or (is_marked is None and message["role"] in self.learn.roles):
                supervised_indices.append(index)
        if self.learn.turns is LearnTurns.last:
            return supervised_indices[-1:]
        return supervised_indices

    def render_all(
        self, conversations: Sequence[tuple[Sequence[Message], str, Tools]], *, fast: bool = True
    ) -> list[RenderedText]:
        """Render conversations with the chat template, and find the supervised characters in each: a span for each such turn.

        A span is the content of a supervised turn and the end-of-turn token after it. Spans come from the template's `{%
        generation %}` blocks if it has some, else from a second rendering with marks, or from what is remembered of earlier
        ones.

        `conversations`: (messages, `file:line` of the row, tools) of each. Turns after the last supervised one are left out; if
        the template does not close the last turn, EOS is appended. `fast=False` renders every conversation twice.

        Raises RefusedDocument for a conversation that the template cannot render, or whose spans cannot be told.
        """
        prepared = [
            self._prepare_conversation(messages, location, tools) for messages, location, tools in conversations
        ]
        text_and_blocks_by_index = self._render_plain_conversations(prepared)
        rendered = []
        for index, conversation in enumerate(prepared):
            find_spans = partial(self._find_spans, conversation, text_and_blocks_by_index.get(index), try_skeleton=fast)
            rendered.append(self._call_template(find_spans, location=conversation.location))
        return rendered

    def _render_plain_conversations(self, conversations: list[PreparedConversation]) -> dict[int, TextAndBlocks]:
        """Render the plain conversations among these: by index, the text, and the spans of its `{% generation %}` blocks.

        A plain conversation has only a role and a content in each turn. They are rendered in two batches, since that is faster:
        those whose spans are found by marks, and those whose spans are the template's blocks.
        """
        rendered_by_index: dict[int, TextAndBlocks] = {}
        for uses_blocks in (False, True):
            indices = []
            for index, conversation in enumerate(conversations):
                is_plain = conversation.tool_conversation is None
                if is_plain and uses_blocks is self._uses_blocks(
                    conversation.messages, conversation.supervised_indices
                ):
                    indices.append(index)
            options = {"return_assistant_tokens_mask": True} if uses_blocks else {}
            rendered = self._render_batch_or_each([conversations[index] for index in indices], **options)
            rendered_by_index.update(zip(indices, rendered, strict=True))
        return rendered_by_index

    def _find_spans(
        self, conversation: PreparedConversation, text_and_blocks: TextAndBlocks | None, *, try_skeleton: bool
    ) -> RenderedText:
        """Find the supervised spans of a conversation, in the way that fits it and the template.

        `text_and_blocks`: a plain conversation as it was rendered; None for one with tools, calls or thoughts, which is rendered
        here. `try_skeleton`: use what is remembered of similar conversations. Raises DataError and RefusedDocument.
        """
        supervised_indices = conversation.supervised_indices
        if conversation.tool_conversation is not None:
            return self._render_with_tools(conversation.tool_conversation, supervised_indices)
        assert text_and_blocks is not None, "plain conversations are rendered before"
        if self._uses_blocks(conversation.messages, supervised_indices):
            return self._spans_from_blocks(
                conversation.messages, supervised_indices, conversation.location, text_and_blocks
            )
        if not supervised_indices:
            return RenderedText(text_and_blocks.text, [])
        rendered = RenderedConversation(
            conversation.messages, supervised_indices, text_and_blocks.text, conversation.location
        )
        closed = self._span_finder.find_spans(rendered, try_skeleton=try_skeleton)
        return RenderedText(closed.text, closed.spans)

    def render_text(self, messages: Sequence[Message], location: str, tools: Tools = None) -> str:
        """Write a conversation as the template does, up to its last supervised turn, to which no EOS is added.

        `tools`: what the conversation may call, as JSON schemas; None for none. Raises RefusedDocument if the template cannot
        write it.
        """
        conversation = self._prepare_conversation(messages, location, tools)
        if conversation.tool_conversation is not None:
            return self._call_template(
                conversation.tool_conversation.render, conversation.tool_conversation.messages, location=location
            )
        text, _ = self._render_batch_or_each([conversation])[0]
        return text

    def render_prompt(self, messages: Sequence[Message], location: str, tools: Tools = None) -> str:
        r"""Write a conversation up to where the assistant would answer: with the header of the turn to come.

        In ChatML the text ends with "<|im_start|>assistant\n". `tools`: what the conversation may call, as JSON schemas; None for
        none. Raises RefusedDocument if the template cannot write it.
        """
        conversation = self._prepare_conversation(messages, location, tools)
        if conversation.tool_conversation is not None:
            return self._call_template(
                partial(conversation.tool_conversation.render, prompt=True),
                conversation.tool_conversation.messages,
                location=location,
            )
        text, _ = self._render_batch_or_each([conversation], add_generation_prompt=True)[0]
        return text

    def first_content_begin(self, messages: Sequence[Message], location: str, tools: Tools = None) -> int | None:
        """Find where the content of the first non-system message begins in the rendered conversation, in characters.

        What is before it stays when a conversation that is too long loses its beginning. None if there is no such message, or
        if marks around it change the text, so that the position cannot be found.

        `location`: `file:line` of the row. `tools`: what the conversation may call. Raises RefusedDocument.
        """
        conversation = self._prepare_conversation(messages, location, tools)
        roles = [message["role"] for message in conversation.messages]
        first_index = next((index for index, role in enumerate(roles) if role != "system"), None)
        if first_index is None:
            return None
        tool_conversation = conversation.tool_conversation
        render = self._render if tool_conversation is None else tool_conversation.render
        return self._call_template(
            content_begin_by_marking, render, conversation.messages, first_index, location=location
        )

    def _prepare_conversation(self, messages: Sequence[Message], location: str, tools: Tools) -> PreparedConversation:
        """Make a conversation ready for the template: its turns up to the last supervised one, without our own fields.

        A plain conversation (no tools, and only a role and a content in each turn) stays as it is. Any other one is put into
        the form in which the template wants tool calls: `tool_conversation` of the result. Thoughts are taken out here if
        `data.learn.reasoning` is `drop`.

        Raises RefusedDocument if a text has one of the private-use characters by which spans are found.
        """
        supervised_indices = self.supervised_turn_indices(messages)
        if supervised_indices:
            # Nothing is learned behind it.
            messages = messages[: supervised_indices[-1] + 1]
        for message in messages:
            _check_no_reserved_characters(message, location)
        # `train` and `weight` are for us, and a template must not see them.
        turns = [_without_training_fields(message) if "train" in message else message for message in messages]
        if self.learn.reasoning is Reasoning.drop:
            turns = [_without_thought(message, location) for message in turns]
        if not tools and self._is_plain(turns):
            return PreparedConversation(turns, supervised_indices, location, tool_conversation=None)
        # With the first calls or results, finds out by trial how this template wants them.
        tool_conversation: TemplateConversation = self._call_template(
            self._turn_span_finder.convert_conversation, turns, tools, location, location=location
        )
        return PreparedConversation(tool_conversation.messages, supervised_indices, location, tool_conversation)

    def _is_plain(self, turns: list[Message]) -> bool:
        """Whether a conversation can be rendered in a batch: only a role and a content in each turn, and no thought to treat."""
        for turn in turns:
            has_further_fields = len(turn) > 2  # calls, or a thought of its own
            # A thought that is shown and not learned must be told from the answer.
            has_unlearned_thought = self.learn.reasoning is not Reasoning.learn and "</think>" in turn["content"]
            if has_further_fields or has_unlearned_thought or turn["role"] == "tool":
                return False
        return True

    def _render_batch_or_each(self, conversations: list[PreparedConversation], **options: Any) -> list[TextAndBlocks]:
        """Render plain conversations as one batch, which is fast: (text, spans of its `{% generation %}` blocks) of each.

        If the template refuses the batch, each is rendered alone, to tell which one it refuses. `options`: see `_render_batch`.
        Raises RefusedDocument for that one, ConfigError if the template takes too much time or memory.
        """
        if not conversations:
            return []
        try:
            return self._render_batch([conversation.messages for conversation in conversations], **options)
        except TemplateLimitExceeded as error:
            raise self._limit_error(error, conversations[0].location, len(conversations)) from error
        except Exception:  # noqa: BLE001 - whatever a template raises comes again below, with its row
            render_batch = partial(self._render_batch, **options)
            rendered = []
            for conversation in conversations:
                rendered += self._call_template(render_batch, [conversation.messages], location=conversation.location)
            return rendered

    def _call_template(self, render: Callable[..., Any], *args: Any, location: str) -> Any:
        """Call `render(*args)`, which runs the template, and turn what it raises into errors that say what to do.

        - A DataError passes.
        - The template took too much time or memory, or is no Jinja template: ConfigError about `model.chat_template`.
        - Anything else: RefusedDocument for the row at `location` (`file:line`).
        """
        from jinja2 import TemplateSyntaxError

        try:
            return render(*args)
        except DataError:  # it says what to do already
            raise
        except TemplateLimitExceeded as error:
            raise self._limit_error(error, location, num_conversations=1) from error
        except TemplateSyntaxError as error:
            raise ConfigError(f"the chat template is no Jinja template: {error}; mend model.chat_template") from error
        except Exception as error:
            raise template_refusal(
                location,
                f"the chat template refuses the conversation: {error}; change the row, or give another in "
                "model.chat_template",
            ) from error

    def _render_with_tools(self, conversation: TemplateConversation, supervised_indices: list[int]) -> RenderedText:
        """Render a conversation with tools, tool calls or thoughts, and find its supervised spans.

        The spans come from the template's `{% generation %}` blocks if it has some, else from a second rendering, with marks
        around each supervised turn. `supervised_indices`: the supervised turns. Raises RefusedDocument if the template leaves
        something of the conversation out.
        """
        finder = self._turn_span_finder
        text = finder.render_and_check_complete(conversation)
        if not supervised_indices:
            return RenderedText(text, [])
        if self._uses_blocks(conversation.messages, supervised_indices):
            finder.check_thought_not_lost(conversation, supervised_indices[-1], text)
            return self._render_with_tools_and_blocks(conversation, supervised_indices)
        closed = finder.find_spans(conversation, supervised_indices, text, str(self.tokenizer.eos_token))
        return RenderedText(closed.text, closed.spans)

    def _render_with_tools_and_blocks(
        self, conversation: TemplateConversation, supervised_indices: list[int]
    ) -> RenderedText:
        """Render a conversation with tools, calls or thoughts by a template that encloses supervised turns in blocks itself.

        These are its `{% generation %}` blocks. `supervised_indices`: the supervised turns, all of the assistant. Raises
        RefusedDocument if blocks and turns do not match.
        """
        (text_and_blocks,) = self._render_batch(
            [conversation.messages], tools=conversation.tools, return_assistant_tokens_mask=True
        )
        rendered = self._spans_from_blocks(
            conversation.messages, supervised_indices, conversation.location, text_and_blocks
        )
        if self.learn.reasoning is Reasoning.context:
            # Thoughts inside the blocks are shown, not learned.
            spans_behind_thoughts = []
            for index, (begin, end) in zip(supervised_indices, rendered.spans, strict=True):
                thought = thought_of(conversation.messages[index])
                spans_behind_thoughts.append((thought_end(thought, rendered.text, begin, end), end))
            rendered.spans = spans_behind_thoughts
        return rendered

    @staticmethod
    def _limit_error(error: TemplateLimitExceeded, first_location: str, num_conversations: int) -> ConfigError:
        """Make the error for a template that took too much time or memory, such as one that loops without end.

        `first_location`: where its first conversation comes from, usually `file:line`. `num_conversations`: how many it
        rendered at once.
        """
        rendered = f"a conversation ({first_location})"
        if num_conversations > 1:
            rendered = f"{num_conversations} conversations ({first_location} on)"
        return ConfigError(
            f"the chat template {error} for {rendered}: it loops, or multiplies; give another in model.chat_template"
        )

    def _render_batch(self, conversations: list[list[Message]], **options: Any) -> list[TextAndBlocks]:
        """Render conversations, with bounds on the template's time and memory: (text, spans of its generation blocks) of each.

        There are spans only with `return_assistant_tokens_mask` among the `options`, which are those of `render_conversations`.
        Raises whatever the template raises, and TemplateLimitExceeded.
        """
        special_tokens = self.tokenizer.special_tokens_map
        with template_resource_limits():
            texts, blocks = render_conversations(conversations, self.source, **options, **special_tokens)
        return [TextAndBlocks(*text_and_blocks) for text_and_blocks in zip(texts, blocks, strict=True)]

    def _render(self, messages: list[Message], *, prompt: bool = False, tools: Tools = None) -> str:
        """Render one conversation by the template; with `prompt`, with the header of the assistant turn to come."""
        ((text, _),) = self._render_batch([messages], add_generation_prompt=prompt, tools=tools)
        return text

    def _uses_blocks(self, messages: list[Message], supervised_indices: list[int]) -> bool:
        """Whether supervised spans come from the template's `{% generation %}` blocks, which enclose assistant turns.

        They do if it has some, and all supervised turns are the assistant's.
        """
        if not self.has_generation_blocks or not supervised_indices:
            return False
        return all(messages[index]["role"] == "assistant" for index in supervised_indices)

    def _spans_from_blocks(
        self, messages: list[Message], supervised_indices: list[int], location: str, text_and_blocks: TextAndBlocks
    ) -> RenderedText:
        """Find the supervised spans of a conversation in the template's `{% generation %}` blocks, which enclose assistant turns.

        `supervised_indices`: the supervised turns, all of the assistant. `text_and_blocks`: as `_render_batch` gives them.

        Raises RefusedDocument if a block is empty. Also if only some assistant turns are supervised, and the template has not one
        block for each turn, so that blocks cannot be told apart.
        """
        text, blocks = text_and_blocks
        spans = [(int(begin), int(end)) for begin, end in blocks]
        if not spans or any(begin >= end for begin, end in spans):
            raise template_refusal(location, "the {% generation %} blocks of the chat template are empty here")
        assistant_turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if assistant_turns != supervised_indices:
            if len(spans) != len(assistant_turns):
                raise template_refusal(
                    location,
                    f"only some assistant turns are to be learned, but the chat template has {len(spans)} "
                    f"{{% generation %}} blocks for {len(assistant_turns)} turns; learn all turns or give another template "
                    "in model.chat_template",
                )
            spans = [spans[assistant_turns.index(index)] for index in supervised_indices]
        roles = ["assistant"] * len(spans)
        # Blocks of some templates hold the end-of-turn token, and those of others do not.
        closed = self._span_finder.close_turns(text, spans, roles, already_closed=tuple(self.end_tokens))
        return RenderedText(closed.text, closed.spans)

    def _render_or_none(self, messages: list[Message], *, prompt: bool = False) -> str | None:
        """Render a small conversation, to find out how the template works; None if the template fails.

        A failure says nothing about the conversations of the data. `prompt`: with the header of the assistant turn to come.
        Raises ConfigError if the template takes too much time or memory.
        """
        try:
            return self._render(messages, prompt=prompt)
        except TemplateLimitExceeded as error:
            raise self._limit_error(error, "the first look at it", num_conversations=1) from error
        except Exception:  # noqa: BLE001 - a template may raise anything for a conversation that it dislikes
            return None


def _check_no_reserved_characters(message: Message, location: str) -> None:
    """Raise RefusedDocument if a text of a message has one of the private-use characters by which spans are found."""
    for text in message_texts(message):
        if not text.isascii() and _RESERVED_CHARACTER_REGEX.search(text):
            raise RefusedDocument(
                location,
                "reserved_character",
                "the text has one of the private-use characters U+10FB01 to U+10FB05; remove it",
            )


def _without_thought(message: Message, location: str) -> Message:
    """Take the thought out of an assistant turn: `<think>...</think>` before its content, or the field `reasoning_content`.

    Used with `data.learn.reasoning=drop`. Turns without one, and those of other roles, stay as they are. Raises RefusedDocument
    if nothing is left.
    """
    if message["role"] != "assistant" or thought_of(message) is None:
        return message
    content = message["content"]
    if THINK_BLOCK_REGEX.match(content):  # else the thought is in `reasoning_content`
        content = THINK_BLOCK_REGEX.sub("", content, count=1)
    if not content.strip() and "tool_calls" not in message:
        raise template_refusal(
            location, "an assistant turn is a thought alone, and data.learn.reasoning=drop leaves nothing"
        )
    turn = {**message, "content": content}
    turn.pop("reasoning_content", None)
    return turn


def _without_training_fields(message: Message) -> Message:
    """A message without `train` and `weight`, which are not for the template."""
    turn = {**message}
    turn.pop("train", None)
    turn.pop("weight", None)
    return turn
