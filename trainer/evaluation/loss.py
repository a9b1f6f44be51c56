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
from trainer.objectives.step_totals import look_ahead

BATCH_TERMS = ("loss", "margin")
"""Terms whose sums over each micro-batch are told, so that an evaluation can be paired with an earlier one."""


@dataclass(frozen=True, slots=True)
class EvaluationPart:
    """Part of the evaluation documents that is told apart: one source of a held-out share, or one named set."""

    source: int
    """Its number: the `source` of its micro-batches."""
    count: float
    """Denominator of the part, all ranks together."""
    names: dict[str, str]
    """What of it is yielded: metric -> name."""


class LossEvaluator:
    """Yields `loss`, `perplexity` (of language models), `accuracy` (of tokens, documents or pairs) and what else is summed.

    Where the objective counts confusions (classification), `f1_macro` and `f1_micro` too. `parts` come out of the same
    pass: each micro-batch then holds documents of one source.
    """

    def __init__(
        self,
        batches: Callable[[], Iterable[dict[str, Any]]],
        *,
        count: float,
        prefix: str,
        perplexity: bool = True,
        stop_now: Callable[[], bool] | None = None,
        ahead: Callable[[], Iterable[dict[str, Any]]] | None = None,
        parts: list[EvaluationPart] | None = None,
    ) -> None:
        self._batches = batches
        self._count = count
        """Denominator of the whole set, all ranks together."""
        self._prefix = prefix
        self._perplexity = perplexity
        self._stop_now = stop_now or (lambda: False)
        self._ahead = ahead
        """Batches looked at before the others, for objectives that need the whole set to begin with."""
        self._parts = parts or []
        self.on_batch_sums: Callable[[dict[str, list[float]]], None] = lambda batches: None
        """Hears the sums of each micro-batch in the order of the documents, by metric, after each evaluation."""

    def run(self, engine: Engine) -> Iterator[tuple[str, float]]:
        """Yield (name, value), equal on all ranks. All ranks must call; raises Interrupted on all or none."""
        sums: dict[str, torch.Tensor] = {}
        means: dict[str, torch.Tensor] = {}
        batch_sums: dict[str, list[torch.Tensor]] = {}
        places = {part.source: place for place, part in enumerate(self._parts)}
        if self._ahead is not None:
            means = look_ahead(engine, self._ahead(), self._count, averaged=True, check_stop=self._check_stop)
        with engine.inference() as module:
            for batch in self._batches():
                place = places.get(batch.pop("source", None), 0)
                for term, value in module({**batch, "ahead": means}).items():
                    if term not in sums:
                        sums[term] = value.new_zeros((max(1, len(places)), *value.shape), dtype=torch.float64)
                    sums[term][place] += value.double()
                    if term in BATCH_TERMS:
                        batch_sums.setdefault(term, []).append(value.double())
                self._check_stop()
        names = sorted(sums)
        own_batches = [_batch_sums_in_order(batch_sums[term], engine) for term in sorted(batch_sums)]
        size = sum(sums[name].numel() for name in names)
        # One reduction for all: the metrics, then the sums of each micro-batch.
        reduced = dist_sum(torch.cat([*(sums[name].view(-1) for name in names), *own_batches])).cpu()
        flat = reduced[:size]
        by_batch = reduced[size:].view(len(own_batches), -1)
        self.on_batch_sums(
            {f"{self._prefix}/{term}": by_batch[row].tolist() for row, term in enumerate(sorted(batch_sums))}
        )
        pieces = flat.split([sums[name].numel() for name in names])
        totals = {name: piece.view(sums[name].shape) for name, piece in zip(names, pieces, strict=True)}
        for name, value in self._metrics({term: total.sum(0) for term, total in totals.items()}, self._count).items():
            yield f"{self._prefix}/{name}", value
        for place, part in enumerate(self._parts):
            values = self._metrics({term: total[place] for term, total in totals.items()}, part.count)
            yield from ((name, values[metric]) for metric, name in part.names.items() if metric in values)

    def _metrics(self, totals: dict[str, torch.Tensor], count: float) -> dict[str, float]:
        """Metrics by name, the loss first."""
        means = {name: total.item() / (count or 1) for name, total in totals.items() if total.dim() == 0}
        values = {"loss": means["loss"]}
        if self._perplexity:
            values["perplexity"] = math.exp(min(means["loss"], 700.0))
        values |= {"accuracy": means["accuracy"], **{name: means[name] for name in means if name not in values}}
        if "confusion" in totals:
            values["f1_macro"], values["f1_micro"] = f1_scores(totals["confusion"])
        return values

    def _check_stop(self) -> None:
        if self._stop_now():
            raise Interrupted


def _batch_sums_in_order(own: list[torch.Tensor], engine: Engine) -> torch.Tensor:
    """float64 [micro-batches of all ranks]: this rank's sums in their places, 0 in those of others. Ranks take turns."""
    stacked = torch.stack(own)
    every = stacked.new_zeros((len(own), engine.dp_size))
    every[:, engine.dp_rank] = stacked
    return every.view(-1)


def f1_scores(confusion: torch.Tensor) -> tuple[float, float]:
    """(macro, micro) F1 of `confusion [3, labels]`: by label, how often it was right, predicted, and true.

    `2 * right / (predicted + true)`: macro is its mean over the labels that were predicted or true at least once, micro
    takes the sums over all labels (van Rijsbergen 1979; the definitions of scikit-learn and torchmetrics).
    """
    right, named = confusion[0], confusion[1] + confusion[2]
    if not named.any():
        return 0.0, 0.0
    seen = named > 0
    return (2 * right[seen] / named[seen]).mean().item(), (2 * right.sum() / named.sum()).item()
