"""Held-out loss, perplexity, accuracy and F1: sums over sums in float64, the same for any batch size and rank count."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from strategies.base import Engine
from strategies.errors import Interrupted
from strategies.runtime import sum_over_ranks
from trainer.evaluation.by_position import pop_position_losses, position_group_counts
from trainer.objectives.step_totals import mean_terms_without_gradients

TERMS_KEPT_BY_BATCH = ("loss", "margin")
"""Terms whose sum over each micro-batch is kept, so that two evaluations can be compared by a paired test."""


@dataclass(frozen=True, slots=True)
class ReportedSource:
    """A source of the evaluation documents, or a set named in `data.eval_path`, that has metrics of its own."""

    source: int
    """The index of the source, which its micro-batches have under the key `source`."""
    loss_denominator: float
    """What the summed loss of the source is divided by to get its mean, all ranks together."""
    metric_names: dict[str, str]
    """The metrics that are reported for the source, with their full names: {"loss": "eval/loss/code"}."""


class LossEvaluator:
    """Yields `eval/loss`, `eval/perplexity` (of language models), `eval/accuracy` (of tokens, documents or pairs) and others.

    If the objective counts confusions (classification), also `f1_macro` and `f1_micro`. If the batches have position groups
    (`with_position_groups`), also the loss of each group. The metrics of `reported_sources` come from the same pass: each
    micro-batch then has documents of one source.
    """

    on_the_way = True
    """It costs only a forward pass, so it also runs in intermediate evaluations."""

    def __init__(
        self,
        batches: Callable[[], Iterable[dict[str, Any]]],
        *,
        loss_denominator: float,
        ranks_per_row: int = 1,
        perplexity: bool = True,
        stop_now: Callable[[], bool] | None = None,
        ahead: Callable[[], Iterable[dict[str, Any]]] | None = None,
        reported_sources: list[ReportedSource] | None = None,
    ) -> None:
        """`batches`: called once for each evaluation, yields this rank's micro-batches. `perplexity`: whether the loss is that
        of a language model. `ahead`: batches of a first pass; None for objectives that need none. `stop_now`: whether the run
        must stop, the same on all ranks.
        """
        self._batches = batches
        self._loss_denominator = loss_denominator
        """What the summed loss of all documents is divided by, all ranks together."""
        self._ranks_per_row = ranks_per_row
        """Neighbouring ranks that split each row of tokens (`parallel.sequence`): same micro-batches, a share of each sum."""
        self._has_perplexity = perplexity
        self._stop_now = stop_now or (lambda: False)
        self._first_pass_batches = ahead
        """Batches of a first pass, for objectives that need means over the whole set before they compute a loss."""
        self._reported_sources = reported_sources or []
        self.on_batch_sums: Callable[[dict[str, list[float]]], None] = lambda batches: None
        """Called after each evaluation with the sums of each micro-batch in the order of the documents, by metric."""

    def run(self, engine: Engine) -> Iterator[tuple[str, float]]:
        """Compute the held-out metrics of the model as it is now: yields (name, value), such as ("eval/loss", 2.31).

        First come the metrics of all documents, then those of single sources. Values are equal on all ranks. All ranks must
        call. Raises Interrupted, on all ranks or none, if the run must stop.
        """
        means = self._means_for_loss(engine)
        own_sums = self._sum_own_micro_batches(engine, means)
        totals = self._reduce_and_report_batch_sums(own_sums, engine)  # by term, a row for each reported source
        totals_of_all = {term: total.sum(0) for term, total in totals.items()}
        for name, value in self._metrics(totals_of_all, self._loss_denominator).items():
            yield f"eval/{name}", value
        for row, reported in enumerate(self._reported_sources):
            totals_of_source = {term: total[row] for term, total in totals.items()}
            metrics_of_source = self._metrics(totals_of_source, reported.loss_denominator)
            for metric, full_name in reported.metric_names.items():
                if metric in metrics_of_source:
                    yield full_name, metrics_of_source[metric]

    def _means_for_loss(self, engine: Engine) -> dict[str, torch.Tensor]:
        """A first pass over all documents, for the few objectives whose loss needs means over the whole set.

        All ranks must call. Returns these means by term (a value that the objective returns); empty for most objectives.
        """
        if self._first_pass_batches is None:
            return {}
        return mean_terms_without_gradients(
            engine, self._first_pass_batches(), self._loss_denominator, averaged=True, check_stop=self._check_stop
        )

    def _sum_own_micro_batches(self, engine: Engine, means: dict[str, torch.Tensor]) -> _SumsOfRank:
        """Run a forward pass on each micro-batch of this rank, and sum up what the objective returns. All ranks must call.

        A term is one such value, summed over the micro-batch: "loss", "accuracy" and others. `means`: what `_means_for_loss`
        returned. Raises Interrupted if the run must stop.
        """
        sums = _SumsOfRank()
        row_by_source = {reported.source: row for row, reported in enumerate(self._reported_sources)}
        num_source_rows = max(1, len(row_by_source))
        with engine.inference() as module:
            for batch in self._batches():
                # All micro-batches go to row 0 if no source has metrics of its own.
                source_row = row_by_source.get(batch.pop("source", None), 0)
                terms = module({**batch, "step_means": means})  # "step_means": the means of a first pass
                for term, value in {**terms, **position_group_counts(batch, terms)}.items():
                    if term not in sums.by_source:
                        sums.by_source[term] = value.new_zeros((num_source_rows, *value.shape), dtype=torch.float64)
                    # In float64, since float32 would lose digits over many micro-batches.
                    sums.by_source[term][source_row] += value.double()
                    if term in TERMS_KEPT_BY_BATCH:
                        sums.by_batch.setdefault(term, []).append(value.double())
                self._check_stop()
        return sums

    def _reduce_and_report_batch_sums(self, own_sums: _SumsOfRank, engine: Engine) -> dict[str, torch.Tensor]:
        """Add the sums of all ranks in one reduction; returns the totals by term, float64 [sources, ...]. All ranks must call.

        Also calls `on_batch_sums` with the sum of each micro-batch of all ranks, in the order of the documents, such as
        {"eval/loss": [310.2, 287.9]}. With these, two evaluations of the same documents can be compared by a paired test.
        """
        terms = sorted(own_sums.by_source)
        batch_terms = sorted(own_sums.by_batch)
        ordered_batch_sums = []  # by term, float64 [micro-batches of all ranks], zero at those of other ranks
        for term in batch_terms:
            ordered_batch_sums.append(
                _place_micro_batch_sums(own_sums.by_batch[term], engine.rank, engine.world_size, self._ranks_per_row)
            )
        # The reduced vector has the sums by source first, then those by micro-batch.
        flat_sums = [own_sums.by_source[term].view(-1) for term in terms]
        reduced = sum_over_ranks(torch.cat([*flat_sums, *ordered_batch_sums])).cpu()
        sizes = [flat.numel() for flat in flat_sums]
        num_source_values = sum(sizes)
        batch_totals = reduced[num_source_values:].view(len(batch_terms), -1)
        self.on_batch_sums({f"eval/{term}": batch_totals[row].tolist() for row, term in enumerate(batch_terms)})
        flat_totals = reduced[:num_source_values].split(sizes)
        return {
            term: total.view(own_sums.by_source[term].shape) for term, total in zip(terms, flat_totals, strict=True)
        }

    def _metrics(self, totals: dict[str, torch.Tensor], loss_denominator: float) -> dict[str, float]:
        """Turn summed terms into metrics, the loss first: {"loss": 2.31, "perplexity": 10.1, "accuracy": 0.52, ...}.

        `totals`: the terms, summed over all ranks and the documents in question. Scalars become means over `loss_denominator`.
        The losses by position in the document have denominators of their own. `confusion` (counts by label) becomes F1 scores.
        """
        denominator = loss_denominator or 1  # without targets the sums are 0, and so are the means
        totals = dict(totals)
        position_losses = pop_position_losses(totals)
        means = {}
        for name, total in totals.items():
            if total.dim() == 0:
                means[name] = total.item() / denominator
        metrics = {"loss": means["loss"]}
        if self._has_perplexity:
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


@dataclass(slots=True)
class _SumsOfRank:
    """Summed terms of this rank's micro-batches, such as "loss" and "accuracy"."""

    by_source: dict[str, torch.Tensor] = field(default_factory=dict)
    """By term: float64 [sources, ...], a row for each reported source; one row for all documents if no source is reported."""
    by_batch: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """By term in `TERMS_KEPT_BY_BATCH`: the sum over each micro-batch."""


