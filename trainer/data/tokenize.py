"""Documents become samples: token ids and which of them are learned, in batches of the tokenizer's own Rust encoder.

Refuses samples that begin with two BOS tokens, and tokenizers without character offsets.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from strategies.errors import ConfigError, DataError
from trainer.data.dataset import Sample
from trainer.data.formats import Document
from trainer.data.template import ChatTemplate, Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH = 512
"""Documents that go to the encoder at a time."""


class Encoder:
    """Tokenises documents of every format with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, label_names: list[str] | None = None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"{type(tokenizer).__name__} gives no character offsets, which the label masks need; "
                "set model.tokenizer to one with a tokenizer.json"
            )
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
        self.label_ids = {name: number for number, name in enumerate(label_names or [])}
        # A copy, because saved tokenizers may carry truncation and padding of their own.
        self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        self.opening, self.closing = self._natural_affixes()
        control = sorted(map(re.escape, tokenizer.get_added_vocab()), key=len, reverse=True)
        self._control = re.compile("|".join(control)) if control else None
        ends = self.template.end_tokens if self.template else {tokenizer.eos_token}
        self.end_ids = {tokenizer.convert_tokens_to_ids(token) for token in ends if token}

    def _natural_affixes(self) -> tuple[list[int], list[int]]:
        """Ids the tokenizer puts before and after a text by itself, such as BOS, or [CLS] and [SEP]."""
        bare = self._backend.encode("a", add_special_tokens=False).ids
        full = self._backend.encode("a", add_special_tokens=True).ids
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        return [], []

    def encode(self, documents: Iterable[Document]) -> Iterator[tuple[Document, Sample]]:
        """Samples in the order of the documents, untruncated. Raises DataError with file and line."""
        source = iter(documents)
        while batch := list(islice(source, BATCH)):
            rendered = [self._render(document) for document in batch]
            # add_special_tokens=False: templates write their own BOS, and the other formats get theirs below
            encodings = self._backend.encode_batch([r.text for r in rendered], add_special_tokens=False)
            for document, text, encoding in zip(batch, rendered, encodings, strict=True):
                yield document, self._sample(document, text, encoding.ids, encoding.offsets)

    def has_control_tokens(self, document: Document) -> bool:
        """Whether a text spells one of the tokenizer's control tokens, which is then encoded as that token."""
        return self._control is not None and any(self._control.search(text) for text in document.texts())

    def tail(self, document: Document) -> int:
        """How many tokens at the end of a sample must survive truncation."""
        return len(self.closing) if document.label is not None else 0

    def _render(self, document: Document) -> Rendered:
        if document.messages is not None or (document.prompt is not None and self.template is not None):
            messages = document.messages or [
                {"role": "user", "content": document.prompt or ""},
                {"role": "assistant", "content": document.completion or ""},
            ]
            template = self.template or ChatTemplate(self.tokenizer)  # the latter says that there is no template
            return template.render(messages, document.where)
        if document.prompt is not None:
            prompt = document.prompt + document.separator
            text = prompt + (document.completion or "")
            return Rendered(text, [(len(prompt), len(text))])
        text = document.text or ""
        return Rendered(text, [] if document.label is not None else [(0, len(text))])

    def _sample(self, document: Document, rendered: Rendered, ids: list[int], offsets: list[tuple[int, int]]) -> Sample:
        input_ids = np.array(ids, dtype=np.int32)
        supervised = np.zeros(len(ids), dtype=np.bool_)
        if rendered.spans and ids:
            begins, ends = np.array(offsets, dtype=np.int64).T
            for begin, end in rendered.spans:  # a token that straddles an edge is learned: generation would make it
                supervised |= (begins < end) & (ends > begin)
        label = None
        if document.label is not None:
            label = self._label(document)
            input_ids, supervised = _affix(input_ids, supervised, self.opening, self.closing, learn=False)
        elif document.text is not None or (document.prompt is not None and self.template is None):
            eos = self.tokenizer.eos_token_id
            if eos is None:
                raise ConfigError("the tokenizer has no eos_token, so no text would ever end; set one in its config")
            opening = self.opening[:1] if self.opening[:1] == [self.tokenizer.bos_token_id] else []
            closing = [] if ids and ids[-1] == eos else [eos]
            input_ids, supervised = _affix(input_ids, supervised, opening, closing, learn=True)
        bos = self.tokenizer.bos_token_id
        if bos is not None and len(input_ids) > 1 and input_ids[0] == input_ids[1] == bos:
            raise DataError(
                f"{document.where}: the sample begins with two {self.tokenizer.bos_token} tokens; "
                "remove it from the text, or from the template in model.chat_template"
            )
        supervised[:1] = False
        return Sample(input_ids, supervised, label)

    def _label(self, document: Document) -> int:
        if document.label not in self.label_ids:
            raise DataError(
                f"{document.where}: label {document.label!r} is none of {list(self.label_ids)} (objective.labels, or "
                "the labels of the training data)"
            )
        return self.label_ids[document.label]


def _affix(
    ids: np.ndarray, supervised: np.ndarray, opening: list[int], closing: list[int], *, learn: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Put special ids around a sample; the closing ones are learned if `learn`."""
    ids = np.concatenate([np.array(opening, np.int32), ids, np.array(closing, np.int32)])
    around = (np.zeros(len(opening), np.bool_), np.full(len(closing), learn, np.bool_))
    return ids, np.concatenate([around[0], supervised, around[1]])


def truncate(sample: Sample, max_length: int, tail: int) -> Sample:
    """The first `max_length` tokens, of which the last `tail` are the sample's own last ones."""
    keep = max_length - tail
    end = len(sample.input_ids) - tail
    ids = np.concatenate([sample.input_ids[:keep], sample.input_ids[end:]])
    return Sample(ids, np.concatenate([sample.supervised[:keep], sample.supervised[end:]]), sample.label)
