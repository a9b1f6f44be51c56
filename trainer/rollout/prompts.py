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
        self._has_sources = has_sources(dataset)

    def read(self, first_sample: int, count: int) -> list[Prompt]:
        """The next `count` prompts of a run that has consumed `first_sample` prompts."""
        units = self.order.units(first_sample, count).tolist()
        return [self.prompt(unit, first_sample + number) for number, unit in enumerate(units)]

    def prompt(self, sequence: int, prompt_number: int) -> Prompt:
        """Sequence `sequence` of the data set as number `prompt_number` of the run."""
        return read_prompt(self.dataset, self.table, sequence, prompt_number, names_source=self._has_sources)


def has_sources(dataset: TokenDataset) -> bool:
    """Whether the sequences of a data set come from several sources."""
    return len(set(dataset.sources.tolist())) > 1


def read_prompt(
    dataset: TokenDataset, table: DocumentTable, sequence_index: int, prompt_number: int, *, names_source: bool
) -> Prompt:
    """Read one sequence of a data set as a prompt, with the columns of its row that rewards read.

    `table`: the documents that the sequences were made of.
    `sequence_index`: of the sequence in the data set.
    `prompt_number`: the prompt's number among all that the run consumes.
    `names_source`: whether the prompt has the name of its source, because metrics are reported by source.
    """
    document = table.document(int(dataset.documents[sequence_index]))
    return Prompt(
        prompt_number=prompt_number,
        ids=dataset.sample(sequence_index).input_ids.tolist(),
        text=prompt_of_document(document),
        columns=document.columns or {},
        origin=document.location,
        source=dataset.source_names[int(dataset.sources[sequence_index])] if names_source else "",
    )


def prompt_of_document(document: Document) -> str | list[dict[str, Any]]:
    """The prompt of a document as rewards see it: a text, or the messages of a conversation.

    - A conversation: its messages without the assistant's at the end, and without the keys that say how a turn is trained on.
    - Else: its prompt, or its text.
    """
    if document.messages is None:
        return document.prompt or document.text or ""
    turns = document.messages
    while turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    return [_without_training_keys(turn) for turn in turns]


def _without_training_keys(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn without the keys that say how it is trained on."""
    return {name: value for name, value in turn.items() if name not in ("train", "weight")}
