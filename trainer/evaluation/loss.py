"""Held-out loss, perplexity and accuracy: sums over sums in float64, the same for any batch size and rank count."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from strategies.base import Engine
from strategies.runtime import dist_sum


class Interrupted(Exception):
    """The evaluation was broken off because the run was asked to stop; raised on all ranks alike."""


class LossEvaluator:
    """Yields `loss`, `perplexity` (of language models), `accuracy` (of tokens, labels or pairs) and what else is summed."""

    def __init__(
        self,
        batches: Callable[[], Iterable[dict[str, Any]]],
        *,
        count: int,
        prefix: str,
        perplexity: bool = True,
        stop_now: Callable[[], bool] | None = None,
    ) -> None:
        self._batches = batches
        self._count = count
        """Denominator of the whole set, all ranks together."""
        self._prefix = prefix
        self._perplexity = perplexity
        self._stop_now = stop_now or (lambda: False)

    def run(self, engine: Engine) -> Iterator[tuple[str, float]]:
        """Yield (name, value), equal on all ranks. All ranks must call; raises Interrupted on all or none."""
        sums: dict[str, torch.Tensor] = {}
        with engine.inference() as module:
            for batch in self._batches():
                for term, value in module(batch).items():
                    sums[term] = (
                        sums.get(term, torch.zeros((), dtype=torch.float64, device=value.device)) + value.double()
                    )
                if self._stop_now():
                    raise Interrupted
        names = sorted(sums)
        totals = dist_sum(torch.stack([sums[name] for name in names])).tolist()
        values = {name: total / max(1, self._count) for name, total in zip(names, totals, strict=True)}
        yield f"{self._prefix}/loss", values["loss"]
        if self._perplexity:
            yield f"{self._prefix}/perplexity", math.exp(min(values["loss"], 700.0))
        yield f"{self._prefix}/accuracy", values["accuracy"]
        yield from ((f"{self._prefix}/{name}", values[name]) for name in names if name not in ("loss", "accuracy"))
