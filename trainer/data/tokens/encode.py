"""Tokenises documents: makes samples of token ids and label masks, in batches of the tokenizer's own Rust encoder.

`trainer/data/tokens/template.py` says which characters are learned; here they become tokens. Samples that begin with two BOS
tokens are refused, and so are tokenizers without character offsets.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from strategies.errors import ConfigError, DataError, is_panic, tokenizer_panic
from trainer.data.config import ControlTokens, LearnConfig
from trainer.data.document import Document, Message, RefusedDocument
from trainer.data.store.sequences import LABEL, Sample
from trainer.data.tokens.characters import ESCAPE_MARK, ControlTokenEscaper, check_same_text_without_escaping
from trainer.data.tokens.clock import TemplateDate
from trainer.data.tokens.supervision import SupervisedTokens, align_learned_answers, span_weights, supervise_spans
from trainer.data.tokens.template import ChatTemplate, RenderedText

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast

DOCUMENTS_PER_BATCH = 512
"""Documents that go to the encoder at a time."""
DocumentTurns = tuple[Document, list[Message] | None]
"""A document, and the messages to encode for it; None: its prompt and completion, or its text."""


class _Conversation(NamedTuple):
    """The turns that are encoded for a document, as they are and as they are rendered."""

    document: Document
    messages: list[Message]
    escaped_messages: list[Message]
    """With marks within each control token that contents merely spell; the same object if they spell none."""


class EncodedText(NamedTuple):
    """The tokens of a rendered text, and where they stand in it."""

    encoding: Encoding
    rendered: RenderedText
    """The text that the character offsets of `encoding` refer to, with its supervised spans."""

    @property
    def ids(self) -> list[int]:
        """The token ids."""
        ids: list[int] = self.encoding.ids
        return ids


class Encoder:
    """Tokenises documents of every format with one tokenizer, and says which tokens are supervised. Works in forked workers."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        learn: LearnConfig | None = None,
        control_tokens: ControlTokens = ControlTokens.text,
    ) -> None:
        """Set up tokenising. Raises ConfigError for a tokenizer without character offsets, which masks need.

        `learn`: which turns of conversations are supervised. `control_tokens`: what becomes of control tokens, such as
        `<|im_end|>`, that a text merely spells. By default they are escaped: the tokenizer reads ordinary characters there.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"{type(tokenizer).__name__} gives no character offsets, which the label masks need; "
                "set model.tokenizer to one with a tokenizer.json"
            )
        self.tokenizer = tokenizer
        # Kept, because the tokenizer searches its vocabulary each time one asks for them.
        self.bos_id = tokenizer.bos_token_id
        self.eos_id = tokenizer.eos_token_id
        self.label_id_by_name: dict[str, int] = {}
        # A copy, because saved tokenizers may carry truncation and padding of their own.
        self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        self.leading_special_ids, self.trailing_special_ids = self._affixes_of_tokenizer()
        # We add the affixes ourselves, and some post-processors (RoBERTa's) cut spaces off token offsets.
        self._backend.post_processor = None
        self.template = ChatTemplate(tokenizer, learn) if tokenizer.chat_template else None
        end_tokens = self.template.all_end_tokens if self.template else {tokenizer.eos_token}
        # By the last supervised token, the report counts samples that do not teach where a turn ends.
        self.end_ids = {tokenizer.convert_tokens_to_ids(token) for token in end_tokens if token}
        self.escaper = ControlTokenEscaper(tokenizer, self._backend, end_tokens)
        self.control_tokens = ControlTokens.text if control_tokens is ControlTokens.auto else control_tokens

    def set_label_names(self, names: Iterable[str]) -> None:
        """Number the labels in this order. To be called before documents with labels are encoded."""
        self.label_id_by_name = {name: number for number, name in enumerate(names)}

    def fix_date(self, date: TemplateDate | None) -> None:
        """Let the chat template write this date for today; None leaves it the clock."""
        if date is not None and self.template is not None:
            self.template.fix_date(date.day)

    def _affixes_of_tokenizer(self) -> tuple[list[int], list[int]]:
        """Find the special tokens that the tokenizer puts around a text by itself: (ids before it, ids behind it).

        Such as BOS alone, or [CLS] and [SEP]. Found by encoding a small text with and without them. A tokenizer that then
        changes the text's own tokens has no affixes that we could add: ([], []).
        """
        text_ids = self._backend.encode("a", add_special_tokens=False).ids
        ids_with_affixes = self._backend.encode("a", add_special_tokens=True).ids
        num_text_ids = len(text_ids)
        for begin in range(len(ids_with_affixes) - num_text_ids + 1):
            end = begin + num_text_ids
            if ids_with_affixes[begin:end] == text_ids:
                return ids_with_affixes[:begin], ids_with_affixes[end:]
        return [], []

    def encode(self, documents: Iterable[Document], *, fast: bool = True) -> Iterator[tuple[Document, Sample]]:
        """Tokenise documents for training or evaluation: (document, its sample) in order, untruncated.

        A sample has the token ids and the mask of supervised tokens. Of a preference pair, it is that of the preferred answer.
        `fast=False` takes no short cuts: the same samples, found the long way. Raises DataError with file and line.
        """
        remaining = iter(documents)
        # A batch at a time, so that `documents` may be a long iterator.
        while batch := list(islice(remaining, DOCUMENTS_PER_BATCH)):
            documents_and_turns = [(document, _preferred_messages(document)) for document in batch]
            yield from zip(batch, self.encode_answers(documents_and_turns, fast=fast), strict=True)

    def encode_prompts(self, documents: Iterable[Document]) -> Iterator[tuple[Document, np.ndarray]]:
        """Tokenise the prompts of documents, to which a model then writes answers: (document, token ids of its prompt).

        Ids are int32 [n]. A prompt ends where the model would begin to answer:
        - of a conversation: behind the chat template's header of the answer to come, without the last answers of the data;
        - of a text, or of a prompt without a chat template: behind the text with its separator. BOS comes first if the tokenizer
          adds it to texts.
        Raises DataError with file and line.
        """
        remaining = iter(documents)
        while batch := list(islice(remaining, DOCUMENTS_PER_BATCH)):
            rendered = [self._render_prompt(document) for document in batch]
            for document, encoded in zip(batch, self.tokenize(rendered), strict=True):
                ids = np.array(encoded.ids, dtype=np.int32)
                # `tokenize` adds no BOS, because the chat template writes that of a conversation.
                is_conversation = self.template is not None and document.text is None
                if not is_conversation and self._adds_bos_to_texts and not self._begins_with_bos(ids):
                    ids = np.concatenate([np.array([self.bos_id], np.int32), ids])
                yield document, ids

    @property
    def _adds_bos_to_texts(self) -> bool:
        """Whether the tokenizer puts BOS before a text by itself."""
        return self.leading_special_ids[:1] == [self.bos_id]

    def _begins_with_bos(self, ids: np.ndarray) -> bool:
        """Whether token ids (int [n]) begin with BOS; False if the tokenizer has none."""
        return self.bos_id is not None and ids[:1].tolist() == [self.bos_id]

    def _render_prompt(self, document: Document) -> RenderedText:
        """Write the text of a document up to where the model would begin to answer; nothing of it is supervised.

        - A conversation: its turns before the last answers, and the chat template's header of the answer to come.
        - A text, or without a template a prompt: the text itself, with its separator.
        Control tokens that the texts merely spell are escaped; `escaped` of the result says whether any was.
        """
        turns = _preferred_messages(document)
        if turns is None and document.prompt is not None and self.template is not None:
            turns = document.conversation()
        if turns is None:
            text = self.escape_text(document, document.text or document.prompt or "") + document.separator
            return RenderedText(text, [], escaped=ESCAPE_MARK in text)
        if self.template is None:
            self.template = ChatTemplate(self.tokenizer)  # raises the ConfigError that says what the tokenizer lacks
        while turns and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        # All turns are context here, so that in each of them control tokens are escaped.
        context_turns = [{**turn, "train": False} for turn in turns]
        escaped_turns = self._escape_messages(document, context_turns)  # the same list if nothing had to be escaped
        text = self.template.render_prompt(escaped_turns, document.location, document.tools)
        return RenderedText(text, [], escaped=escaped_turns is not context_turns)

    def encode_answers(self, answers: list[DocumentTurns], *, fast: bool = True) -> list[Sample]:
        """Tokenise documents with given messages: a sample of each, with token ids and the mask of supervised tokens.

        `answers`: (document, messages) of each, such as the prompt with one of its two answers. Without messages, the
        document's prompt and completion, or its text, are encoded. `fast=False` finds the same masks the long way.
        """
        rendered = self._render_answers(answers, fast=fast)
        return self._to_samples([document for document, _ in answers], rendered)

    def encode_pairs(self, documents: Iterable[Document]) -> Iterator[tuple[Document, Sample, Sample]]:
        """Tokenise preference pairs: (document, sample of the chosen answer, sample of the rejected one) of each, in order.

        Each sample is the prompt with one answer. Both begin with the same prompt tokens, which are not supervised, and
        supervision begins at the same token. So their log-probabilities can be compared; masks are widened for that
        (`align_learned_answers`).

        Raises DataError with file and line, also if the template writes the prompt of the two differently.
        """
        remaining = iter(documents)
        while batch := list(islice(remaining, DOCUMENTS_PER_BATCH)):
            answers: list[DocumentTurns] = []
            for document in batch:
                # The turns that both answers share are never supervised, whatever the row says.
                prompt = [{**message, "train": False} for message in document.messages or []]
                answers.append((document, prompt + (document.chosen or [])))
                answers.append((document, prompt + (document.rejected or [])))
            samples = self.encode_answers(answers)
            for document, chosen, rejected in zip(batch, samples[::2], samples[1::2], strict=True):
                align_learned_answers(document, chosen=chosen, rejected=rejected)
                yield document, chosen, rejected

    def num_tokens_before_first_turn(self, document: Document) -> int | None:
        """Count the tokens of a conversation before the content of its first turn that is no system turn.

        These stay when a conversation that is too long loses its beginning. None if there is no chat template, or if it does
        not let us tell where that content begins.
        """
        if self.template is None:
            return None
        (rendered,) = self._render_answers([(document, _preferred_messages(document))], fast=True)
        # The position in that rendered text: it has marks within control tokens that contents merely spell.
        escaped_turns = self._escape_messages(document, document.messages or [])
        content_begin = self.template.first_content_begin(escaped_turns, document.location, document.tools)
        if content_begin is None:
            return None
        # `tokenize` may change the text, and moves its spans along: here the one span that stands before the content.
        text_before_content = RenderedText(rendered.text, [(0, content_begin)], rendered.escaped)
        (encoded,) = self.tokenize([text_before_content])
        _, num_characters_before = encoded.rendered.spans[0]
        _token_begins, token_ends = np.array(encoded.encoding.offsets, dtype=np.int64).T
        return int(np.count_nonzero(token_ends <= num_characters_before))

    def escape_text(self, document: Document, text: str) -> str:
        """Escape the control tokens that a text of a document spells, such as an `<|im_end|>` that a user wrote.

        An escape mark between its characters keeps the tokenizer from reading such a token as a control token. Returns the same
        object if there is nothing to escape. Raises RefusedDocument if the text spells some and `data.control_tokens` is
        `refuse`, or if the document has the escape mark itself.
        """
        if self.control_tokens is ControlTokens.keep or not self.escaper.is_spelled_in(text):
            return text
        if self.control_tokens is ControlTokens.refuse:
            message = "a text spells control tokens of the tokenizer, which data.control_tokens=refuse does not allow"
            raise RefusedDocument(document.location, "control_tokens", message)
        if any(ESCAPE_MARK in document_text for document_text in document.texts()):
            message = "the text has the private-use character U+10FB06 beside a spelled control token; remove it"
            raise RefusedDocument(document.location, "reserved_character", message)
        return self.escaper.escape(text)

    def tokenize(self, rendered: list[RenderedText]) -> list[EncodedText]:
        """Tokenise rendered texts, as one batch: of each its tokens, and the text to which their character offsets refer.

        That text differs from the given one only if control tokens were escaped (`escaped`). Texts that a user wrote then have
        marks within control tokens that they spell. These are taken out, and the real control tokens are marked in their place:
        `escaper.marked_tokenizer` knows control tokens only with a mark.
        """
        # add_special_tokens=False: templates write their own BOS, and the other formats get theirs in `_to_samples`.
        try:
            encodings = self._backend.encode_batch([text.text for text in rendered], add_special_tokens=False)
        except BaseException as error:
            if is_panic(error):  # the Rust code panicked: a pattern without end, for example
                raise tokenizer_panic(error, self.tokenizer.name_or_path) from error
            raise
        encoded_texts = []
        for text, encoding in zip(rendered, encodings, strict=True):
            if text.escaped:
                marked_text, marked_spans = self.escaper.to_marked_text(text.text, text.spans)
                text = RenderedText(marked_text, marked_spans, loss_weights=text.loss_weights)
                encoding = self.escaper.marked_tokenizer.encode(marked_text, add_special_tokens=False)
            encoded_texts.append(EncodedText(encoding, text))
        return encoded_texts

    def context_texts(self, document: Document) -> list[str]:
        """List the texts of a document that are only read: neither answers nor supervised turns."""
        turns = _preferred_messages(document) or []
        texts = [turns[index]["content"] for index in self._context_turn_indices(turns)]
        return texts + [text for text in (document.prompt, document.text) if text is not None]

    def num_closing_tokens(self, document: Document) -> int:
        """How many tokens at the end of a sample must survive truncation: of a labelled text those behind it, such as [SEP]."""
        return len(self.trailing_special_ids) if document.label is not None else 0

    def _render_answers(self, batch: list[DocumentTurns], *, fast: bool) -> list[RenderedText]:
        """Write the text of each document, with the character spans of it that are supervised, in the order of `batch`.

        `batch`: (document, messages) of each. A conversation is rendered by the chat template, and a document without messages as
        plain text. `fast=False` renders every conversation twice, to find the spans without a shortcut.
        """
        conversations = [self._conversation(document, messages) for document, messages in batch]
        # All at once, since that is faster.
        rendered_conversations = iter(
            self._render_conversations([one for one in conversations if one is not None], fast=fast)
        )
        rendered = []
        for conversation, (document, _) in zip(conversations, batch, strict=True):
            rendered.append(self._render_plain(document) if conversation is None else next(rendered_conversations))
        return rendered

    def _conversation(self, document: Document, messages: list[Message] | None) -> _Conversation | None:
        """The turns of a document that the chat template is to render; None for a document that is plain text.

        `messages`: the turns to encode; None for a text, or a prompt with its completion. The latter are two turns if there is a
        template.
        """
        if messages is None and document.prompt is not None and self.template is not None:
            messages = document.conversation()
        if messages is None:
            return None
        return _Conversation(document, messages, self._escape_messages(document, messages))

    def _render_conversations(self, conversations: list[_Conversation], *, fast: bool) -> list[RenderedText]:
        """Write conversations by the chat template, each with its supervised spans and what these count for in the loss.

        `fast=False` finds the spans without a shortcut. Raises ConfigError without a chat template, RefusedDocument for a
        conversation that cannot be rendered, or whose weights do not match its spans.
        """
        if not conversations:
            return []
        template = self.template or ChatTemplate(self.tokenizer)  # which says what the tokenizer lacks
        rendered_conversations = template.render_all(
            [(one.escaped_messages, one.document.location, one.document.tools) for one in conversations], fast=fast
        )
        for rendered, (document, messages, escaped_messages) in zip(rendered_conversations, conversations, strict=True):
            if any("weight" in message for message in messages):  # without weights, all learned tokens count 1
                supervised_indices = template.supervised_turn_indices(messages)
                rendered.loss_weights = span_weights(supervised_indices, messages, rendered, document.location)
            if escaped_messages is not messages:
                rendered.escaped = True
                check_same_text_without_escaping(template, document, messages, rendered)
        return rendered_conversations

    def _escape_messages(self, document: Document, messages: list[Message]) -> list[Message]:
        """Escape the control tokens that messages merely spell, except in assistant turns and in supervised ones.

        Marks within such a token make it ordinary characters. What is supervised stays as it is, since the model is to learn
        its tokens. Returns the same list object if nothing had to be escaped, which callers test for.
        """
        # A quick look first, at all that could be escaped, without asking which turns are supervised.
        contents = (message["content"] for message in messages if message["role"] != "assistant")
        if not any(self.escaper.is_spelled_in(content) for content in contents):
            return messages
        escaped_messages = list(messages)
        for index in self._context_turn_indices(messages):
            escaped_content = self.escape_text(document, messages[index]["content"])
            escaped_messages[index] = {**messages[index], "content": escaped_content}
        return messages if escaped_messages == messages else escaped_messages

    def _context_turn_indices(self, messages: list[Message]) -> list[int]:
        """Indices of the messages that are only read: neither written by the assistant nor supervised."""
        supervised_indices = self.template.supervised_turn_indices(messages) if self.template else ()
        context_indices = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" and index not in supervised_indices:
                context_indices.append(index)
        return context_indices

    def _render_plain(self, document: Document) -> RenderedText:
        """Write the text of a document without a chat template, with its supervised span.

        - A prompt with its completion: the completion is supervised. It is not escaped, because the model is to learn the
          control tokens that it spells.
        - A text: all of it. A labelled text has no span, since only its label is learned.
        """
        if document.prompt is not None:
            escaped_prompt = self.escape_text(document, document.prompt)
            prompt = escaped_prompt + document.separator
            text = prompt + (document.completion or "")
            return RenderedText(text, [(len(prompt), len(text))], escaped=escaped_prompt != document.prompt)
        original_text = document.text or ""
        text = self.escape_text(document, original_text)
        spans = [(0, len(text))] if document.label is None else []
        return RenderedText(text, spans, escaped=text != original_text)

    def _to_samples(self, documents: list[Document], rendered: list[RenderedText]) -> list[Sample]:
        """Turn rendered documents into samples: token ids, the mask of supervised tokens, and the number of a label.

        The special tokens that belong around a text, such as BOS and EOS, are added, unless the template or the text has them.
        Raises RefusedDocument for two BOS at the beginning.
        """
        samples = []
        for document, encoded in zip(documents, self.tokenize(rendered), strict=True):
            tokens = self._add_special_tokens(document, supervise_spans(encoded.encoding, encoded.rendered))
            if self.bos_id is not None and tokens.input_ids[:2].tolist() == [self.bos_id, self.bos_id]:
                message = (
                    f"the sample begins with two {self.tokenizer.bos_token} tokens; remove it from the text, or from the "
                    "template in model.chat_template"
                )
                raise RefusedDocument(document.location, "doubled_bos", message)
            # Nothing predicts the first token.
            tokens.supervised[:1] = False
            marks: dict[str, float] = {} if document.label is None else {LABEL: self._label_id(document)}
            samples.append(Sample(tokens.input_ids, tokens.supervised, marks, tokens.weights))
        return samples

    def _add_special_tokens(self, document: Document, tokens: SupervisedTokens) -> SupervisedTokens:
        """Put special tokens around the tokens of a document, as its kind needs them and unless they are there already.

        A labelled text gets the tokenizer's own affixes, such as [CLS] and [SEP]. Another text, and a prompt with its completion
        without a chat template, get BOS if the tokenizer writes one, and an EOS that is learned. A conversation gets none, since
        the chat template wrote them. Raises ConfigError if an EOS is needed and the tokenizer has none.
        """
        # Only a text with control tokens of its own may begin with the BOS that would be put before it.
        begins_with_bos = self.control_tokens is ControlTokens.keep and self._begins_with_bos(tokens.input_ids)
        if document.label is not None:
            has_leading_ids = begins_with_bos and self.leading_special_ids == [self.bos_id]
            leading_ids = [] if has_leading_ids else self.leading_special_ids
            return tokens.with_affixes(leading_ids, self.trailing_special_ids, learn_trailing=False)
        if document.text is not None or (document.prompt is not None and self.template is None):
            if self.eos_id is None:
                raise ConfigError("the tokenizer has no eos_token, so no text would end; set one in its config")
            leading_ids = [self.bos_id] if self._adds_bos_to_texts and not begins_with_bos else []
            trailing_ids = [] if tokens.input_ids[-1:].tolist() == [self.eos_id] else [self.eos_id]
            return tokens.with_affixes(leading_ids, trailing_ids, learn_trailing=True)
        return tokens

    def _label_id(self, document: Document) -> int:
        """The number of a document's label. Raises DataError for a label that is not known."""
        if document.label not in self.label_id_by_name:
            raise DataError(
                f"{document.location}: label {document.label!r} is none of {list(self.label_id_by_name)} "
                "(objective.labels, or the labels of the training data)"
            )
        return self.label_id_by_name[document.label]


def _preferred_messages(document: Document) -> list[Message] | None:
    """The conversation of a document; of a preference pair, the one with the preferred answer."""
    if document.chosen is None:
        return document.messages
    return (document.messages or []) + document.chosen
