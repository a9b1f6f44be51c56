"""Documents become samples: token ids and which of them are learned, in batches of the tokenizer's own Rust encoder.

Which characters are learned comes from `trainer/data/tokens/template.py`; here they become tokens. Refuses samples that begin
with two BOS tokens, and tokenizers without character offsets.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from strategies.errors import ConfigError, DataError, is_panic, tokenizer_panic
from trainer.data.config import ControlTokens, LearnConfig
from trainer.data.document import Document, Message, RefusedDocument
from trainer.data.store.sequences import LABEL, Sample
from trainer.data.tokens.characters import ESCAPE, ControlTokenEscaper
from trainer.data.tokens.clock import TemplateDate
from trainer.data.tokens.template import ChatTemplate, RenderedText

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast

DOCUMENTS_PER_BATCH = 512
"""Documents that go to the encoder at a time."""
DocumentTurns = tuple[Document, list[Message] | None]


class Encoder:
    """Tokenises documents of every format with one tokenizer. May be used in forked processes."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        label_names: list[str] | None = None,
        *,
        learn: LearnConfig | None = None,
        control_tokens: ControlTokens = ControlTokens.text,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"{type(tokenizer).__name__} gives no character offsets, which the label masks need; "
                "set model.tokenizer to one with a tokenizer.json"
            )
        self.tokenizer = tokenizer
        self.bos_id, self.eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id  # each look costs a search
        self.label_ids = {name: number for number, name in enumerate(label_names or [])}
        # A copy, because saved tokenizers may carry truncation and padding of their own.
        self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        self.opening, self.closing = self._natural_affixes()
        self._drop_post_processor()
        self.template = ChatTemplate(tokenizer, learn) if tokenizer.chat_template else None
        ends = self.template.all_end_tokens if self.template else {tokenizer.eos_token}
        self.end_ids = {tokenizer.convert_tokens_to_ids(token) for token in ends if token}
        self.escaper = ControlTokenEscaper(tokenizer, self._backend, ends)
        self.control_tokens = ControlTokens.text if control_tokens is ControlTokens.auto else control_tokens

    def fix_date(self, date: TemplateDate | None) -> None:
        """Let the chat template write this date for today; None leaves it the clock."""
        if date is not None and self.template is not None:
            self.template.fix_date(date.day)

    def _natural_affixes(self) -> tuple[list[int], list[int]]:
        """Ids the tokenizer puts before and after a text by itself, such as BOS, or [CLS] and [SEP]."""
        bare = self._backend.encode("a", add_special_tokens=False).ids
        full = self._backend.encode("a", add_special_tokens=True).ids
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        return [], []

    def _drop_post_processor(self) -> None:
        """Only affixes are left for it to do, and some (RoBERTa's) cut the spaces off the offsets of tokens."""
        from tokenizers.processors import TemplateProcessing

        self._backend.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])

    def encode(self, documents: Iterable[Document], *, fast: bool = True) -> Iterator[tuple[Document, Sample]]:
        """Samples in the order of the documents, untruncated; of preference pairs, the preferred answer.

        `fast=False` takes no short cuts: the same samples, found the long way. Raises DataError with file and line.
        """
        source = iter(documents)
        while batch := list(islice(source, DOCUMENTS_PER_BATCH)):
            answers = [(document, _messages(document)) for document in batch]
            yield from zip(batch, self.encode_answers(answers, fast=fast), strict=True)

    def encode_answers(self, answers: list[DocumentTurns], *, fast: bool = True) -> list[Sample]:
        """A sample of each document with the messages that stand for it; None: its prompt and completion, or its text."""
        return self._to_samples([document for document, _ in answers], self._render_all(answers, fast=fast))

    def encode_pairs(self, documents: Iterable[Document]) -> Iterator[tuple[Document, Sample, Sample]]:
        """Preference pairs as (document, chosen, rejected): both begin with the same prompt tokens, which nobody learns.

        From the first token that is learned in one of them on, both are learned. Raises DataError with file and line,
        also where the template writes the prompt of the two differently.
        """
        source = iter(documents)
        while batch := list(islice(source, DOCUMENTS_PER_BATCH)):
            answers: list[DocumentTurns] = []
            for document in batch:
                prompt = [{**message, "train": False} for message in document.messages or []]
                answers += [(document, prompt + (turns or [])) for turns in (document.chosen, document.rejected)]
            samples = self.encode_answers(answers)
            for document, chosen, rejected in zip(batch, samples[::2], samples[1::2], strict=True):
                share_prompt(document, chosen, rejected)
                yield document, chosen, rejected

    def num_tokens_before_first(self, document: Document) -> int | None:
        """How many tokens of a conversation come before the content of its first turn that is no system turn; None if
        that is not to be told."""
        if self.template is None:
            return None
        rendered = self._render_all([(document, _messages(document))], fast=True)[0]
        turns = self._escape_messages(document, document.messages or [])
        begin = self.template.first_content_begin(turns, document.where, document.tools)
        if begin is None:
            return None
        (encoding,), (rendered,) = self.tokenize([RenderedText(rendered.text, [(0, begin)], rendered.escaped)])
        ends = np.array(encoding.offsets, dtype=np.int64)[:, 1]
        return int(np.count_nonzero(ends <= rendered.spans[0][1]))

    def escape_text(self, document: Document, text: str) -> str:
        """A text of a document with the control tokens that it spells broken; the same object where it spells none."""
        if self.control_tokens is ControlTokens.keep or not self.escaper.spelled_in(text):
            return text
        if self.control_tokens is ControlTokens.refuse:
            message = "a text spells control tokens of the tokenizer, which data.control_tokens=refuse does not allow"
            raise RefusedDocument(document.where, "control_tokens", message)
        if any(ESCAPE in document_text for document_text in document.texts()):
            message = "the text has the private-use character U+10FB06 beside a spelled control token; remove it"
            raise RefusedDocument(document.where, "reserved_character", message)
        return self.escaper.escape(text)

    def tokenize(self, texts: list[RenderedText]) -> tuple[list[Encoding], list[RenderedText]]:
        """The tokens of texts, and the texts as their offsets mean them."""
        # add_special_tokens=False: templates write their own BOS, and the other formats get theirs below
        plain_texts = [text.text for text in texts]
        try:
            encodings = self._backend.encode_batch(plain_texts, add_special_tokens=False)
        except BaseException as error:
            if is_panic(error):  # a pattern without end, for example
                raise tokenizer_panic(error, self.tokenizer.name_or_path) from error
            raise
        escaped = list(texts)
        for number, text in enumerate(texts):
            if text.escaped:
                escaped[number] = RenderedText(*self.escaper.to_backend(text.text, text.spans), weights=text.weights)
                encodings[number] = self.escaper.backend.encode(escaped[number].text, add_special_tokens=False)
        return encodings, escaped

    def context_texts(self, document: Document) -> list[str]:
        """The texts of a document that are neither answers nor learned turns."""
        turns = _messages(document) or []
        texts = [turns[number]["content"] for number in self._context_turns(turns)]
        return texts + [text for text in (document.prompt, document.text) if text is not None]

    def num_closing_tokens(self, document: Document) -> int:
        """How many tokens at the end of a sample must survive truncation."""
        return len(self.closing) if document.label is not None else 0

    def _render_all(self, batch: list[DocumentTurns], *, fast: bool) -> list[RenderedText]:
        """Text and learned characters of documents, each with the messages that stand for it if it is a conversation."""
        chats: list[tuple[list[Message], list[Message]] | None] = []
        for document, messages in batch:
            if messages is None and document.prompt is not None and self.template is not None:
                messages = document.conversation()
            chats.append(None if messages is None else (messages, self._escape_messages(document, messages)))
        conversations = [
            (chat[1], document.where, document.tools) for chat, (document, _) in zip(chats, batch, strict=True) if chat
        ]
        template = self.template or (ChatTemplate(self.tokenizer) if conversations else None)  # or says what it lacks
        rendered_chats = iter(template.render_all(conversations, fast=fast) if template else [])
        rendered = []
        for chat, (document, _) in zip(chats, batch, strict=True):
            rendered.append(self._render_plain(document) if chat is None else next(rendered_chats))
            if chat is not None and template is not None:
                self._weigh_and_check(template, document, *chat, rendered[-1])
        return rendered

    def _weigh_and_check(
        self,
        template: ChatTemplate,
        document: Document,
        messages: list[Message],
        escaped_messages: list[Message],
        rendered: RenderedText,
    ) -> None:
        """Set the weights of the turns, and refuse a document whose template reads the control tokens that were escaped."""
        if any("weight" in message for message in escaped_messages):
            rendered.weights = span_weights(
                template.learned_turns(escaped_messages), escaped_messages, rendered, document.where
            )
        if escaped_messages is not messages:
            rendered.escaped = True
            plain = template.render_text(messages, document.where, document.tools).rstrip()
            if not rendered.text.replace(ESCAPE, "").startswith(plain):
                reason = "the chat template looks for a control token that a text spells; remove it from the text"
                raise RefusedDocument(document.where, "refused_by_template", reason)

    def _escape_messages(self, document: Document, messages: list[Message]) -> list[Message]:
        """Messages with spelled control tokens broken, but in answers and in what is learned; the same list where none is."""
        if not any(m["role"] != "assistant" and self.escaper.spelled_in(m["content"]) for m in messages):
            return messages
        escaped = list(messages)
        for number in self._context_turns(messages):
            escaped[number] = {**messages[number], "content": self.escape_text(document, messages[number]["content"])}
        return messages if escaped == messages else escaped

    def _context_turns(self, messages: list[Message]) -> list[int]:
        """Which messages are neither answers nor learned."""
        learned = self.template.learned_turns(messages) if self.template else ()
        return [n for n, message in enumerate(messages) if message["role"] != "assistant" and n not in learned]

    def _render_plain(self, document: Document) -> RenderedText:
        """Text without a template: a completion is learned, an unlabelled text is learned whole."""
        if document.prompt is not None:
            escaped_prompt = self.escape_text(document, document.prompt)
            prompt = escaped_prompt + document.separator
            text = prompt + (document.completion or "")
            return RenderedText(text, [(len(prompt), len(text))], escaped_prompt is not document.prompt)
        text = self.escape_text(document, document.text or "")
        return RenderedText(text, [] if document.label is not None else [(0, len(text))], text != (document.text or ""))

    def _to_samples(self, documents: list[Document], rendered: list[RenderedText]) -> list[Sample]:
        samples, bos = [], self.bos_id
        for document, encoding, text in zip(documents, *self.tokenize(rendered), strict=True):
            (input_ids, supervised, weights), marks = learned_tokens(encoding, text), dict[str, float]()
            # A text with control tokens of its own may begin with the BOS that would be put before it.
            begins_itself = (
                self.control_tokens is ControlTokens.keep and bos is not None and input_ids[:1].tolist() == [bos]
            )
            if document.label is not None:
                marks[LABEL] = self._label(document)
                opening = [] if begins_itself and self.opening == [bos] else self.opening
                input_ids, supervised = _add_affixes(input_ids, supervised, opening, self.closing, learn=False)
            elif document.text is not None or (document.prompt is not None and self.template is None):
                if (eos := self.eos_id) is None:
                    raise ConfigError("the tokenizer has no eos_token, so no text would end; set one in its config")
                opening = self.opening[:1] if self.opening[:1] == [bos] and not begins_itself else []
                closing = [] if input_ids[-1:].tolist() == [eos] else [eos]
                input_ids, supervised = _add_affixes(input_ids, supervised, opening, closing, learn=True)
            if bos is not None and len(input_ids) > 1 and input_ids[0] == input_ids[1] == bos:
                message = f"the sample begins with two {self.tokenizer.bos_token} tokens; remove it from the text, or from the "
                raise RefusedDocument(document.where, "doubled_bos", f"{message}template in model.chat_template")
            supervised[:1] = False
            samples.append(Sample(input_ids, supervised, marks, weights))
        return samples

    def _label(self, document: Document) -> int:
        if document.label not in self.label_ids:
            raise DataError(
                f"{document.where}: label {document.label!r} is none of {list(self.label_ids)} (objective.labels, or "
                "the labels of the training data)"
            )
        return self.label_ids[document.label]


