"""From the prepared data set to batches: a step's documents, how they are dealt to ranks, how they lie in memory.

Every rank computes the whole step's global batch from the same order, so totals need no communication. The tensors of
the next steps are made by one background thread.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from trainer.data.batches.collate import collate, each_tensor, fillers, to_device
from trainer.data.batches.order import Order, deal
from trainer.data.config import Layout
from trainer.data.rated import mismatched
from trainer.data.store.sequences import Sample, TokenDataset
from trainer.data.two_sides import deal_two_sides


@dataclass(slots=True)
class StepBatch:
    """What one rank trains on in one optimizer step, and the sums over the whole global batch."""

    micro_batches: list[dict[str, Any]]
    totals: dict[str, int]
    """For each term of the objective, its count over the global batch, all ranks together."""
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
    ahead: list[dict[str, Any]] = field(default_factory=list)
    """Micro-batches of prompts with the answers of others, looked at before the first backward pass; mostly none."""
    balance: float = 1.0
    """Mean over the ranks' tokens as a share of the busiest rank's, micro-batch by micro-batch; 1 where none waits."""


class StepLoader:
    """Batches of one rank. `global_batch` and `micro_batch` count units.

    A unit is a document; or, where `units` is given, the sequences that stay together: a pack, or a pair of answers.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        order: Order,
        units: list[list[int]] | None,
        global_batch: int,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
        layout: Layout,
        pad_token_id: int,
        device: torch.device | str,
        prefetch: int = 2,
        decoder_start: int | None = None,
        looks_ahead: bool = False,
    ) -> None:
        assert global_batch % (micro_batch * dp_size) == 0, "the config layer reports a batch that does not divide"
        assert order.population == (len(dataset) if units is None else len(units)), "order and units differ in number"
        assert layout is not Layout.auto, "the layout is resolved before the loader is built"
        self.dataset = dataset
        self.order = order
        self.units = units
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.accumulation = global_batch // (micro_batch * dp_size)
        self.layout = layout
        self.pad_token_id = pad_token_id
        self.device = torch.device(device)
        self.prefetch = prefetch
        self.decoder_start = decoder_start
        """First token of the decoder, for encoder-decoder models."""
        self.looks_ahead = looks_ahead
        """Whether each step also gets its prompts with the answers of others."""
        self.unit_tokens: np.ndarray = (
            dataset.lengths if units is None else np.array([dataset.lengths[unit].sum() for unit in units], np.int64)
        )

    def plan(self, first_sample: int) -> list[list[list[int]]]:
        """Documents of the step that begins at `first_sample`, as [rank][micro-batch][document]; no tensors are made.

        The slots come sorted by load, so that the ranks' m-th micro-batches weigh about the same and none waits long.
        """
        chosen = self.order.units(first_sample, self.global_batch)
        num_slots = self.global_batch // self.micro_batch
        if self.decoder_start is None:
            slots = deal(self.unit_tokens[chosen], num_slots, self.micro_batch)
        else:
            slots = deal_two_sides(self.dataset, chosen, num_slots, self.micro_batch)
        filled = [[doc for position in slot for doc in self._documents(int(chosen[position]))] for slot in slots]
        return [[filled[m * self.dp_size + r] for m in range(self.accumulation)] for r in range(self.dp_size)]

    def _documents(self, unit: int) -> list[int]:
        return [unit] if self.units is None else self.units[unit]

    def steps(self, first_sample: int, num_steps: int) -> Iterator[StepBatch]:
        """Batches of `num_steps` steps; `first_sample` is the number of samples consumed before the first one.

        Close the iterator (or exhaust it) to stop its thread. Errors of the thread are raised here.
        """
        ready: queue.Queue[StepBatch | BaseException] = queue.Queue(maxsize=self.prefetch)
        stop = threading.Event()

        def produce() -> None:
            for step in range(num_steps):
                item: StepBatch | BaseException
                try:
                    item = self._step(first_sample + step * self.global_batch)
                except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
                    item = error
                while not stop.is_set():
                    try:
                        ready.put(item, timeout=0.1)
                        break
                    except queue.Full:
                        continue
                if stop.is_set() or isinstance(item, BaseException):
                    return

        thread = threading.Thread(target=produce, name="step-loader", daemon=True)
        thread.start()
        try:
            for _ in range(num_steps):
                began = time.perf_counter()
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                item.micro_batches = [to_device(batch, self.device) for batch in item.micro_batches]
                item.ahead = [to_device(batch, self.device) for batch in item.ahead]
                item.wait_s = time.perf_counter() - began
                yield item
        finally:
            stop.set()
            thread.join()

    def _step(self, first_sample: int) -> StepBatch:
        plan = self.plan(first_sample)
        everyone = np.array([doc for rank in plan for slot in rank for doc in slot], dtype=np.int64)
        mine = [doc for slot in plan[self.dp_rank] for doc in slot]
        totals = {term: int(counts[everyone].sum()) for term, counts in self.dataset.counts.items()}
        batches = [
            {**self._collated([self.dataset.sample(doc) for doc in slot]), "totals": totals}
            for slot in plan[self.dp_rank]
        ]
        ahead = [
            {**self._collated([mismatched(self.dataset, doc) for doc in slot]), "mismatched": True}
            for slot in plan[self.dp_rank]
            if self.looks_ahead
        ]
        return StepBatch(
            micro_batches=batches,
            ahead=ahead,
            totals=totals,
            tokens=int(self.dataset.lengths[everyone].sum()),
            local_tokens=int(self.dataset.lengths[mine].sum()),
            supervised_tokens=int(self.dataset.num_supervised[everyone].sum()),
            samples=self.global_batch,
            balance=self._balance(plan),
        )

    def _collated(self, samples: list[Sample]) -> dict[str, Any]:
        batch = collate(samples, self.layout, self.pad_token_id, self.decoder_start)
        return each_tensor(batch, torch.Tensor.pin_memory) if self.device.type == "cuda" else batch

    def _balance(self, plan: list[list[list[int]]]) -> float:
        """The share of all ranks' time that is work, if time goes with tokens and every micro-batch waits for all."""
        tokens = np.array([[self.dataset.lengths[slot].sum() for slot in rank] for rank in plan])
        return float(tokens.mean(axis=0).sum() / tokens.max(axis=0).sum())


