"""Judges every step: which ones stand out, which updates are skipped, and when a run has diverged."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from strategies.base import UpdateFilter
from strategies.errors import Diverged
from strategies.runtime import Runtime, dist_sum
from trainer.monitors.guard_config import Action, GuardsConfig
from trainer.monitors.replicas import ReplicaCheck
from trainer.monitors.rolling import Rolling

WATCHED = ("loss", "grad_norm")
OUTLIERS = tuple(f"outlier/{name}" for name in WATCHED)
"""Keys of a row that stands out, with how far."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlier:
    """A step that stands out."""

    step: int
    values: dict[str, float]
    """What stands out: `loss`, `grad_norm` or both."""
    scores: dict[str, float]
    """How far, in standard deviations above the median."""
    action: Action
    first_sample: int
    """How many samples the run had consumed before it."""


class RollBack(Exception):
    """The run is to go on from its last checkpoint, without the samples of this step; raised on all ranks alike."""

    def __init__(self, outlier: Outlier) -> None:
        super().__init__(f"step {outlier.step} stands out")
        self.outlier = outlier


class Guards:
    """Judges each step, alike on all ranks.

    Where no update may be left out, steps are judged when their numbers are read anyway, once a logging interval. Where one may,
    they are judged before the update and on the device: the loss is summed over the ranks in each step, and nothing is waited for
    beyond what the optimizer waits for by itself.
    """

    def __init__(
        self,
        config: GuardsConfig,
        most_in_a_row: int,
        runtime: Runtime,
        tell: Callable[[Outlier], None] = lambda outlier: None,
    ) -> None:
        """`most_in_a_row` updates that are left out end the run. `tell` is told of outliers on rank 0."""
        self.config, self.runtime, self.most_in_a_row, self.tell = config, runtime, most_in_a_row, tell
        self.actions = (config.loss, config.grad_norm)
        self.skips, self.goes_back = Action.skip in self.actions, Action.rollback in self.actions
        self.replicas = ReplicaCheck(config.replicas_every_steps, runtime)
        device = runtime.device if self.skips else torch.device("cpu")
        self._acts = torch.tensor([action is not Action.note for action in self.actions], device=device)
        self._rolling = Rolling(config.window, device)
        self._pending: list[tuple[int, Tensor | None]] = []
        """Samples consumed before each step since the last look, and its scores where it was judged before its update."""
        self._judged: Tensor | None = None
        self._left_out: list[tuple[int, float]] = []
        """First sample and gradient norm of each of the last steps whose updates were left out, all in a row."""

    def restore_window(self, recent: list[dict[str, float]]) -> None:
        """Begin with the window of a checkpoint, oldest step first, and forget what was seen since."""
        rows = [[step[name] for name in WATCHED] for step in recent]
        self._rolling = Rolling(self.config.window, self._rolling.kept.device, rows)
        self._pending, self._judged, self._left_out = [], None, []

    def window(self) -> list[dict[str, float]]:
        """The window, for a checkpoint; waits for the device."""
        return [dict(zip(WATCHED, row, strict=True)) for row in self._rolling.rows()]

    # -- in a step -------------------------------------------------------------------------------------------------------

    def update_filter(self, local_loss: Tensor, count: float) -> UpdateFilter | None:
        """What the engine is to ask before its update; None where no update may be left out.

        `local_loss` is this rank's sum over the step, `count` that of all ranks.
        """
        if not self.skips:
            return None

        def left_out(norm: Tensor) -> Tensor:
            # The norm goes along, so that no rank can come to another answer.
            values = torch.stack([local_loss.double() / (count or 1), norm.double() / self.runtime.world_size])
            if self.runtime.world_size > 1:
                values = dist_sum(values)
            self._judged, out = self._score(values)
            return out

        return left_out

    def note_step(self, first_sample: int) -> None:
        """A step was taken; it is looked at with the rows of its interval."""
        self._pending.append((first_sample, self._judged))
        self._judged = None

    def _score(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The scores of a step, and whether its update is left out; otherwise it joins the window."""
        scores = self._rolling.scores(values)
        out = ((scores > self.config.threshold) & self._acts).any()
        self._rolling.take_in(values, values.isfinite().all() & ~out)
        return scores, out

    # -- between steps ---------------------------------------------------------------------------------------------------

    def look(self, rows: list[dict[str, Any]]) -> None:
        """Name in `rows` (equal on all ranks, of all steps taken since the last look) what stands out, and tell of it.

        Raises RollBack with the first step after which nothing is worth anything.
        """
        pending, self._pending = self._pending, []
        if not rows:
            return
        if self.skips:
            nothing = torch.full((len(WATCHED),), torch.nan, dtype=torch.float64, device=self._acts.device)
            scores = torch.stack([nothing if each is None else each for _, each in pending]).tolist()
        else:
            scores = [self._score(torch.tensor([row[name] for name in WATCHED]).double())[0].tolist() for row in rows]
        for row, (first, _), found in zip(rows, pending, scores, strict=True):
            out = {name: score for name, score in zip(WATCHED, found, strict=True) if score > self.config.threshold}
            row |= {key: out[name] for key, name in zip(OUTLIERS, WATCHED, strict=True) if name in out}
            if out:
                self._tell(row, out, first)
            self._left_out = [*self._left_out, (first, row["grad_norm"])] if row.get("skipped") else []

    def _tell(self, row: dict[str, Any], scores: dict[str, float], first_sample: int) -> None:
        acts = [action for name, action in zip(WATCHED, self.actions, strict=True) if name in scores]
        outlier = Outlier(
            step=row["step"],
            values={name: row[name] for name in scores},
            scores=scores,
            action=max(acts, key=list(Action).index),
            first_sample=first_sample,
        )
        if self.runtime.is_main:
            self.tell(outlier)
        if outlier.action is Action.rollback:
            raise RollBack(outlier)

    def stop_if_diverged(
        self, rollbacks: int, samples: int, places: Callable[[int, int], list[tuple[int, int]]]
    ) -> None:
        """Raise Diverged where the run went back too often, or too many updates in a row were left out.

        `samples` is how many the run has consumed, `places` says where some of them lie in its order.
        """
        if rollbacks > self.config.max_rollbacks:
            raise Diverged(
                f"the run would go back for the {rollbacks}. time, since a step stood out once more: this is no longer about "
                "single samples; lower optim.lr, raise guards.threshold, or look at the documents in events.jsonl. Limit: "
                "guards.max_rollbacks"
            )
        number = len(self._left_out)
        if number < self.most_in_a_row:
            return
        first = self._left_out[0][0]
        begin, end = places(first, 1)[0][0], places(max(first, samples - 1), 1)[0][0]
        where = f"(samples {begin} to {end} of the run's order)"
        if all(math.isfinite(norm) for _, norm in self._left_out):
            raise Diverged(
                f"the updates of {number} steps in a row were left out, since their loss or gradient norm stood out {where}: "
                "this is no longer about single samples; lower optim.lr, raise guards.threshold, or look at those samples. "
                "Limit: optim.max_skipped_steps"
            )
        raise Diverged(
            f"gradients were not finite for {number} steps in a row {where}; lower optim.lr, use precision=bf16 instead of "
            "fp16, or look at those samples. Limit: optim.max_skipped_steps"
        )
