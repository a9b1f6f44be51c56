"""Makes batches from the prepared data set: a step's documents, dealt to ranks and laid out in memory.

Every rank computes the whole step's global batch from the same order, so totals need no communication. One background
thread makes the tensors of the next steps.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.data.batches.collate import Collator, to_device
from trainer.data.batches.cutting import RowCut
from trainer.data.batches.order import Order
from trainer.data.batches.prefetch import pin_batch, prefetch
from trainer.data.store.sequences import Sample, TokenDataset, concatenated_ranges, exact_sum


@dataclass(slots=True)
class StepBatch:
    """The micro-batches of one rank for one optimizer step, with sums over the global batch of all ranks."""

    micro_batches: list[dict[str, Any]]
    totals: dict[str, float]
    """For each term of the objective, its count over the global batch, all ranks together; a sum of weights where the data
    has some."""
    tokens: int
    """Tokens of the global batch."""
    local_tokens: int
    """Tokens of this rank's part."""
    supervised_tokens: int
    """Targets of the global batch."""
    samples: int
    """Documents (packs) of the global batch."""
    wait_s: float = 0.0
    """Seconds the trainer waited for this batch."""
    look_ahead_batches: list[dict[str, Any]] = field(default_factory=list)
    """Micro-batches of an extra forward pass before the first backward pass, such as KTO's mismatched answers; mostly none."""
    source_tokens: dict[str, int] = field(default_factory=dict)
    """Tokens of the global batch by source, where the training data has several."""
    source_counts: dict[str, float] = field(default_factory=dict)
    """The count of `loss` by source, likewise."""
    facts: dict[str, float] = field(default_factory=dict)
    """Further metrics of the step for its row, the same on all ranks."""
    round_step: int = 0
    """Steps taken of the round after this one, if batches are rounds; 0 after its last step, and where there are none."""
    round_s: float = 0.0
    """Seconds of this rank in which the batch was made between two steps, as a round is, and not beside them."""
    parallel_efficiency: float = 1.0
    """Mean over the ranks' tokens (costs, of long documents) as a share of the busiest rank's, micro-batch by micro-batch; 1
    where none waits."""


@dataclass(frozen=True, slots=True)
class BatchShare:
    """How a global batch is divided among data-parallel ranks and micro-batches.

    `global_batch` and `micro_batch` count units: documents, packs, or pairs of answers.
    """

    global_batch: int
    micro_batch: int
    dp_rank: int
    """Index of this rank among those that read documents of their own; the same for ranks that share their rows."""
    dp_size: int
    cut: RowCut | None = None
    """Which slice of its rows this rank takes; None if it takes them whole."""

    @property
    def accumulation(self) -> int:
        """How many micro-batches each data-parallel rank computes in a step: batch 16 in micro-batches of 2 on 4 ranks -> 2."""
        assert self.global_batch % (self.micro_batch * self.dp_size) == 0, (
            "the config layer reports what does not divide"
        )
        return self.global_batch // (self.micro_batch * self.dp_size)


