"""Held-out loss, perplexity, accuracy and F1: sums over sums in float64, the same for any batch size and rank count."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from strategies.base import Engine
from strategies.errors import Interrupted
from strategies.runtime import dist_sum
from trainer.evaluation.by_position import row_counts, take_position_losses
from trainer.objectives.step_totals import look_ahead

BATCH_TERMS = ("loss", "margin")
"""Terms whose sums over each micro-batch are kept, so that an evaluation can be compared with an earlier one in pairs."""


@dataclass(frozen=True, slots=True)
class EvaluationPart:
    """A part of the evaluation documents with metrics of its own: one source of a held-out share, or one named set."""

    source: int
    """The number of the source, which its micro-batches have as `source`."""
    count: float
    """Denominator of the part, all ranks together."""
    names: dict[str, str]
    """The metrics that are yielded for the part: metric -> full name."""


class LossEvaluator:
    """Yields `eval/loss`, `eval/perplexity` (of language models), `eval/accuracy` (of tokens, documents or pairs) and others.

    If the objective counts confusions (classification), `f1_macro` and `f1_micro` too. If the batches tell positions apart
    (`with_position_groups`), the loss of each group too. The metrics of `parts` come from the same pass: each micro-batch then
    has documents of one source.
    """

    on_the_way = True
    """It costs a forward pass, and so runs in every evaluation."""

    def __init__(
        self,
        batches: Callable[[], Iterable[dict[str, Any]]],
        *,
        count: float,
        ranks_per_row: int = 1,
        perplexity: bool = True,
        stop_now: Callable[[], bool] | None = None,
        ahead: Callable[[], Iterable[dict[str, Any]]] | None = None,
        parts: list[EvaluationPart] | None = None,
    ) -> None:
        self._batches = batches
        self._count = count
        """Denominator of the whole set, all ranks together."""
        self._ranks_per_row = ranks_per_row
        """Neighbouring ranks that have the same micro-batches, and a share of each one's sums (`parallel.sequence`)."""
        self._perplexity = perplexity
        self._stop_now = stop_now or (lambda: False)
        self._ahead = ahead
        """Batches of a first pass, for objectives that need means over the whole set before they compute a loss."""
        self._parts = parts or []
        self.on_batch_sums: Callable[[dict[str, list[float]]], None] = lambda batches: None
        """Called after each evaluation with the sums of each micro-batch in the order of the documents, by metric."""

    def run(self, engine: Engine) -> Iterator[tuple[str, float]]:
        """Yield the metrics as (name, value), such as ("eval/loss", 2.31), first of the whole set, then of its parts.

        Values are equal on all ranks. All ranks must call; raises Interrupted on all or none.
        """
        # By term ("loss", "accuracy" ...): its sums [parts, ...], with one row if there are no parts.
        sums: dict[str, torch.Tensor] = {}
        means: dict[
            str, torch.Tensor
        ] = {}  # by term: means over the whole set that the loss needs; most losses need none
        batch_sums: dict[str, list[torch.Tensor]] = {}  # by term: the sum of each micro-batch
        row_by_source = {part.source: row for row, part in enumerate(self._parts)}
        if self._ahead is not None:
            means = look_ahead(engine, self._ahead(), self._count, averaged=True, check_stop=self._check_stop)

        # Sum the terms of this rank's micro-batches.
        with engine.inference() as module:
            for batch in self._batches():
                row = row_by_source.get(batch.pop("source", None), 0)
                terms = module({**batch, "ahead": means})
                for term, value in {**terms, **row_counts(batch, terms)}.items():
                    if term not in sums:
                        sums[term] = value.new_zeros((max(1, len(row_by_source)), *value.shape), dtype=torch.float64)
                    sums[term][row] += value.double()
                    if term in BATCH_TERMS:
                        batch_sums.setdefault(term, []).append(value.double())
                self._check_stop()

        # Divide the sums of all ranks: first over all parts, then by part.
        totals = self._reduce(sums, batch_sums, engine)
        whole_totals = {term: total.sum(0) for term, total in totals.items()}
        for name, value in self._metrics(whole_totals, self._count).items():
            yield f"eval/{name}", value
        for row, part in enumerate(self._parts):
            part_totals = {term: total[row] for term, total in totals.items()}
            values = self._metrics(part_totals, part.count)
            for metric, name in part.names.items():
                if metric in values:
                    yield name, values[metric]

    def _reduce(
        self, sums: dict[str, torch.Tensor], batch_sums: dict[str, list[torch.Tensor]], engine: Engine
    ) -> dict[str, torch.Tensor]:
        """Add the sums of all ranks, and pass the sums of each micro-batch to `on_batch_sums`. All ranks must call.

        Returns the totals by term, in the shape of `sums`. `sums`: this rank's, by term, with a row for each part of the
        documents. `batch_sums`: of the terms in `BATCH_TERMS`, the sum of each of this rank's micro-batches. `on_batch_sums` gets
        those of all ranks in the order of the documents, such as {"eval/loss": [310.2, 287.9]}, for paired tests.
        """
        terms = sorted(sums)
        batch_terms = sorted(batch_sums)
        ordered_batch_sums = []
        for term in batch_terms:
            ordered_batch_sums.append(_batch_sums_in_order(batch_sums[term], engine, self._ranks_per_row))
        # One reduction for everything: the sums, then those of each micro-batch.
        flat_sums = [sums[term].view(-1) for term in terms]
        reduced = dist_sum(torch.cat([*flat_sums, *ordered_batch_sums])).cpu()
        sizes = [part.numel() for part in flat_sums]
        by_batch = reduced[sum(sizes) :].view(len(batch_terms), -1)
        self.on_batch_sums({f"eval/{term}": by_batch[row].tolist() for row, term in enumerate(batch_terms)})
        flat_totals = reduced[: sum(sizes)].split(sizes)
        return {term: total.view(sums[term].shape) for term, total in zip(terms, flat_totals, strict=True)}

    def _metrics(self, totals: dict[str, torch.Tensor], count: float) -> dict[str, float]:
        """Metrics by name, the loss first. `count` is the denominator of the means."""
        denominator = count or 1  # without targets the sums are 0, and so are the means
        totals = dict(totals)
        position_losses = take_position_losses(totals)
        means = {}
        for name, total in totals.items():
            if total.dim() == 0:
                means[name] = total.item() / denominator
        metrics = {"loss": means["loss"]}
        if self._perplexity:
            metrics["perplexity"] = math.exp(min(means["loss"], 700.0))  # above 709 float64 overflows
        metrics["accuracy"] = means["accuracy"]
        for name, mean in means.items():
            metrics.setdefault(name, mean)
        if "confusion" in totals:
            metrics["f1_macro"], metrics["f1_micro"] = f1_scores(totals["confusion"])
        return metrics | position_losses

    def _check_stop(self) -> None:
        if self._stop_now():
            raise Interrupted


