"""Judges every step: which ones stand out, which updates are skipped, and when a run has diverged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from strategies.base import UpdateFilter
from strategies.errors import Diverged
from strategies.runtime import Runtime, dist_sum
from trainer.monitors.guard_config import Action, GuardsConfig
from trainer.monitors.levels import LevelWatch, RaisedLevel
from trainer.monitors.replicas import ReplicaCheck
from trainer.monitors.rolling import RollingWindow

WATCHED = ("loss", "grad_norm")
"""Numbers of a step that are judged, in the order of the window's columns."""
FRUITLESS_RETURNS = 2
"""Returns to one checkpoint, each of which was followed by a step that stands out, after which it is taken for bad itself."""
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
    """How many samples the run had consumed before the first of its steps."""
    began: int
    """The step from which on it stands out: `step`, or an earlier one for a level, or for a rise that ended in this step."""
    num_steps: int = 1
    """Steps whose samples may be the cause, from `first_sample` on: of a level also that of the last update before it began."""
    is_level: bool = False
    """Whether it has stayed so, and `values` are medians of the last steps."""

    @property
    def last_good_step(self) -> int:
        """The last step whose checkpoint is from before it. What makes a level is the update of the step before its first."""
        return self.began - 1 if self.num_steps == 1 else self.began - 2


class RollBack(Exception):
    """Raised on all ranks alike: the run is to continue from a checkpoint before this, without its samples."""

    def __init__(self, outlier: Outlier) -> None:
        super().__init__(f"step {outlier.step} stands out")
        self.outlier = outlier


