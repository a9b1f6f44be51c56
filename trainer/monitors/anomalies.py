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
from trainer.monitors.rolling import RollingWindow

WATCHED = ("loss", "grad_norm")
OUTLIERS = tuple(f"outlier/{name}" for name in WATCHED)
"""Keys of a row for the score of each number that stands out."""


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
    """Raised on all ranks alike: the run is to continue from its last checkpoint, without the samples of this step."""

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
        max_skipped_in_a_row: int,
        runtime: Runtime,
        on_outlier: Callable[[Outlier], None] = lambda outlier: None,
    ) -> None:
        """`max_skipped_in_a_row` updates that are left out end the run. `on_outlier` is called on rank 0."""
        self.config = config
        self.runtime = runtime
        self.max_skipped_in_a_row = max_skipped_in_a_row
        self.on_outlier = on_outlier
        self.actions = (config.loss, config.grad_norm)
        self.skips = Action.skip in self.actions
        self.goes_back = Action.rollback in self.actions
        self.replicas = ReplicaCheck(config.replicas_every_steps, runtime)
        # Only an update that may be skipped is judged on the device; else the numbers are on the host already.
        device = runtime.device if self.skips else torch.device("cpu")
        self._acting = torch.tensor([action is not Action.note for action in self.actions], device=device)
        self._rolling = RollingWindow(config.window, device)
        self._pending: list[tuple[int, Tensor | None]] = []
        """Samples consumed before each step since the last look, and its scores where it was judged before its update."""
        self._scores_before_update: Tensor | None = None
        self._skipped_in_a_row: list[tuple[int, float]] = []
        """First sample and gradient norm of each of the last steps whose updates were left out, all in a row."""

    def restore_window(self, recent: list[dict[str, float]]) -> None:
        """Begin with the window of a checkpoint, oldest step first, and forget what was seen since."""
        rows = []
        for step in recent:
            rows.append([step[name] for name in WATCHED])
        self._rolling = RollingWindow(self.config.window, self._rolling.window.device, rows)
        self._pending = []
        self._scores_before_update = None
        self._skipped_in_a_row = []

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
            self._scores_before_update, is_left_out = self._score(values)
            return is_left_out

        return left_out

    def note_step(self, first_sample: int) -> None:
        """Remember a step that was taken, and its scores if it was judged before its update; `look` judges its interval."""
        self._pending.append((first_sample, self._scores_before_update))
        self._scores_before_update = None

    def _score(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The scores of a step, and whether its update is left out; otherwise it joins the window."""
        scores = self._rolling.scores(values)
        # NaN compares as false: a step without a score never stands out.
        is_left_out = ((scores > self.config.threshold) & self._acting).any()
        self._rolling.push(values, values.isfinite().all() & ~is_left_out)
        return scores, is_left_out

    # -- between steps ---------------------------------------------------------------------------------------------------

    def mark_outliers(self, rows: list[dict[str, Any]]) -> None:
        """Judge the steps of an interval: add the scores of what stands out to `rows`, and report it.

        `rows`: one for each step since the last call, equal on all ranks.

        Raises RollBack at the first step that the run is to return behind.
        """
        pending = self._pending
        self._pending = []
        if not rows:
            return
        scores_by_step = self._scores_of(rows, [scores for _, scores in pending])
        for row, (first_sample, _), scores in zip(rows, pending, scores_by_step, strict=True):
            outlying: dict[str, float] = {}
            for name, key, score in zip(WATCHED, OUTLIERS, scores, strict=True):
                if score > self.config.threshold:
                    outlying[name] = score
                    row[key] = score
            if outlying:
                self._report(row, outlying, first_sample)
            if row.get("skipped"):
                self._skipped_in_a_row = [*self._skipped_in_a_row, (first_sample, row["grad_norm"])]
            else:
                self._skipped_in_a_row = []

    def _scores_of(self, rows: list[dict[str, Any]], before_update: list[Tensor | None]) -> list[list[float]]:
        """The scores of each step: those of before its update if updates may be left out, else computed now."""
        if self.skips:
            unknown = torch.full((len(WATCHED),), torch.nan, dtype=torch.float64, device=self._acting.device)
            scores: list[list[float]] = torch.stack(
                [unknown if step is None else step for step in before_update]
            ).tolist()
            return scores
        scores = []
        for row in rows:
            values = torch.tensor([row[name] for name in WATCHED]).double()
            step_scores, _ = self._score(values)
            scores.append(step_scores.tolist())
        return scores

    def _report(self, row: dict[str, Any], scores: dict[str, float], first_sample: int) -> None:
        """Hand an outlier to `on_outlier`; the strongest of the actions holds. Raises RollBack if that is a rollback."""
        actions = [action for name, action in zip(WATCHED, self.actions, strict=True) if name in scores]
        outlier = Outlier(
            step=row["step"],
            values={name: row[name] for name in scores},
            scores=scores,
            action=max(actions, key=list(Action).index),
            first_sample=first_sample,
        )
        if self.runtime.is_main:
            self.on_outlier(outlier)
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
        number = len(self._skipped_in_a_row)
        if number < self.max_skipped_in_a_row:
            return
        first_sample = self._skipped_in_a_row[0][0]
        begin = places(first_sample, 1)[0][0]
        end = places(max(first_sample, samples - 1), 1)[0][0]
        where = f"(samples {begin} to {end} of the run's order)"
        if all(math.isfinite(norm) for _, norm in self._skipped_in_a_row):
            raise Diverged(
                f"the updates of {number} steps in a row were left out, since their loss or gradient norm stood out {where}: "
                "this is no longer about single samples; lower optim.lr, raise guards.threshold, or look at those samples. "
                "Limit: optim.max_skipped_steps"
            )
        raise Diverged(
            f"gradients were not finite for {number} steps in a row {where}; lower optim.lr, use precision=bf16 instead of "
            "fp16, or look at those samples. Limit: optim.max_skipped_steps"
        )
