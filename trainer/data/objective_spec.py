"""What an objective decides about the data: the rows it takes, how a document becomes sequences, and their marks.

`DataSpec` is that of a next-token loss over documents, each a sequence of its own. An objective with other data
derives from it, in its own module. Preparation, loader and evaluation ask the object and know no objective by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.data.batches.collate import Collator
from trainer.data.config import DataConfig, DataFormat, Layout, OverLength
from trainer.data.document import Document, Tally
from trainer.data.fields import KeptColumns, parse_label
from trainer.data.selection.splits import DocumentColumns
from trainer.data.store.documents import DocumentTable
from trainer.data.store.sequences import Sample, TokenDataset
from trainer.data.tokens.encode import Encoder
from trainer.data.tokens.truncation import fit_length, keep_learnable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LookAheadSample = Callable[[TokenDataset, int], Sample]
"""Gives for a sequence (data set, index) another one, which a forward pass looks at before the step's first backward pass."""


class DataSpec:
    """How an objective uses data: the formats it takes, the sequences it makes of a document, and how they are collated.

    This base class is that of a next-token loss, with one sequence for each document. It is used in forked processes, so it holds
    settings only.
    """

    formats: tuple[DataFormat, ...] = ()
    """The formats that it can learn from, the one that is meant first; empty: whatever a row looks like."""
    sequences_per_document = 1
    """How many sequences of the prepared data make one document, one after another: 2 for pairs of answers."""
    over_length: tuple[OverLength, ...] = tuple(OverLength)
    """What it lets become of documents longer than `data.max_length`."""
    marks: dict[str, float] = {}  # noqa: RUF012 - never changed
    """Marks that every sequence carries while training, each with a value that it may have."""
    kept: KeptColumns | None = None
    """Columns of the rows that are kept with the documents, beside what is tokenised."""
    look_ahead_sample: LookAheadSample | None = None
    """What is looked at for each sequence before the first backward pass of a step, as KTO does with answers to other prompts;
    None: nothing."""

    has_answers = True
    """Whether the data has what is learned; False if the model writes it."""

    def identity(self) -> dict[str, Any]:
        """Settings of the objective that change prepared bytes, as JSON values. The fingerprint has its class anyway."""
        return {}

    # -- while data is prepared ------------------------------------------------------------------------------------

    def label(self, value: Any) -> str:
        """Turn the value of a row's label into one text, by which labels are numbered. Raises RowError."""
        return parse_label(value)

    def reason_to_reject(self, document: Document) -> tuple[str, str] | None:
        """Say why the objective cannot use a document, as (reason code, message); None if it can use it.

        Asked for each document that was read; one with a reason goes to quarantine. The reason is `WRONG_KIND_REASON` if the
        objective can use no document of this kind, whatever it says.
        """
        return None

    def encoder(self, tokenizer: PreTrainedTokenizerFast, config: DataConfig) -> Encoder:
        """The encoder that tokenises documents for this objective."""
        return Encoder(tokenizer, learn=config.learn, control_tokens=config.control_tokens)

    def sequences(
        self, encoder: Encoder, documents: list[Document], config: DataConfig, tally: Tally
    ) -> Iterator[tuple[Document, list[Sample]]]:
        """Make the training sequences of documents: (document, its sequences) of each that is a text to imitate.

        Called by workers while data is prepared. A document that is too long may become several sequences, as `data.over_length`
        says; one that is dropped has none. Every drop is counted in `tally`, with its reason. Answers that are marked as
        undesirable are dropped and do not appear.
        """
        imitable_documents = [document for document in documents if keep_unless_undesirable(document, tally)]
        for document, sample in encoder.encode(imitable_documents):
            pieces = fit_length(encoder, document, sample, config.max_length, config.over_length)
            yield document, keep_learnable(encoder, document, sample, pieces, tally)

    def counts(self, sample: Sample) -> dict[str, float]:
        """What a sequence adds to the denominator of each loss term: here {"loss": number or sum of weights of its targets}.

        Stored with the prepared data. A first token is no target, since nothing predicts it.
        """
        return {"loss": sample.total_target_weight()}

    def number_labels(
        self, columns: DocumentColumns, table: DocumentTable
    ) -> tuple[list[str] | None, np.ndarray | None]:
        """Decide the ids of labels: (label names in the order of their ids, id of each text in `columns.label_names`).

        (None, None) for an objective without labels. `table`: the documents, for error messages.
        """
        return None, None

    # -- when it is prepared ---------------------------------------------------------------------------------------

    def check(self, train: TokenDataset) -> None:
        """Raise DataError if the prepared training split has nothing to learn for this objective; by default, never."""

    def collator(self, layout: Layout, pad_token_id: int, decoder_start: int | None = None) -> Collator:
        """The collator that makes micro-batches. `decoder_start`: first token of the decoder, for encoder-decoder models."""
        return Collator(layout, pad_token_id)

    # -- without data ----------------------------------------------------------------------------------------------

    def longest_sequence(self, max_length: int) -> int:
        """Tokens of the longest sequence that `data.max_length` allows."""
        return max_length

    def placeholder(self, tokens: int) -> Sample:
        """A sequence of `tokens` tokens without meaning, each of them a target, with which the memory of a step is measured."""
        return Sample(np.zeros(tokens, np.int32), np.ones(tokens, dtype=bool), self.marks)

    # -- where sequences are shown ---------------------------------------------------------------------------------

    def headings(self) -> list[str]:
        """Headings over the sequences of a document where they are shown, one a sequence."""
        return [""] * self.sequences_per_document

    def note(self, sample: Sample, label_names: list[str] | None) -> str:
        """A note below a sequence where it is shown; empty for none."""
        return ""


def keep_unless_undesirable(document: Document, tally: Tally) -> bool:
    """Whether a document is a text to imitate: not if its answer is marked as undesirable (thumbs down).

    Counts such a document as a drop in `tally`.
    """
    if document.desirable is False:
        tally.drop("tokenise", "thumbs_down", document.location)
        return False
    return True