class Guards:
    """Judges each step, alike on all ranks.

    If no update may be left out, steps are judged when their numbers are read anyway, once a logging interval. If one may,
    they are judged before the update and on the device: the loss is summed over the ranks in each step, and nothing is waited
    for beyond what the optimizer waits for by itself.
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
        self.levels = LevelWatch(config.threshold, config.window)
        self._returned_to = -1
        """Step of the checkpoint that the run went back to last; -1 if it never did."""
        self._fruitless = 0
        """How often in a row it then stood out in the very next step."""
        self._pending: list[tuple[int, Tensor | None]] = []
        """Samples consumed before each step since the last look, and its scores where it was judged before its update."""
        self._scores_before_update: Tensor | None = None
        self._skipped_in_a_row: list[tuple[int, float]] = []
        """First sample and gradient norm of each of the last steps whose updates were left out, all in a row."""

    def restore_window(self, recent: list[dict[str, float]], level_rows: Sequence[dict[str, float]] = ()) -> None:
        """Put the guards where a checkpoint stands, when a run is resumed or rolled back.

        `recent`: loss and gradient norm of the steps in its window, oldest first, with which later steps are compared.
        `level_rows`: the `rows` of its `LevelWatch`. What was judged after that checkpoint is forgotten.
        """
        self.levels = LevelWatch(self.config.threshold, self.config.window, level_rows)
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
        """A function that the engine asks, with the gradient norm, before it updates the weights: is this update left out?

        None unless `guards.loss` or `guards.grad_norm` is `skip`. `local_loss`: this rank's sum of the loss over the step.
        `count`: of tokens or sequences on all ranks, by which the loss is divided. The function keeps the step's scores for
        `note_step`. All ranks must call it.
        """
        if not self.skips:
            return None

        def is_left_out(grad_norm: Tensor) -> Tensor:
            """Whether the update with this gradient norm is left out, as 0-d bool on the device. A collective."""
            # All ranks have the same norm. It is summed and divided all the same, so that no rank can come to another answer.
            # `count` is 0 if no rank has a supervised token: the loss is then 0 too.
            values = torch.stack([local_loss.double() / (count or 1), grad_norm.double() / self.runtime.world_size])
            if self.runtime.world_size > 1:
                values = dist_sum(values)
            self._scores_before_update, leave_out = self._score(values)
            return leave_out

        return is_left_out

    def note_step(self, first_sample: int) -> None:
        """Remember a step that was taken, with its scores if it was judged before its update, for `mark_outliers`."""
        self._pending.append((first_sample, self._scores_before_update))
        self._scores_before_update = None

    def _score(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Judge a step against the window of the last steps: (its scores float64 [2], is its update left out as 0-d bool).

        `values` (float64 [2]): its loss and gradient norm. A score says how many robust standard deviations a number lies above
        the window's median; above `guards.threshold` it stands out. A level is a number that stands out in two steps running.

        A step joins the window unless its update is left out or its loss is at a level: a run that has become bad must not
        become the measure of its own steps. A level of the gradient norm alone joins, since norms may rise for good reasons.
        A level is reported once: at its later steps the score is NaN, except for a number whose action is to leave out the
        update. Nothing waits for the device.
        """
        scores = self._rolling.scores(values)
        # NaN compares as false: a step without a score never stands out.
        stands_out = scores > self.config.threshold
        is_left_out = (stands_out & self._acting).any()
        # The first step of a level has joined the window, and the others have not: it is the newest one there.
        is_level = stands_out & (self._rolling.newest_scores() > self.config.threshold)
        joins_window = values.isfinite().all() & ~is_left_out & ~is_level[0]
        self._rolling.push(values, joins_window)
        # A loss at a level has been reported before, and a gradient norm beside it is the same news.
        is_told = (is_level | is_level[0]) & ~self._acting
        return torch.where(is_told, torch.nan, scores), is_left_out

    # -- between steps ---------------------------------------------------------------------------------------------------

    def mark_outliers(self, rows: list[dict[str, Any]]) -> None:
        """Judge the steps of a logging interval: add the scores of what stands out to `rows`, and report it.

        `rows`: the metrics of each step since the last call, equal on all ranks. A number that stands out in its step gets the
        key `outlier/NAME` with its score, and so does one that has risen and stayed (a level). Raises RollBack at the first
        step that the run is to return behind.
        """
        pending = self._pending
        self._pending = []
        if not rows:
            return
        scores_before_update = [scores for _, scores in pending]
        scores_by_step = self._scores_by_step(rows, scores_before_update)  # [loss, gradient norm] of each step
        for row, (first_sample, _), scores in zip(rows, pending, scores_by_step, strict=True):
            outlier_scores: dict[str, float] = {}
            for name, key, score in zip(WATCHED, OUTLIERS, scores, strict=True):
                if score > self.config.threshold:
                    outlier_scores[name] = score
                    row[key] = score
            if outlier_scores:
                self._report(self._outlier(row, outlier_scores, first_sample))
            for level in self.levels.add(row, first_sample, list(outlier_scores)):
                row[f"outlier/{level.name}"] = level.score
                self._report(self._outlier_of_level(level, row["step"], first_sample))
            if row.get("skipped"):
                self._skipped_in_a_row = [*self._skipped_in_a_row, (first_sample, row["grad_norm"])]
            else:
                self._skipped_in_a_row = []

    def _scores_by_step(
        self, rows: list[dict[str, Any]], scores_before_update: list[Tensor | None]
    ) -> list[list[float]]:
        """The scores of each step of an interval as floats on the host: [steps][2], loss and gradient norm (`WATCHED`).

        If updates may be left out, they were computed before the update: `scores_before_update` has a tensor a step, or None if
        the engine did not ask (then NaN, which never stands out). Else they are computed now, from the numbers in `rows`.
        """
        if self.skips:
            unknown = torch.full((len(WATCHED),), torch.nan, dtype=torch.float64, device=self._acting.device)
            known_or_nan = [unknown if scores is None else scores for scores in scores_before_update]
            return torch.stack(known_or_nan).tolist()  # type: ignore[no-any-return]  # one copy for all steps
        scores_by_step = []
        for row in rows:
            values = torch.tensor([row[name] for name in WATCHED]).double()
            scores, _ = self._score(values)
            scores_by_step.append(scores.tolist())
        return scores_by_step

    def _outlier(self, row: dict[str, Any], scores: dict[str, float], first_sample: int) -> Outlier:
        """The record of a step that stands out, with what is to be done about it (`guards.loss`, `guards.grad_norm`).

        `row`: the step's metrics. `scores`: of the loss, the gradient norm or both, whichever stand out; if both do, the
        stronger of their two actions holds. `first_sample`: samples consumed before the step. For a rollback, `began` is the
        step at which the rise began, so that the run returns to a checkpoint from before it.
        """
        step = row["step"]
        actions = [action for name, action in zip(WATCHED, self.actions, strict=True) if name in scores]
        outlier = Outlier(
            step=step,
            values={name: row[name] for name in scores},
            scores=scores,
            action=max(actions, key=list(Action).index),  # Action lists them from weak to strong
            first_sample=first_sample,
            began=step,
        )
        if outlier.action is not Action.rollback:
            return outlier
        # Counts the returns to one checkpoint after which the very next step stood out again.
        self._fruitless = self._fruitless + 1 if step == self._returned_to + 1 else 0
        began = self.levels.began(list(scores))
        if began is None and self._fruitless >= FRUITLESS_RETURNS:
            began = step  # each try had other samples and failed alike: the checkpoint itself is bad, so return further
        return outlier if began is None else self._from_before(outlier, began)

    def _outlier_of_level(self, level: RaisedLevel, step: int, first_sample: int) -> Outlier:
        """The record of a level, found in this step: a loss or gradient norm that has risen and stayed (see levels.py).

        Its updates are made already, so only a rollback helps, and the action `skip` counts as `note`.
        """
        action = self.actions[WATCHED.index(level.name)]
        outlier = Outlier(
            step=step,
            values={level.name: level.value},
            scores={level.name: level.score},
            action=action if action is Action.rollback else Action.note,
            first_sample=first_sample,
            began=level.began,
            is_level=True,
        )
        return self._from_before(outlier, level.began)

    def _from_before(self, outlier: Outlier, began: int) -> Outlier:
        """The outlier as one that began at step `began`, with the samples of all steps from the update that led there.

        The samples stay those of its own step if that update is not remembered.
        """
        update = self.levels.samples_before_update_of(began)
        if update is None:
            return replace(outlier, began=began)
        update_step, first_sample = update
        return replace(outlier, began=began, first_sample=first_sample, num_steps=outlier.step - update_step + 1)

    def _report(self, outlier: Outlier) -> None:
        """Hand a step that stands out to `on_outlier`, on rank 0. Raises RollBack if its action is a rollback."""
        if self.runtime.is_main:
            self.on_outlier(outlier)
        if outlier.action is Action.rollback:
            raise RollBack(outlier)

    def note_return(self, step: int) -> None:
        """Remember that the run went back to the checkpoint of this step."""
        if step != self._returned_to:
            self._fruitless = 0
        self._returned_to = step

    def stop_if_diverged(
        self, rollbacks: int, samples: int, places: Callable[[int, int], list[tuple[int, int]]]
    ) -> None:
        """Raise Diverged, on all ranks, if the run went back too often, or too many updates in a row were left out.

        `rollbacks`: how often the run went back. `samples`: how many it has consumed. `places`: `SampleOrder.places(first,
        count)`. It maps consumed samples to ranges (first, count) in the run's order of samples, which differ once a rollback
        has passed over some; the error names samples by that order.
        """
        # Too many returns to a checkpoint.
        if rollbacks > self.config.max_rollbacks:
            raise Diverged(
                f"the run would go back for the {rollbacks}. time, since a step stood out once more: this is no longer about "
                "single samples; lower optim.lr, raise guards.threshold, or look at the documents in events.jsonl. Limit: "
                "guards.max_rollbacks"
            )
        # Too many updates left out in a row: by the guards, or since gradients were not finite.
        num_skipped = len(self._skipped_in_a_row)
        if num_skipped < self.max_skipped_in_a_row:
            return

        first_consumed, _ = self._skipped_in_a_row[0]
        last_consumed = max(first_consumed, samples - 1)
        first_place, _ = places(first_consumed, 1)[0]
        last_place, _ = places(last_consumed, 1)[0]
        which_samples = f"(samples {first_place} to {last_place} of the run's order)"
        norms_are_finite = all(math.isfinite(norm) for _, norm in self._skipped_in_a_row)
        if norms_are_finite:
            raise Diverged(
                f"the updates of {num_skipped} steps in a row were left out, since their loss or gradient norm stood out "
                f"{which_samples}: this is no longer about single samples; lower optim.lr, raise guards.threshold, or look at "
                "those samples. Limit: optim.max_skipped_steps"
            )
        raise Diverged(
            f"gradients were not finite for {num_skipped} steps in a row {which_samples}; lower optim.lr, use precision=bf16 "
            "instead of fp16, or look at those samples. Limit: optim.max_skipped_steps"
        )
