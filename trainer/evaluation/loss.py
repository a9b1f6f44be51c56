"""Held-out loss, perplexity, accuracy and F1: sums over sums in float64, the same for any batch size and rank count."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from strategies.base import Engine
from strategies.runtime import dist_sum
from trainer.objectives.ahead import look_ahead


class Interrupted(Exception):
    """The evaluation was broken off because the run was asked to stop; raised on all ranks alike."""


class LossEvaluator:
    """Yields `loss`, `perplexity` (of language models), `accuracy` (of tokens, documents or pairs) and what else is summed.

    Where the objective counts confusions (classification), `f1_macro` and `f1_micro` too.
    """

    def __init__(
        self,
        batches: Callable[[], Iterable[dict[str, Any]]],
        *,
        count: int,
        prefix: str,
        perplexity: bool = True,
        stop_now: Callable[[], bool] | None = None,
        ahead: Callable[[], Iterable[dict[str, Any]]] | None = None,
    ) -> None:
        self._batches = batches
        self._count = count
        """Denominator of the whole set, all ranks together."""
        self._prefix = prefix
        self._perplexity = perplexity
        self._stop_now = stop_now or (lambda: False)
        self._ahead = ahead
        """Batches looked at before the others, for objectives that need the whole set to begin with."""

    def run(self, engine: Engine) -> Iterator[tuple[str, float]]:
        """Yield (name, value), equal on all ranks. All ranks must call; raises Interrupted on all or none."""
        sums: dict[str, torch.Tensor] = {}
        means: dict[str, torch.Tensor] = {}
        if self._ahead is not None:
            means = look_ahead(engine, self._ahead(), self._count, averaged=True, check_stop=self._check_stop)
        with engine.inference() as module:
            for batch in self._batches():
                for term, value in module({**batch, "ahead": means}).items():
                    sums[term] = sums[term] + value.double() if term in sums else value.double()
                self._check_stop()
        names = sorted(sums)
        flat = dist_sum(torch.cat([sums[name].view(-1) for name in names])).cpu()
        parts = flat.split([sums[name].numel() for name in names])
        totals = {name: part.view(sums[name].shape) for name, part in zip(names, parts, strict=True)}
        values = {name: total.item() / max(1, self._count) for name, total in totals.items() if total.dim() == 0}
        yield f"{self._prefix}/loss", values["loss"]
        if self._perplexity:
            yield f"{self._prefix}/perplexity", math.exp(min(values["loss"], 700.0))
        yield f"{self._prefix}/accuracy", values["accuracy"]
        yield from ((f"{self._prefix}/{name}", values[name]) for name in values if name not in ("loss", "accuracy"))
        if "confusion" in totals:
            macro, micro = f1_scores(totals["confusion"])
            yield f"{self._prefix}/f1_macro", macro
            yield f"{self._prefix}/f1_micro", micro

    def _check_stop(self) -> None:
        if self._stop_now():
            raise Interrupted


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