def eval_plan(
    dataset: TokenDataset,
    *,
    batch: int,
    dp_rank: int,
    dp_size: int,
    max_documents: int | None = None,
    sequences_per_document: int = 1,
) -> Iterator[list[int]]:
    """Sequences of each of this rank's micro-batches, as `eval_batches` says; none where the rank has run out."""
    per = sequences_per_document
    num = len(dataset) // per if max_documents is None else min(max_documents, len(dataset) // per)
    by_length = np.argsort(-dataset.lengths[: num * per].reshape(num, per).sum(axis=1), kind="stable")
    batches = [by_length[start : start + batch].tolist() for start in range(0, num, batch)]
    for turn in range(-(-len(batches) // dp_size)):
        number = turn * dp_size + dp_rank
        documents = batches[number] if number < len(batches) else []
        yield [document * per + place for document in documents for place in range(per)]


def eval_batches(
    dataset: TokenDataset,
    *,
    batch: int,
    dp_rank: int,
    dp_size: int,
    layout: Layout,
    pad_token_id: int,
    device: torch.device | str,
    max_documents: int | None,
    sequences_per_document: int = 1,
    decoder_start: int | None = None,
    ahead: bool = False,
) -> Iterator[dict[str, Any]]:
    """This rank's part of the first `max_documents` documents: over all ranks every document exactly once.

    Every rank gets the same number of micro-batches; one that runs out gets document 0 with nothing to score (targets
    and labels -100). Documents are sorted by length, so that ranks work alike; a sum over them does not depend on it.
    With `ahead`, the same prompts with the answers of others.
    """
    limit = len(dataset) if max_documents is None else max_documents * sequences_per_document
    totals = {term: int(counts[:limit].sum()) for term, counts in dataset.counts.items()}
    plan = eval_plan(
        dataset,
        batch=batch,
        dp_rank=dp_rank,
        dp_size=dp_size,
        max_documents=max_documents,
        sequences_per_document=sequences_per_document,
    )
    for sequences in plan:
        if ahead and sequences:
            samples = [mismatched(dataset, number) for number in sequences]
        else:
            samples = [dataset.sample(number) for number in sequences] or fillers(dataset, sequences_per_document)
        made = {**collate(samples, layout, pad_token_id, decoder_start), "totals": totals}
        yield to_device({**made, "mismatched": True} if ahead else made, torch.device(device))
