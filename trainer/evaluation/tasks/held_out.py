"""Loss, perplexity, bits per byte and token accuracy on evaluation documents, by source."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer.evaluation.tasks.base import Case, Metric, Task, TaskRow

if TYPE_CHECKING:
    from trainer.data.store.sequences import TokenDataset
    from trainer.evaluation.tasks.model_interface import ModelInterface


SHOWN_TEXT = 2000
"""Most characters of a document that a report shows."""


class HeldOut(Task):
    """Computes losses of documents that are tokenised as for training: the same tokens are targets with the same weights."""

    reads = "rows in any format that the run's objective can train on, such as conversations"
    works_with_server = False

    def __init__(self, name: str, config: object) -> None:
        super().__init__(name, config)  # type: ignore[arg-type]
        self.dataset: TokenDataset | None = None
        """Its documents as tokens; set by `prepare_tasks`."""

    def parse_case(self, case: Case) -> None:
        """Nothing to do: `prepare_tasks` reads the documents."""

    def run(self, cases: Sequence[Case], model: ModelInterface) -> list[TaskRow]:
        """A row for each sequence, with the sums that the metrics divide. All ranks must call.

        The scores are the summed loss in nats, the number of targets, the number of them that were the model's likeliest token
        (`right`), and the UTF-8 bytes of the learned text.
        """
        dataset = self.dataset
        assert dataset is not None
        losses = model.sequence_losses(dataset, self.config.max_rows)
        rows = []
        for number in sorted(losses):
            loss, right = losses[number]
            sample = dataset.sample(number)

            is_target = sample.supervised[1:]  # the first token has nothing before it, and is never a target
            learned_ids = sample.input_ids[1:][is_target].tolist()
            learned_text = model.answer_generator.tokenizer.decode(learned_ids, skip_special_tokens=True)
            prompt_ids = sample.input_ids[: sample.answer_begin()].tolist()
            scores = {
                "nats": loss,
                "targets": float(dataset.counts["loss"][number]),
                "right": right,
                "bytes": float(len(learned_text.encode())),
            }
            source = dataset.source_names[int(dataset.sources[number])]
            location = cases[number].location if number < len(cases) else f"row {number}"
            prompt = model.shown_prompt(prompt_ids)
            rows.append(TaskRow(location, prompt, "", learned_text[:SHOWN_TEXT], scores, source))
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
    metrics = (
        Metric(
            "bits_per_byte", "bits of loss a UTF-8 byte of the text", greater_is_better=False, ratio=("bits", "bytes")
        ),
    )

    def run(self, cases: Sequence[Case], model: ModelInterface) -> list[TaskRow]:
        rows = super().run(cases, model)
        for row in rows:  # the first score sorts the rows
            row.scores = {"bits": row.scores["nats"] / math.log(2), **row.scores}
        return rows


class TokenAccuracy(HeldOut):
    """The share of targets that are the model's likeliest token."""

    kind = "token_accuracy"
    metrics = (Metric("token_accuracy", "share of targets that the model holds likeliest", ratio=("right", "targets")),)

    def run(self, cases: Sequence[Case], model: ModelInterface) -> list[TaskRow]:
        rows = super().run(cases, model)
        for row in rows:
            row.scores = {"right": row.scores["right"], **row.scores}
        return rows
