"""Answers that the model has written, as sequences to learn from, and the prompts that they were written to.

The contract between a round (`trainer/rollout`) and a loss over its answers (`trainer/objectives/policy.py`): a sequence is a
prompt with one answer, of which the answer is supervised, its end token included. `PER_TOKEN_ENTRIES` are numbers for each
learned token. A step's counts, in `batch["totals"]`, are `loss` (what the loop divides all terms by), `tokens` (learned tokens)
and `answers` (learned answers) of all ranks together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from strategies.errors import DataError
from trainer.data.batches.collate import Collator
from trainer.data.batches.cutting import AXES, IGNORED_TARGET, Axis
from trainer.data.config import DataConfig, DataFormat, Layout, OverLength
from trainer.data.document import WRONG_KIND_REASON, Document, Tally
from trainer.data.fields import KeptColumns
from trainer.data.store.sequences import Sample
from trainer.data.tokens.encode import Encoder
from trainer.objectives.base import UnlabelledDataSpec

ADVANTAGES = "advantages"
"""How much better the answer of a row is than what it is compared with."""
LOSS_WEIGHTS = "loss_weights"
"""What a row counts for in the loss (`objective.normalise`); the weights of a step are for the count `totals["loss"]`."""
SAMPLING_LOGPS = "writer_logps"
"""Log-probability of a row's token when it was written."""
OLD_LOGPS = "old_logps"
"""Log-probability before the first update of the round. Absent where a round is one step: it is that of now."""
REFERENCE_LOGPS = "reference_logps_by_token"
"""Log-probability under the reference model. Absent without a reference."""
PER_TOKEN_ENTRIES = (ADVANTAGES, LOSS_WEIGHTS, SAMPLING_LOGPS, OLD_LOGPS, REFERENCE_LOGPS)
"""Entries of a batch with a float32 for each learned token."""
ANSWER_LENGTHS = "answer_lengths"
"""float32 [sequences]: learned tokens of each answer; 0 for a sequence that fills up a micro-batch."""
ANSWER_COUNTS = ("loss", "tokens", "answers")
"""Names of a step's counts."""


@dataclass(slots=True)
class AnswerSample(Sample):
    """A prompt with one answer."""

    prompt_index: int = 0
    """Number of the prompt in its round: samples of one prompt may share it."""
    per_token_entries: dict[str, np.ndarray] = field(default_factory=dict)
    """float32 [learned tokens] each, by names of `PER_TOKEN_ENTRIES`; every sample of a step has the same names."""


class AnswerCollator(Collator):
    """Adds `PER_TOKEN_ENTRIES`, as far as the samples have them, and `ANSWER_LENGTHS`."""

    axes = AXES | dict.fromkeys(PER_TOKEN_ENTRIES, Axis.supervised_row) | {ANSWER_LENGTHS: Axis.sequence}

    def add_loss_inputs(self, batch: dict[str, Any], samples: Sequence[Sample]) -> None:
        """Add to `batch` what the policy loss needs beside tokens: each answer's length, and numbers for each learned token.

        The numbers (`PER_TOKEN_ENTRIES`) are advantages, loss weights and log-probabilities; zeros if a sequence is no answer (as
        in a plan), and empty if nothing is learned.
        """
        # Without the first token, which no other predicts.
        lengths = [float(np.count_nonzero(sample.supervised[1:])) for sample in samples]
        batch[ANSWER_LENGTHS] = torch.tensor(lengths, dtype=torch.float32)
        answers = [sample for sample in samples if isinstance(sample, AnswerSample)]
        num_rows = int(sum(lengths))
        if len(answers) < len(samples) or not num_rows:
            batch.update({name: torch.zeros(num_rows) for name in PER_TOKEN_ENTRIES})
            return
        for name in answers[0].per_token_entries:
            numbers = np.concatenate([answer.per_token_entries[name] for answer in answers])
            batch[name] = torch.from_numpy(numbers.astype(np.float32, copy=False))

    def collate_with_shared_prompts(self, samples: Sequence[AnswerSample]) -> dict[str, Any]:
        """Collate samples into one row that has each prompt once, followed by all its answers: `[prompt | answer | answer ...]`.

        So a prompt is computed once for all of its answers in the micro-batch. Samples of one prompt must be neighbours. Beside
        what a batch without padding has: `branches`, where the answers of each document begin, and `row_targets` (int64), the
        target of each supervised position, since the last position of a prompt has one for each answer.
        """
        row = _SharedPromptRow()
        for sample in samples:
            row.add_answer(sample)
        batch = row.to_batch(num_sequences=len(samples))
        self.add_loss_inputs(batch, samples)
        return batch

    def without_targets(self, sample: Sample) -> Sample:
        """The sample with nothing to learn, and so without numbers for learned tokens."""
        no_supervision = np.zeros_like(sample.supervised)
        if not isinstance(sample, AnswerSample):
            return Sample(sample.input_ids, no_supervision, sample.marks)
        empty_entries = {name: numbers[:0] for name, numbers in sample.per_token_entries.items()}
        return AnswerSample(sample.input_ids, no_supervision, sample.marks, per_token_entries=empty_entries)