def _batch_sums_in_order(own_sums: list[torch.Tensor], engine: Engine, ranks_per_row: int) -> torch.Tensor:
    """float64 [micro-batches of all ranks]: this rank's sums at their positions, zeros at those of other ranks.

    Micro-batches go to the readers in turns, so a sum over ranks puts all of them in the order of the documents. The
    `ranks_per_row` ranks of a reader each add their share to the same position.
    """
    stacked = torch.stack(own_sums)
    by_reader = stacked.new_zeros((len(own_sums), engine.world_size // ranks_per_row))
    by_reader[:, engine.rank // ranks_per_row] = stacked
    return by_reader.view(-1)


def f1_scores(confusion: torch.Tensor) -> tuple[float, float]:
    """(macro, micro) F1 of `confusion [3, labels]`: how often each label was right, predicted, and true.

    `2 * right / (predicted + true)`: macro is its mean over the labels that were predicted or true at least once, micro
    takes the sums over all labels (van Rijsbergen 1979; the definitions of scikit-learn and torchmetrics).
    """
    right, predicted, true = confusion
    denominators = predicted + true
    occurs = denominators > 0
    if not occurs.any():
        return 0.0, 0.0
    macro = (2 * right[occurs] / denominators[occurs]).mean().item()
    micro = (2 * right.sum() / denominators.sum()).item()
    return macro, micro