class StepLoader:
    """Makes the batches of one rank, step by step, from a prepared data set. Each is this rank's part of a global batch.

    A unit is drawn as a whole: a document, or sequences that stay together. A slot is a place for one micro-batch of one rank:
    slot m * dp_size + r holds the m-th micro-batch of data-parallel rank r.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        order: Order,
        units: list[list[int]] | None,
        share: BatchShare,
        collator: Collator,
        device: torch.device | str,
        look_ahead_sample: Callable[[TokenDataset, int], Sample] | None = None,
    ) -> None:
        """Set up the loader of one rank of a training run, which makes batches step by step.

        `order`: in which order units are drawn, epoch by epoch.
        `units`: of each unit, the numbers of its sequences, such as those of a pack or of a pair of answers; None if each
        sequence is one.
        `share`: how a global batch is divided among ranks and micro-batches.
        `collator`: makes the tensors of a micro-batch.
        `look_ahead_sample`: gives for each sequence another one, which a forward pass looks at before the step's first backward
        pass.
        """
        assert order.population == (len(dataset) if units is None else len(units)), "order and units differ in number"
        self.dataset = dataset
        self.order = order
        self.units = units
        self.share = share
        self.accumulation = share.accumulation
        self.collator = collator
        self.look_ahead_sample = look_ahead_sample
        self.device = torch.device(device)
        self.source_name_by_number = source_name_by_number(dataset)
        self.unit_tokens: np.ndarray = dataset.lengths
        """int64 [units]."""
        # The sequences of all units in one row, and where each unit begins in it: so a global batch is counted by arrays.
        sizes: list[int] = []
        sequences: list[int] = []
        if units is not None:
            self.unit_tokens = np.array([dataset.lengths[unit].sum() for unit in units], np.int64)
            sizes = [len(unit) for unit in units]
            sequences = list(itertools.chain.from_iterable(units))
        self._unit_begins = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._unit_sequences = np.array(sequences, dtype=np.int64)
        # The cost decides which rank gets which unit, see `_units_by_slot`.
        self._unit_costs = self.unit_tokens

    @property
    def samples_per_step(self) -> float:
        """Documents (packs) that a step consumes."""
        return self.share.global_batch

    def balance_by_attention_cost(self, tokens_per_square: int) -> None:
        """From now on, balance the ranks of every step by what documents cost with attention, not by their tokens alone.

        Attention costs the square of a document's length. A document of n tokens then costs n + n^2 / `tokens_per_square`, and a
        unit (a pack, a pair of answers) the sum of its documents. The samples of a step stay the same; which rank gets which of
        them may change.
        """
        attention_costs = self.dataset.lengths.astype(np.int64) ** 2 // tokens_per_square
        if self.units is not None:
            attention_costs = np.array([attention_costs[unit].sum() for unit in self.units], np.int64)
        self._unit_costs = self.unit_tokens + attention_costs

    def plan(self, first_sample: int) -> list[list[list[int]]]:
        """Say which sequences each rank gets in one step, without making tensors: numbers as [dp_rank][micro-batch][sequence].

        The step begins after `first_sample` consumed samples. On two ranks with one micro-batch of two sequences each: [[[3, 0]],
        [[1, 2]]].
        """
        units_by_slot = self._units_by_slot(first_sample)
        return [self._micro_batches_of_rank(units_by_slot, dp_rank) for dp_rank in range(self.share.dp_size)]

    def documents(self, first_sample: int) -> list[int]:
        """Say which documents a step has, all ranks together: rows of `documents.arrow`, ascending.

        The step begins after `first_sample` consumed samples.
        """
        sequences = self._sequences_of_units(self.order.units(first_sample, self.share.global_batch))
        return [int(row) for row in np.unique(self.dataset.documents[sequences])]

    def _units_by_slot(self, first_sample: int) -> np.ndarray:
        """Spread the units of a step's global batch over the micro-batches of all ranks (slots): int64 [slots, units of a slot].

        A unit is a document, or what stays together: a pack, a pair of answers. Slot m * dp_size + r is the m-th micro-batch of
        data-parallel rank r. The slots come sorted by cost, so that the ranks' m-th micro-batches cost about the same and none
        waits long.
        """
        units = self.order.units(first_sample, self.share.global_batch)
        units_per_slot = self.share.micro_batch
        num_slots = self.share.global_batch // units_per_slot
        # By slot, indices into `units`.
        positions_by_slot = self.collator.assign_to_slots(
            self.dataset, units, self._unit_costs[units], shape=(num_slots, units_per_slot)
        )
        return units[np.array(positions_by_slot, dtype=np.int64)]

    def _micro_batches_of_rank(self, units_by_slot: np.ndarray, dp_rank: int) -> list[list[int]]:
        """The sequence numbers of each micro-batch of one data-parallel rank. `units_by_slot`: see `_units_by_slot`."""
        # Slot m * dp_size + r is the m-th micro-batch of rank r.
        units_by_micro_batch = units_by_slot[dp_rank :: self.share.dp_size]
        return [self._sequences_of_units(units).tolist() for units in units_by_micro_batch]

    def _sequences_of_units(self, units: np.ndarray) -> np.ndarray:
        """The sequence numbers of `units` (int64 [U]: packs, pairs or single sequences), one unit after another: int64."""
        if self.units is None:  # each unit is one sequence, of the same number
            return units
        begins = self._unit_begins[units]
        return self._unit_sequences[concatenated_ranges(begins, self._unit_begins[units + 1] - begins)]

    def attachments(self) -> dict[str, bytes]:
        """Files that a checkpoint needs beside the state: none, since the order depends on the samples consumed alone."""
        return {}

    def restore(self, checkpoint: Path) -> None:
        """Does nothing: the order of the data has no state but the samples consumed, see `attachments`."""

    def check_generated_answers(self, rows: list[dict[str, Any]]) -> None:
        """Does nothing: the data has what is learned, so that the rows of metrics say nothing about it."""

    def steps(self, first_sample: int, num_steps: int) -> Generator[StepBatch, None, None]:
        """Yield the batches of `num_steps` steps, on the device. A background thread makes the next ones meanwhile.

        `first_sample`: how many samples the run has consumed before the first of them. Close the iterator (or exhaust it) to stop
        its thread. Errors of the thread are raised here.
        """
        batches = (self._make_step_batch(first_sample + step * self.share.global_batch) for step in range(num_steps))
        with closing(prefetch(batches)) as prefetched:
            for _ in range(num_steps):
                started_at = time.perf_counter()
                step_batch = next(prefetched)
                step_batch.micro_batches = [to_device(batch, self.device) for batch in step_batch.micro_batches]
                step_batch.look_ahead_batches = [
                    to_device(batch, self.device) for batch in step_batch.look_ahead_batches
                ]
                step_batch.wait_s = time.perf_counter() - started_at
                yield step_batch

    def _make_step_batch(self, first_sample: int) -> StepBatch:
        """Make this rank's batch of the step that begins after `first_sample` consumed samples, still on the CPU.

        Runs in the background thread. Some objectives look at other samples before the first backward pass. For them
        `look_ahead_batches` has the same micro-batches with these samples instead, each with "is_look_ahead": True.
        """
        dataset = self.dataset
        # Which sequences the step has: those of this rank by micro-batch, and those of all ranks.
        units_by_slot = self._units_by_slot(first_sample)  # units are documents, packs or pairs
        own_micro_batches = self._micro_batches_of_rank(units_by_slot, self.share.dp_rank)
        global_sequences = self._sequences_of_units(units_by_slot.ravel())
        # What the loss is divided by, for each of its terms: targets of the whole global batch. Every rank counts them from the
        # stored counts, so it is the same number everywhere without a collective.
        totals = {term: exact_sum(counts[global_sequences]) for term, counts in dataset.counts.items()}

        batches = []
        local_tokens = 0
        for sequences in own_micro_batches:
            samples = [dataset.sample(sequence) for sequence in sequences]
            batches.append({**self._collate(samples, sequences), "totals": totals})
            local_tokens += self._num_local_tokens(sequences)
        look_ahead_batches: list[dict[str, Any]] = []
        look_ahead_sample = self.look_ahead_sample
        if look_ahead_sample is not None:
            for sequences in own_micro_batches:
                samples = [look_ahead_sample(dataset, sequence) for sequence in sequences]
                look_ahead_batches.append({**self._collate(samples), "is_look_ahead": True})

        source_tokens = self._sum_by_source(dataset.lengths, global_sequences)
        return StepBatch(
            micro_batches=batches,
            look_ahead_batches=look_ahead_batches,
            totals=totals,
            tokens=int(dataset.lengths[global_sequences].sum()),
            local_tokens=local_tokens,
            supervised_tokens=int(dataset.num_supervised[global_sequences].sum()),
            samples=self.share.global_batch,
            source_tokens={name: int(tokens) for name, tokens in source_tokens.items()},
            source_counts=self._sum_by_source(dataset.counts["loss"], global_sequences),
            parallel_efficiency=self._parallel_efficiency(units_by_slot),
        )

    def _num_local_tokens(self, sequences: list[int]) -> int:
        """Count the tokens of a micro-batch that this rank computes.

        All of them; under sequence parallelism, where ranks share the rows, those of its slice (`cut`).
        """
        num_tokens = int(self.dataset.lengths[sequences].sum())
        cut = self.share.cut
        if cut is None:
            return num_tokens
        begin, end = cut.span(num_tokens)
        return end - begin

    def _sum_by_source(self, count_by_sequence: np.ndarray, sequences: np.ndarray) -> dict[str, float]:
        """Sum counts over the `sequences` of each source, to log by source: {"wiki": 812, ...}; empty for a single source.

        `count_by_sequence`: [N], one for each sequence of the data set. `sequences`: numbers of sequences.
        """
        if len(self.source_name_by_number) < 2:
            return {}
        batch_counts = count_by_sequence[sequences]
        batch_sources = self.dataset.sources[sequences]
        return {
            name: exact_sum(batch_counts[batch_sources == number])
            for number, name in self.source_name_by_number.items()
        }

    def _collate(self, samples: list[Sample], sequences: list[int] | None = None) -> dict[str, Any]:
        """Make a micro-batch of samples, in pinned memory if it goes to a GPU.

        `sequences`: the samples' numbers in the data set. If they are given and the data has several sources, the batch also has
        `source_names` and `row_source` (int64: of each supervised row, the index of its source in `source_names`), so that the
        loss can be logged by source. A supervised row is a position with a target.
        """
        batch = self.collator(samples, self.share.cut)  # with a cut, this rank's slice of the tokens
        if sequences is not None and len(self.source_name_by_number) > 1:
            source_numbers = np.array([*self.source_name_by_number])  # ascending
            source_index_by_sample = np.searchsorted(source_numbers, self.dataset.sources[sequences])
            # `row_sequence`: the index in `samples` of each supervised row that this rank has.
            batch["row_source"] = torch.from_numpy(source_index_by_sample)[batch["row_sequence"]]
            batch["source_names"] = [*self.source_name_by_number.values()]
        return pin_batch(batch, self.device)

    def _parallel_efficiency(self, units_by_slot: np.ndarray) -> float:
        """Estimate the share of all ranks' time in a step in which they work and do not wait, if time is proportional to cost.

        `units_by_slot` (int64 [slots, units of a slot]): the documents or packs of each micro-batch of each rank. The ranks wait
        for each other in every micro-batch. 1.0 if all ranks' micro-batches cost the same; 0.75 if one of two ranks has half the
        work of the other.
        """
        slot_costs = self._unit_costs[units_by_slot].sum(axis=1)
        # Slot m * dp_size + r is the m-th micro-batch of rank r: [micro-batches of a rank, ranks].
        costs = slot_costs.reshape(self.accumulation, self.share.dp_size)
        mean_costs = costs.mean(axis=1)
        highest_costs = costs.max(axis=1)
        return float(mean_costs.sum() / highest_costs.sum())


@dataclass(frozen=True, slots=True)
class EvalShare:
    """How a data set is divided for a pass without learning, such as evaluation: micro-batches, and this rank's part.

    If no ranks share rows, as in generation, `dp_rank` and `dp_size` are those of all ranks.
    """

    documents_per_micro_batch: int
    dp_rank: int
    dp_size: int
    max_documents: int | None = None
    """How many documents are covered, from the first on (of each source, if `by_source`); None for all."""
    sequences_per_document: int = 1
    by_source: bool = False
    """Whether a micro-batch holds documents of one source only."""
    cut: RowCut | None = None
    """Which slice of its rows this rank takes; None if it takes them whole."""

    def source_of_documents(self, dataset: TokenDataset) -> np.ndarray:
        """The source of each document, int64 [documents], by which micro-batches are separated if `by_source`.

        Without `by_source` 0 for all, as if there were one source.
        """
        per_document = self.sequences_per_document
        num_documents = len(dataset) // per_document
        source_of_sequence = dataset.sources if self.by_source else np.zeros(len(dataset), np.int64)
        return source_of_sequence[: num_documents * per_document : per_document]

    def covered_documents(self, dataset: TokenDataset) -> np.ndarray:
        """The documents that an evaluation covers, all ranks together: their numbers, ascending, int64.

        The first `max_documents` of each source if `by_source`, else of the data set.
        """
        source_of_document = self.source_of_documents(dataset)
        covered_by_source: list[np.ndarray] = []
        for source in np.unique(source_of_document):
            # `max_documents` bounds each source by itself.
            covered_by_source.append(np.flatnonzero(source_of_document == source)[: self.max_documents])
        if not covered_by_source:
            return np.zeros(0, np.int64)
        return np.sort(np.concatenate(covered_by_source))

    def covered_sequences(self, dataset: TokenDataset) -> np.ndarray:
        """The sequences of the documents that an evaluation covers, int64: of documents 0 and 2 with two each [0, 1, 4, 5]."""
        per_document = self.sequences_per_document
        first_sequences = self.covered_documents(dataset) * per_document
        return (first_sequences[:, None] + np.arange(per_document)).ravel()


def source_name_by_number(dataset: TokenDataset) -> dict[int, str]:
    """Names of the sources from which a data set has sequences, by their number, ascending: {0: "wiki", 2: "code"}."""
    return {number: dataset.source_names[number] for number in np.unique(dataset.sources).tolist()}


def eval_micro_batches(dataset: TokenDataset, share: EvalShare) -> Iterator[list[int]]:
    """Divide an evaluation among ranks: the sequence numbers of each micro-batch of this rank.

    All ranks get the same number of micro-batches, because each is a collective forward pass. Micro-batch i goes to data-parallel
    rank i modulo `share.dp_size`; a rank that has run out gets empty lists. A document has `share.sequences_per_document`
    sequences (2 for a pair of answers), which stay together.
    """
    per_document = share.sequences_per_document
    documents_by_batch = _documents_by_eval_batch(dataset, share)
    num_batches_of_rank = math.ceil(len(documents_by_batch) / share.dp_size)
    for index in range(num_batches_of_rank):
        batch_number = index * share.dp_size + share.dp_rank
        documents = documents_by_batch[batch_number] if batch_number < len(documents_by_batch) else []
        sequences: list[int] = []
        for document in documents:
            first_sequence = document * per_document
            sequences += range(first_sequence, first_sequence + per_document)
        yield sequences


def _documents_by_eval_batch(dataset: TokenDataset, share: EvalShare) -> list[list[int]]:
    """Group the documents of an evaluation into micro-batches, all ranks together: the document numbers of each.

    A micro-batch has `share.documents_per_micro_batch` documents, with `share.by_source` of one source only. Within a source, the
    longest documents come first, so that those of a micro-batch have similar lengths.
    """
    documents = share.covered_documents(dataset)
    source_of_document = share.source_of_documents(dataset)
    sequence_lengths = dataset.lengths[share.covered_sequences(dataset)]
    tokens = sequence_lengths.reshape(-1, share.sequences_per_document).sum(axis=1)
    # By source, then by falling length: lexsort takes its last key first.
    documents = documents[np.lexsort((-tokens, source_of_document[documents]))]
    source_begins = np.flatnonzero(np.diff(source_of_document[documents])) + 1
    documents_by_batch: list[list[int]] = []
    for documents_of_source in np.split(documents, source_begins):
        for start in range(0, len(documents_of_source), share.documents_per_micro_batch):
            documents_by_batch.append(documents_of_source[start : start + share.documents_per_micro_batch].tolist())
    return documents_by_batch


def eval_batches(
    dataset: TokenDataset,
    share: EvalShare,
    collator: Collator,
    device: torch.device | str,
    look_ahead_sample: Callable[[TokenDataset, int], Sample] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield this rank's micro-batches of an evaluation, on the device. Over all ranks every document comes exactly once.

    A background thread makes the batches, as in training. Every rank gets the same number of micro-batches; a rank that has run
    out gets document 0 with nothing to score (targets and labels -100). Beside what the collator makes, a batch has:
    - `totals`: what the loss is divided by, by its terms: counts over all ranks' sequences;
    - `source`, with `share.by_source`: the number of its source;
    - `is_look_ahead`, with `look_ahead_sample`, which gives for each sequence another sample that takes its place.
    """
    device = torch.device(device)
    covered_sequences = share.covered_sequences(dataset)
    # The same on all ranks, without communication: counted over all documents that are covered.
    further_entries: dict[str, Any] = {
        "totals": {term: exact_sum(counts[covered_sequences]) for term, counts in dataset.counts.items()}
    }
    if look_ahead_sample is not None:
        further_entries["is_look_ahead"] = True
    # By default, the sequence itself.
    get_sample = look_ahead_sample or TokenDataset.sample
    batches_on_cpu = (
        pin_batch({**_collate_eval_batch(dataset, share, collator, sequences, get_sample), **further_entries}, device)
        for sequences in eval_micro_batches(dataset, share)
    )
    with closing(prefetch(batches_on_cpu)) as prefetched:
        for batch in prefetched:
            yield to_device(batch, device)


def _collate_eval_batch(
    dataset: TokenDataset,
    share: EvalShare,
    collator: Collator,
    sequences: list[int],
    get_sample: Callable[[TokenDataset, int], Sample],
) -> dict[str, Any]:
    """Make a micro-batch of the sequences of these numbers; of none, as on a rank that has run out, with nothing to score.

    `get_sample`: gives the sample of a sequence number, or another one that takes its place.
    """
    samples = [get_sample(dataset, sequence) for sequence in sequences]
    if not samples:
        samples = collator.filler_samples(dataset, share.sequences_per_document)
    batch = collator(samples, share.cut)
    if share.by_source:
        batch["source"] = int(dataset.sources[sequences[0] if sequences else 0])
    return batch
