"""Loss, perplexity, bits per byte and token accuracy on evaluation documents, by source."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer.evaluation.tasks.base import Case, Metric, Task, TaskRow

if TYPE_CHECKING:
    from trainer.data.store.sequences import TokenDataset
    from trainer.evaluation.tasks.model_interface import ModelInterface


class HeldOut(Task):
    """Scores documents as prepared for training: the same tokens are targets, and count the same."""

    reads = "any format that the objective learns from"
    works_with_server = False

    def __init__(self, name: str, config: object) -> None:
        super().__init__(name, config)  # type: ignore[arg-type]
        self.dataset: TokenDataset | None = None
        """Its documents as tokens, once they are prepared."""

    def read(self, case: Case) -> None:
        """Documents are read where they are prepared."""

    def run(self, cases: Sequence[Case], model: ModelInterface) -> list[TaskRow]:
        data, tokenizer = self.dataset, model.writer.tokenizer
        assert data is not None
        terms = model.sequence_losses(data, self.config.max_rows)
        rows = []
        for number in sorted(terms):
            loss, right = terms[number]
            sample = data.sample(number)
            learned = sample.input_ids[1:][sample.supervised[1:]].tolist()
            text = tokenizer.decode(learned, skip_special_tokens=True)
            scores = {
                "nats": loss,
                "targets": float(data.counts["loss"][number]),
                "right": right,
                "bytes": float(len(text.encode())),
            }
            source = data.source_names[int(data.sources[number])]
            where = cases[number].where if number < len(cases) else f"row {number}"
            told = model.shown_prompt(sample.input_ids[: sample.answer_begin()].tolist())
            rows.append(TaskRow(where, told, "", text[:2000], scores, source))
        return rows

    def compute_metrics(self, rows: Sequence[TaskRow]) -> dict[str, float]:
        return self.metrics_by_source(rows)


class Loss(HeldOut):
    """Mean loss of the targets, and its exponential."""

    kind = "loss"
    metrics = (
        Metric("loss", "mean loss of a target, nats", greater_is_better=False, ratio=("nats", "targets")),
        Metric(
            "perplexity",
            "exponential of the loss",
            greater_is_better=False,
            ratio=("nats", "targets"),
            exponential=True,
        ),
    )


class BitsPerByte(HeldOut):
    """The loss in bits over the bytes of the learned text: comparable between tokenizers."""

    kind = "bits_per_byte"
    metrics = (Metric("bits_per_byte", "bits of loss a UTF-8 byte of the text", False, ratio=("bits", "bytes")),)

    def run(self, cases: Sequence[Case], model: ModelInterface) -> list[TaskRow]:
        rows = super().run(cases, model)
        for row in rows:
            row.scores = {"bits": row.scores["nats"] / math.log(2), **row.scores}
        return rows


class TokenAccuracy(HeldOut):
    """Targets that are the likeliest token."""

    kind = "token_accuracy"
    metrics = (Metric("token_accuracy", "share of targets that the model holds likeliest", ratio=("right", "targets")),)

    def run(self, cases: Sequence[Case], model: ModelInterface) -> list[TaskRow]:
        rows = super().run(cases, model)
        for row in rows:
            row.scores = {"right": row.scores["right"], **row.scores}
        return rows
