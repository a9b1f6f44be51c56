"""Reads the prompts of a round: tokens from the prepared data, text and columns from the documents beside it."""

from __future__ import annotations

from typing import Any

from trainer.data.batches.order import Order
from trainer.data.document import Document
from trainer.data.store.documents import DocumentTable
from trainer.data.store.sequences import TokenDataset
from trainer.rollout.types import Prompt


class PromptReader:
    """The prompts of a data set, in the order in which a run consumes them."""

    def __init__(self, dataset: TokenDataset, table: DocumentTable, order: Order) -> None:
        """`table`: the documents that the sequences of `dataset` were made of."""
        self.dataset = dataset
        self.table = table
        self.order = order
        self._has_sources = len(set(dataset.sources.tolist())) > 1

    def read(self, first_sample: int, count: int) -> list[Prompt]:
        """The prompts that are consumed as number `first_sample` up to `first_sample + count`."""
        units = self.order.units(first_sample, count).tolist()
        return [self.prompt(unit, first_sample + number) for number, unit in enumerate(units)]

    def prompt(self, sequence: int, place: int) -> Prompt:
        """Sequence `sequence` of the data set as prompt number `place` of the run."""
        document = self.table.document(int(self.dataset.documents[sequence]))
        source = ""
        if self._has_sources:
            source = self.dataset.source_names[int(self.dataset.sources[sequence])]
        return Prompt(
            place=place,
            ids=self.dataset.sample(sequence).input_ids.tolist(),
            text=text_of(document),
            columns=document.columns or {},
            origin=document.location,
            source=source,
        )


def text_of(document: Document) -> str | list[dict[str, Any]]:
    """The prompt of a document as rewards see it: messages up to the last answer, where it is a conversation, else a text."""
    if document.messages is None:
        return document.prompt or document.text or ""
    turns = document.messages
    while turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    return [{name: part for name, part in turn.items() if name not in ("train", "weight")} for turn in turns]