def _place_micro_batch_sums(
    own_sums: list[torch.Tensor], rank: int, world_size: int, ranks_per_row: int
) -> torch.Tensor:
    """Lay out this rank's sums at the places of their micro-batches among all ranks', ready for a sum over ranks.

    Elsewhere there are zeros. `own_sums`: a scalar tensor for each micro-batch of this rank. All ranks have the same number of
    them; some may be empty, and sum to 0. `ranks_per_row`: so many neighbouring ranks, a data-parallel group, split each row
    of tokens; each of them puts its share of a sum at the same place.

    Consecutive micro-batches go to consecutive groups: with 2 groups, group 1 has the micro-batches 1, 3, 5. After the sum
    over ranks every micro-batch has its full sum, in the order of the documents. Returns float64 [micro-batches of all ranks].
    """
    stacked = torch.stack(own_sums)
    num_groups = world_size // ranks_per_row
    own_group = rank // ranks_per_row
    sums_by_group = stacked.new_zeros((len(own_sums), num_groups))
    sums_by_group[:, own_group] = stacked
    return sums_by_group.view(-1)


def f1_scores(confusion: torch.Tensor) -> tuple[float, float]:
    """(macro, micro) F1 of a classifier, from how often each label was right, predicted, and true: `confusion [3, labels]`.

    `2 * right / (predicted + true)`: macro is its mean over the labels that were predicted or true at least once, micro takes
    the sums over all labels (van Rijsbergen 1979; the definitions of scikit-learn and torchmetrics). 0 without any.
    """
    right, predicted, true = confusion
    denominators = predicted + true
    occurs = denominators > 0
    if not occurs.any():
        return 0.0, 0.0
    macro = (2 * right[occurs] / denominators[occurs]).mean().item()
    micro = (2 * right.sum() / denominators.sum()).item()
    return macro, micro
