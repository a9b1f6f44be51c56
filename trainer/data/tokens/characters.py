"""Escaping of control tokens that a text only spells.

A tokenizer reads `<|im_end|>` as the end of a turn wherever it stands, also where a user merely wrote it. So before the
template is rendered, a text that spells a control token gets an escape mark between its characters; a control token that is
still in one piece afterwards was written by the template. A copy of the tokenizer (`marked_tokenizer`) knows control tokens
only with the mark in front: those of the template get one, and the spelled ones become ordinary characters. Ids and offsets
are those of the tokenizer itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING

from strategies.errors import ConfigError
from trainer.data.document import Document, Message, RefusedDocument

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from trainer.data.tokens.template import ChatTemplate, RenderedText

ESCAPE_MARK = "\U0010fb06"
"""A private-use character; a text that spells a control token must not have it."""


class ControlTokenEscaper:
    """Tells control tokens that are meant from those that a text only spells, such as an `<|im_end|>` that a user wrote.

    Control tokens are the special tokens of a tokenizer, and those that close turns.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, tokenizer_backend: Tokenizer, end_tokens: Iterable[str | None]
    ) -> None:
        """Collect the control tokens of a tokenizer: its special tokens, and `end_tokens`, which close turns.

        `tokenizer_backend`: the Rust tokenizer that encodes texts without escaped tokens.
        """
        special_tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        # No mark fits into a token of a single character.
        tokens = {token for token in (*special_tokens, *end_tokens) if token and len(token) > 1}
        # The longest come first, so that the pattern prefers them.
        self.tokens = sorted(tokens, key=len, reverse=True)
        self._tokenizer = tokenizer_backend
        pattern = "|".join(map(re.escape, self.tokens))
        self._token_regex = re.compile(pattern) if pattern else None
        self._mark_or_token_regex = re.compile(f"{ESCAPE_MARK}|{pattern}")

    def is_spelled_in(self, text: str) -> bool:
        """Whether a text spells one of the control tokens."""
        return self._token_regex is not None and self._token_regex.search(text) is not None

    def escape(self, text: str) -> str:
        """Put escape marks between the characters of each control token that a text spells, so that it is ordinary characters.

        With ^ for the mark: "a <s> b" -> "a <^s^> b".
        """
        # A loop, because taking one token apart may uncover another.
        while self._token_regex is not None and self._token_regex.search(text):
            text = self._token_regex.sub(lambda match: ESCAPE_MARK.join(match.group()), text)
        return text

    def to_marked_text(self, text: str, spans: list[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
        """Prepare a rendered text with escaped control tokens for `marked_tokenizer`: (that text, the spans in it).

        In `text`, a control token that the data only spells has escape marks in it, and one that the template wrote has none.
        `marked_tokenizer` knows control tokens with the mark in front. So the marks in the spelled ones are removed, and each
        real control token gets one. With ^ for the mark: "<s>Hi <^s^>" -> "^<s>Hi <s>".

        `spans`: (begin, end) in characters of `text`; they move with the characters.
        """
        # (position in `text` of a mark that is removed or of a token that gets one, how far all that is behind it moves)
        shifts: list[tuple[int, int]] = []

        def add_or_remove_mark(match: re.Match[str]) -> str:
            is_mark = match.group() == ESCAPE_MARK
            shifts.append((match.start(), -1 if is_mark else 1))
            return "" if is_mark else ESCAPE_MARK + match.group()

        marked_text = self._mark_or_token_regex.sub(add_or_remove_mark, text)

        def moved_position(position: int) -> int:
            return position + sum(shift for start, shift in shifts if start < position)

        return marked_text, [(moved_position(begin), moved_position(end)) for begin, end in spans]

    @cached_property
    def marked_tokenizer(self) -> Tokenizer:
        """Make a copy of the tokenizer that knows control tokens only with the mark in front, and reads bare ones as characters.

        Token ids stay the same. Made when a first text needs it. Raises ConfigError for a tokenizer whose control tokens cannot
        be told from their spelling.
        """
        from tokenizers import Tokenizer

        # What a tokenizer.json holds.
        settings = json.loads(self._tokenizer.to_str())
        model = settings["model"]
        marked_by_token = {token: ESCAPE_MARK + token for token in self.tokens}
        for added_token in settings["added_tokens"]:
            content = added_token["content"]
            added_token["content"] = marked_by_token.get(content, content)
        # The model itself may hold them too, and would find them by their spelling (a Unigram model does).
        vocab = model.get("vocab")
        if isinstance(vocab, dict):
            model["vocab"] = {marked_by_token.get(piece, piece): token_id for piece, token_id in vocab.items()}
        elif vocab is not None:
            model["vocab"] = [[marked_by_token.get(piece, piece), score] for piece, score in vocab]
        if model.get("unk_token") in marked_by_token:
            model["unk_token"] = marked_by_token[model["unk_token"]]
        try:
            marked_tokenizer = Tokenizer.from_str(json.dumps(settings))
        except Exception as error:  # the library raises no other; merges may be made of such tokens
            raise _indistinguishable_token_error(self.tokens[0]) from error
        # Each control token, now with its mark, must have kept its id.
        for token in self.tokens:
            if marked_tokenizer.token_to_id(ESCAPE_MARK + token) != self._tokenizer.token_to_id(token):
                raise _indistinguishable_token_error(token)
        return marked_tokenizer


def _indistinguishable_token_error(token: str) -> ConfigError:
    """The error for a tokenizer that has no way to read a control token as ordinary characters."""
    return ConfigError(
        f"data.control_tokens=text: {token!r} cannot be told from its spelling with this tokenizer; set "
        "data.control_tokens=refuse or keep"
    )


def check_same_text_without_escaping(
    template: ChatTemplate, document: Document, messages: list[Message], rendered: RenderedText
) -> None:
    """Raise RefusedDocument if escaping control tokens has changed what the template writes for a conversation.

    `rendered` was made of `messages` with marks within each control token that they spell. A template may look for such a token
    in a content, and not find the escaped one.
    """
    # `rendered` may be longer than what the template writes: EOS was added if the template does not close its last turn.
    unescaped_text = template.render_text(messages, document.location, document.tools).rstrip()
    if not rendered.text.replace(ESCAPE_MARK, "").startswith(unescaped_text):
        message = "the chat template looks for a control token that a text spells; remove it from the text"
        raise RefusedDocument(document.location, "refused_by_template", message)
