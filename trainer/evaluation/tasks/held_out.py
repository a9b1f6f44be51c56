"""Loss, perplexity, bits per byte and token accuracy on evaluation documents, by source."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer.evaluation.tasks.base import RatioOfSums, Task, TaskCase, TaskMetric, TaskRow

if TYPE_CHECKING:
    from trainer.data.store.sequences import TokenDataset
    from trainer.evaluation.tasks.model_interface import ModelInterface


SHOWN_TEXT_CHARACTERS = 2000
"""Most characters of a document that a report shows."""


class HeldOutLossTask(Task):
    """Computes losses of documents that are tokenised as for training: the same tokens are targets with the same weights."""

    rows_description = "rows in any format that the run's objective can train on, such as conversations"
    works_with_server = False

    def __init__(self, name: str, config: object) -> None:
        super().__init__(name, config)  # type: ignore[arg-type]
        self.dataset: TokenDataset | None = None
        """Its documents as tokens; set by `prepare_tasks`."""

    def prepare_case(self, case: TaskCase) -> None:
        """Nothing to do: `prepare_tasks` reads the documents."""

    def score_cases(self, cases: Sequence[TaskCase], model: ModelInterface) -> list[TaskRow]:
        """Measure the loss of each tokenised sequence, and report the sums that the metrics divide. All ranks must call.

        `cases[i]` is the case of sequence `i`. Scores of a row: `nats`, the summed loss; `targets`, the number of target
        tokens; `right`, how many of these are the model's likeliest token; `bytes`, the UTF-8 bytes of the target tokens'
        text.
        """
        dataset = self.dataset
        assert dataset is not None
        result_by_sequence = model.sequence_losses(dataset, self.config.max_rows)
        rows = []
        for sequence, (summed_loss, num_right) in sorted(result_by_sequence.items()):  # `cases[sequence]` is its case
            sample = dataset.sample(sequence)

            is_target = sample.supervised[1:]  # the first token has nothing before it, and is never a target
            target_ids = sample.input_ids[1:][is_target].tolist()
            target_text = model.answer_generator.tokenizer.decode(target_ids, skip_special_tokens=True)
            prompt_ids = sample.input_ids[: sample.answer_begin()].tolist()
            scores = {
                "nats": summed_loss,
                "targets": float(dataset.counts["loss"][sequence]),
                "right": num_right,
                "bytes": float(len(target_text.encode())),
            }
            source = dataset.source_names[int(dataset.sources[sequence])]
            location = cases[sequence].location if sequence < len(cases) else f"row {sequence}"
            prompt = model.decode_prompt_end(prompt_ids)
            rows.append(
                TaskRow(
                    where=location,
                    prompt=prompt,
                    answer="",
                    reference=target_text[:SHOWN_TEXT_CHARACTERS],
                    scores=scores,
                    source=source,
                )
            )
        return rows

    def compute_metrics(self, rows: Sequence[TaskRow]) -> dict[str, float]:
        """The metrics of all rows, and of each data source if there are several: {"loss": 2.1, "loss/code": 1.7, ...}."""
        return self.metrics_by_source(rows)


class Loss(HeldOutLossTask):
    """Mean loss of the targets, and its exponential."""

    kind = "loss"
    metrics = (
        TaskMetric(
            "loss", "mean loss of a target, nats", greater_is_better=False, ratio_of_sums=RatioOfSums("nats", "targets")
        ),
        TaskMetric(
            "perplexity",
            "exponential of the loss",
            greater_is_better=False,
            ratio_of_sums=RatioOfSums("nats", "targets"),
            exponential=True,
        ),
    )


class BitsPerByte(HeldOutLossTask):
    """The loss in bits over the bytes of the learned text: comparable between tokenizers."""

    kind = "bits_per_byte"
    metrics = (
        TaskMetric(
            "bits_per_byte",
            "bits of loss a UTF-8 byte of the text",
            greater_is_better=False,
            ratio_of_sums=RatioOfSums("bits", "bytes"),
        ),
    )

    def score_cases(self, cases: Sequence[TaskCase], model: ModelInterface) -> list[TaskRow]:
        rows = super().score_cases(cases, model)
        for row in rows:  # the first score sorts the rows
            row.scores = {"bits": row.scores["nats"] / math.log(2), **row.scores}
        return rows


class TokenAccuracy(HeldOutLossTask):
    """The share of targets that are the model's likeliest token."""

    kind = "token_accuracy"
    metrics = (
        TaskMetric(
            "token_accuracy",
            "share of targets that the model holds likeliest",
            ratio_of_sums=RatioOfSums("right", "targets"),
        ),
    )

    def score_cases(self, cases: Sequence[TaskCase], model: ModelInterface) -> list[TaskRow]:
        rows = super().score_cases(cases, model)
        for row in rows:
            row.scores = {"right": row.scores["right"], **row.scores}
        return rows