class _SharedPromptRow:
    """A packed row in the making, `[prompt | answer | answer ... | prompt | ...]`. A prompt with its answers is a document."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.position_ids: list[int] = []
        self.document_begins: list[int] = []
        """Where each document begins in the row."""
        self.answer_begins: list[list[int]] = []
        """By document, where its answers begin, counted from the document's begin."""
        self.target_positions: list[int] = []
        """Positions of the row whose next token is learned."""
        self.target_ids: list[int] = []
        """The token that each of them predicts."""
        self.num_targets: list[int] = []
        """How many tokens are learned, by answer."""
        self.max_length = 0
        """Tokens of the longest prompt with one answer."""
        self._prompt_index: int | None = None
        self._prompt_length = 0

    def add_answer(self, sample: AnswerSample) -> None:
        """Append an answer to the row; its prompt comes first, unless the answer before has the same prompt and shares it.

        Positions of an answer continue those of its prompt, whatever answers lie between.
        """
        prompt_length = sample.answer_begin()
        answer_ids = sample.input_ids[prompt_length:].tolist()
        if sample.prompt_index != self._prompt_index:
            self._prompt_index = sample.prompt_index
            self._prompt_length = prompt_length
            self.document_begins.append(len(self.ids))
            self.answer_begins.append([])
            self.ids += sample.input_ids[:prompt_length].tolist()
            self.position_ids += range(prompt_length)
        assert prompt_length == self._prompt_length, "answers that share a prompt begin at the same place"
        document_begin = self.document_begins[-1]
        answer_begin = len(self.ids)
        answer_length = len(answer_ids)
        self.answer_begins[-1].append(answer_begin - document_begin)
        # The last token of the prompt predicts the first one of the answer, and each token of the answer the next one.
        last_of_prompt = document_begin + prompt_length - 1
        self.target_positions += [last_of_prompt, *range(answer_begin, answer_begin + answer_length - 1)]
        self.target_ids += answer_ids
        self.num_targets.append(answer_length)
        self.ids += answer_ids
        self.position_ids += range(prompt_length, prompt_length + answer_length)
        self.max_length = max(self.max_length, prompt_length + answer_length)

    def to_batch(self, num_sequences: int) -> dict[str, Any]:
        """The finished row as a micro-batch, as a model without padding takes it. `num_sequences`: answers in it.

        `cu_seq_lens_*`, `document_bounds`: where each document (a prompt with its answers) begins, and the end. `target_rows`:
        positions whose next token is learned, `row_targets`: these tokens, `row_sequence`: the answer of each.
        """
        bounds = [*self.document_begins, len(self.ids)]
        boundaries = torch.tensor(bounds, dtype=torch.int32)
        return {
            "input_ids": torch.tensor([self.ids]),
            "position_ids": torch.tensor([self.position_ids]),
            # A position may have several targets, so they are in `row_targets`.
            "targets": torch.full((1, len(self.ids)), IGNORED_TARGET),
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": self.max_length,
            "max_length_k": self.max_length,
            "document_bounds": bounds,
            "branches": self.answer_begins,
            "target_rows": torch.tensor(self.target_positions),
            "row_targets": torch.tensor(self.target_ids),
            "row_sequence": torch.from_numpy(np.repeat(np.arange(num_sequences), self.num_targets)),
            "num_sequences": num_sequences,
        }


class PromptDataSpec(UnlabelledDataSpec):
    """Prompts that the model answers: a sequence is a prompt with the template's generation prefix, nothing supervised.

    Of a row that ends in an answer, the prompt is what stands before it. A prompt is never cut: one of more than
    `data.max_length` tokens is dropped, or ends the run with `data.over_length=fail`.
    """

    formats = (DataFormat.prompt,)
    over_length = (OverLength.truncate, OverLength.drop, OverLength.fail)

    has_answers = False

    def __init__(self, kept: KeptColumns | None = None) -> None:
        """`kept`: the columns of a row that rewards read."""
        self.kept = kept or KeptColumns()

    def note(self, sample: Sample, label_names: list[str] | None) -> str:
        return "a prompt: the model writes its answers while it trains"

    def identity(self) -> dict[str, Any]:
        kept = self.kept or KeptColumns()
        # The names are part of fingerprints: with others, data that an earlier version prepared is not found again.
        return {"kept": {"required": kept.required, "optional": kept.optional, "all": kept.keeps_all}}

    def reason_to_reject(self, document: Document) -> tuple[str, str] | None:
        if document.chosen and document.rejected:
            return WRONG_KIND_REASON, "has two answers to compare, and this objective needs prompts; use objective=dpo"
        return super().reason_to_reject(document)

    def sequences(
        self, encoder: Encoder, documents: list[Document], config: DataConfig, tally: Tally
    ) -> Iterator[tuple[Document, list[Sample]]]:
        """Turn documents into prompts: yield (document, its samples), the prompt as one sample in which nothing is supervised.

        A prompt of more than `data.max_length` tokens has no sample, and `tally` counts it as dropped. With
        `data.over_length=fail` it raises DataError.
        """
        for document, ids in encoder.encode_prompts(documents):
            if len(ids) <= config.max_length:
                yield document, [Sample(ids, supervised=np.zeros(len(ids), dtype=bool))]
                continue
            if config.over_length is OverLength.fail:
                raise DataError(
                    f"{document.location}: the prompt has {len(ids)} tokens, more than data.max_length={config.max_length}; "
                    "raise data.max_length, or set data.over_length=drop"
                )
            tally.drop("tokenise", "too_long", document.location)
            yield document, []

    def counts(self, sample: Sample) -> dict[str, float]:
        """Each prompt counts once. The counts of a step are those of its answers, which a round makes."""
        return dict.fromkeys(ANSWER_COUNTS, 1)

    def check(self, train: Any) -> None:
        """Raise DataError if there is no prompt left."""
        if not len(train):
            raise DataError("data.path: no prompt is left; see what was dropped in the data report")

    def collator(self, layout: Layout, pad_token_id: int, decoder_start: int | None = None) -> Collator:
        return AnswerCollator(layout, pad_token_id)