def learned_tokens(encoding: Encoding, rendered: RenderedText) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Ids of a text, which of its tokens are learned, and where spans have weights those of their tokens.

    A token that straddles an edge of a span belongs to it, since generation would make it; so do tokens without characters of
    their own between two that have some.
    """
    input_ids = np.array(encoding.ids, dtype=np.int32)
    supervised = np.zeros(len(input_ids), dtype=np.bool_)
    weights = None if rendered.weights is None else np.zeros(len(input_ids), dtype=np.float32)
    for place, span in enumerate(rendered.spans if len(input_ids) else ()):
        inside = _tokens_of_span(encoding, *span)
        supervised[inside] = True
        if weights is not None and rendered.weights is not None:
            weights[inside] = rendered.weights[place]
    return input_ids, supervised, weights


def _tokens_of_span(encoding: Encoding, begin: int, end: int) -> slice:
    """The tokens of the characters [begin, end): by the first and the last of these, or by all offsets where one has none."""
    first, last = (encoding.char_to_token(at) if begin < end else None for at in (begin, end - 1))
    if first is not None and last is not None:
        while (after := encoding.token_to_chars(last + 1)) is not None and after[0] < end <= after[1]:
            last += 1  # a character may be several tokens
        return slice(first, last + 1)
    begins, ends = np.array(encoding.offsets, dtype=np.int64).T
    inside = np.flatnonzero((begins < ends) & (ends > begin) & (begins < end))
    return slice(inside[0], inside[-1] + 1) if len(inside) else slice(0)


def span_weights(learned: list[int], messages: list[Message], rendered: RenderedText, where: str) -> list[float] | None:
    """The weight of each span of a rendered conversation, whose turns `learned` are learned; None where each is 1."""
    weights = [messages[number].get("weight", 1.0) for number in learned]
    if all(weight == 1 for weight in weights):
        return None
    if len(rendered.spans) != len(weights):
        message = (
            f"the chat template has {len(rendered.spans)} {{% generation %}} blocks for {len(weights)} turns with weights "
            "of their own; give another in model.chat_template, or leave the weights out with data.ignore_columns=[weight]"
        )
        raise RefusedDocument(where, "refused_by_template", message)
    return weights


def _messages(document: Document) -> list[Message] | None:
    """The conversation of a document, with the preferred answer of a pair."""
    return document.messages if document.chosen is None else (document.messages or []) + document.chosen


def share_prompt(document: Document, chosen: Sample, rejected: Sample) -> None:
    """Make both answers begin at the same token, after the same ones."""
    starts = []
    for name, sample in (("chosen", chosen), ("rejected", rejected)):
        if not sample.supervised.any():
            message = f"nothing of the {name} answer is learned; see data.learn"
            raise RefusedDocument(document.where, "nothing_to_learn", message)
        starts.append(int(sample.supervised.argmax()))
    shared = min(starts)
    if not np.array_equal(chosen.input_ids[:shared], rejected.input_ids[:shared]):
        raise RefusedDocument(
            document.where,
            "differing_prompts",
            "the chat template writes the prompt differently before the chosen and the rejected answer, so that they "
            "cannot be compared; give another template in model.chat_template",
        )
    # where one answer merges with the end of the prompt into one token, the other learns the token it has there
    chosen.supervised[shared : starts[0]] = rejected.supervised[shared : starts[1]] = True


def _add_affixes(
    ids: np.ndarray, supervised: np.ndarray, opening: list[int], closing: list[int], *, learn: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Put special ids around a sample; the closing ones are learned if `learn`."""
    ids = np.concatenate([np.array(opening, np.int32), ids, np.array(closing, np.int32)])
    masks = (np.zeros(len(opening), np.bool_), np.full(len(closing), learn, np.bool_))
    return ids, np.concatenate([masks[0], supervised, masks[1]])


def truncate(sample: Sample, max_length: int, tail: int) -> Sample:
    """The first `max_length` tokens, of which the last `tail` are the sample's own last ones."""
    return sample.cut(slice(max_length - tail), slice(len(sample.input_ids) - tail, None))
