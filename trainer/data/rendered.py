"""Rows that already hold a rendered chat template: they would be learned as spelled characters, and are refused.

Many published files have one column `text` with whole conversations in it, special tokens included. Special tokens in a text
are encoded as ordinary characters, unless `data.control_tokens` says otherwise. A model that learned such rows would write
`<`, `|`, `im_end` one after the other, and never end a turn. Nobody wants that without knowing, so the user has to choose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from strategies.errors import DataError
from trainer.data.document import Document, InputId
from trainer.data.formats import RowReader
from trainer.data.sources import SourceInput
from trainer.data.tokens.encode import Encoder

FIRST_ROWS = 100
"""Rows of each input that are looked at."""
_QUESTION_AND_ANSWER = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@dataclass(frozen=True, slots=True)
class TurnTokens:
    """The special tokens by which a text is recognised that a chat template has rendered already, such as "<|im_start|>"."""

    around_turns: tuple[str, ...]
    """Tokens that the chat template writes around turns, but for BOS and EOS: a text spells one anywhere."""
    bos_token: str | None
    """A rendered text begins with it."""
    eos_token: str | None
    """A rendered text ends with it."""

    @classmethod
    def from_chat_template(cls, encoder: Encoder) -> TurnTokens:
        """Find the special tokens that the chat template writes around turns, by rendering a small conversation.

        If the template refuses that, its end-of-turn tokens alone; without a template, none.
        """
        tokenizer = encoder.tokenizer
        rendered = ""
        if encoder.template is not None:
            try:
                rendered = encoder.template.render_text(_QUESTION_AND_ANSWER * 2, "the chat template")
            except DataError:
                rendered = "".join(encoder.template.all_end_tokens)
        around_turns = []
        # The escaper knows the special tokens of the tokenizer.
        for token in encoder.escaper.tokens:
            if token in rendered and token not in (tokenizer.bos_token, tokenizer.eos_token):
                around_turns.append(token)
        return cls(tuple(around_turns), bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)

    def find_token(self, document: Document) -> str | None:
        """Find the token that makes a document look as if a chat template had rendered it; None if there is none.

        - A prompt or text that has a token of `around_turns` anywhere: that token.
        - A text that begins with BOS or ends with EOS: BOS or EOS. A prompt may, since these two tell nothing of a prompt.
        """
        text = document.prompt or document.text or ""
        for token in self.around_turns:
            if token in text:
                return token
        if document.prompt is not None:
            return None
        stripped = text.strip()
        if self.bos_token is not None and stripped.startswith(self.bos_token):
            return self.bos_token
        if self.eos_token is not None and stripped.endswith(self.eos_token):
            return self.eos_token
        return None


def refuse_rendered_rows(inputs: list[SourceInput], readers: dict[InputId, RowReader], encoder: Encoder) -> None:
    """Raise DataError if most of an input's first texts or prompts look as if a chat template had rendered them.

    These tokens would become ordinary characters. `readers`: by (split, source), what makes documents of an input's rows.
    Conversations do not count, nor labelled texts, of which only the label is learned.
    """
    turn_tokens = TurnTokens.from_chat_template(encoder)
    for source_input in inputs:
        num_texts = 0
        num_rendered = 0
        first_rendered: tuple[Document, str] | None = None
        for document in _first_documents(source_input, readers[source_input.id]):
            is_learned_text = document.text is not None and document.label is None
            if document.prompt is None and not is_learned_text:
                continue
            num_texts += 1
            token = turn_tokens.find_token(document)
            if token is not None:
                num_rendered += 1
                first_rendered = first_rendered or (document, token)
        if first_rendered is not None and num_rendered > num_texts / 2:
            document, token = first_rendered
            explanation = _rendered_rows_remedy(document, token, turn_tokens)
            raise DataError(f"{source_input.key}: {num_rendered} of the first {num_texts} {explanation}")


def _first_documents(source_input: SourceInput, reader: RowReader) -> Iterator[Document]:
    """Read the documents among an input's first rows. Rows that cannot be read are left out: they are refused elsewhere."""
    for row in islice(source_input.origin.rows(source_input.needed_columns), FIRST_ROWS):
        document = reader(row.parse())
        if isinstance(document, Document):
            yield document


def _rendered_rows_remedy(document: Document, token: str, turn_tokens: TurnTokens) -> str:
    """Write the end of the error message for texts that a chat template rendered already: what they teach, and a remedy.

    `document`, one of them, spells the special token `token`. `turn_tokens`: those that stand around turns.
    """
    if document.prompt is not None:
        return (
            f"prompts spell the chat template's own tokens, such as {token} ({document.location}), and the template would be "
            "written around them once more. Give such rows as messages, without the tokens. To learn these tokens as "
            "ordinary characters, set data.control_tokens=text"
        )
    if token not in turn_tokens.around_turns:
        return (
            f"texts begin or end with {token} ({document.location}), which would be learned as ordinary characters. To read it "
            "as the special token, set data.control_tokens=keep, or take it out: preparation adds it to each sample. Of "
            "conversations the questions are learned too; rows of messages would mask the questions. To learn the token as "
            "ordinary characters, set data.control_tokens=text"
        )
    return (
        f"texts spell the chat template's own tokens, such as {token} ({document.location}), and would be learned as ordinary "
        "characters. To read them as special tokens, set data.control_tokens=keep: the questions in a text are then learned "
        "too. Rows of messages would mask the questions. To learn the tokens as ordinary characters, set "
        "data.control_tokens=text"
    )
