"""Judges every step: which ones stand out, which updates are skipped, and when a run has diverged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from strategies.base import UpdateFilter
from strategies.errors import Diverged
from strategies.runtime import Runtime, sum_over_ranks
from trainer.monitors.guard_config import Action, GuardsConfig
from trainer.monitors.levels import LevelShiftDetector, SustainedRise
from trainer.monitors.replicas import ReplicaCheck
from trainer.monitors.rolling import RollingWindow

WATCHED_METRICS = ("loss", "grad_norm")
"""Numbers of a step that are judged, in the order of the window's columns."""
MAX_FRUITLESS_ROLLBACKS_TO_ONE_CHECKPOINT = 2
"""Returns to one checkpoint, each of which was followed by a step that stands out, after which it is taken for bad itself."""
OUTLIER_KEYS = {name: f"outlier/{name}" for name in WATCHED_METRICS}
"""For each watched number, the key of a row with its score if it stands out."""


class UnjudgedStep(NamedTuple):
    """A step that was taken and not judged yet."""

    first_sample: int
    """How many samples the run had consumed before it."""
    deviations: Tensor | None
    """As in `JudgedStep`, if it was judged before its update; else None."""


class JudgedStep(NamedTuple):
    """The judgement on a step, on the device."""

    deviations: Tensor
    """float64 [2]: how many robust standard deviations its loss and gradient norm lie above the median of the last steps. NaN if
    unknown or reported before."""
    is_left_out: Tensor
    """0-d bool: whether its update is left out."""


class SkippedStep(NamedTuple):
    """A step whose update was left out."""

    first_sample: int
    """How many samples the run had consumed before it."""
    grad_norm: float


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

    def sample_ranges(
        self, num_consumed: int, global_batch: int, position_ranges: Callable[[int, int], list[tuple[int, int]]]
    ) -> list[dict[str, int]]:
        """The samples that may have caused the outlier, for a rollback, which leaves them out of the rest of the run.

        As ranges of positions in the run's shuffled order, such as [{"first": 640, "count": 32}]. `num_consumed`: samples
        that the run has consumed so far. `position_ranges`: `SampleOrder.position_ranges`, which maps them to positions.
        """
        # Steps of one round consume its samples once, so that several steps may have fewer than a batch each.
        num_since_first = num_consumed - self.first_sample
        num_samples = min(self.num_steps * global_batch, max(num_since_first, global_batch))
        return [{"first": first, "count": count} for first, count in position_ranges(self.first_sample, num_samples)]


class RollBack(Exception):
    """Raised on all ranks alike: the run is to continue from a checkpoint before this, without its samples."""

    def __init__(self, outlier: Outlier) -> None:
        super().__init__(f"step {outlier.step} stands out")
        self.outlier = outlier


class Guards:
    """Judges each step, alike on all ranks.

    If no update may be left out, steps are judged when their numbers are read anyway, once a logging interval. If one may,
    they are judged before the update and on the device: the loss is summed over the ranks in each step, and nothing is
    waited for beyond what the optimizer waits for by itself.
    """

    def __init__(
        self,
        config: GuardsConfig,
        max_skipped_in_a_row: int,
        runtime: Runtime,
        on_outlier: Callable[[Outlier], None] = lambda outlier: None,
    ) -> None:
        """`config`: what is done about a loss or gradient norm that stands out. `on_outlier`: called with it, on rank 0.

        `max_skipped_in_a_row`: so many updates in a row that are left out end the run.
        """
        self.config = config
        self.runtime = runtime
        self.max_skipped_in_a_row = max_skipped_in_a_row
        self.on_outlier = on_outlier
        self.action_by_metric = {"loss": config.loss, "grad_norm": config.grad_norm}
        """In the order of `WATCHED_METRICS`."""
        actions = list(self.action_by_metric.values())
        self.may_skip_updates = Action.skip in actions
        self.may_roll_back = Action.rollback in actions
        self.replicas = ReplicaCheck(config.replicas_every_steps, runtime)
        # Only an update that may be skipped is judged on the device; else the numbers are on the host already.
        device = runtime.device if self.may_skip_updates else torch.device("cpu")
        self._has_action = torch.tensor([action is not Action.note for action in actions], device=device)
        """bool [2]: whether more than a note is made of a loss, and of a gradient norm, that stands out."""
        self._window = RollingWindow(config.window, device)
        """The last steps that were not bad, with which new ones are compared."""
        self.level_shifts = LevelShiftDetector(config.threshold, config.window)
        self._last_rollback_step = -1
        """Step of the checkpoint that the run went back to last; -1 if it never did."""
        self._num_fruitless_rollbacks = 0
        """How often in a row the very next step after that checkpoint stood out again."""
        self._unjudged_steps: list[UnjudgedStep] = []
        """The steps since the last call of `mark_outliers`."""
        self._deviations_before_update: Tensor | None = None
        """The deviations of the step that is being taken, once the engine has called its update filter."""
        self._skipped_in_a_row: list[SkippedStep] = []
        """The last steps, as far as the updates of all of them were left out."""

    def restore_recent_steps(self, recent: list[dict[str, float]], level_rows: Sequence[dict[str, float]] = ()) -> None:
        """Set the guards back to what they knew at a checkpoint, when a run is resumed from it or rolled back to it.

        `recent`: loss and gradient norm of the steps in the window at that time, oldest first, with which later steps are
        compared, such as [{"loss": 2.1, "grad_norm": 0.8}, ...]. `level_rows`: the `rows` of its `LevelShiftDetector`, which
        looks for numbers that rise and stay. What was judged after that checkpoint is forgotten.
        """
        self.level_shifts = LevelShiftDetector(self.config.threshold, self.config.window, level_rows)
        rows = []
        for step in recent:
            rows.append([step[name] for name in WATCHED_METRICS])
        self._window = RollingWindow(self.config.window, self._window.window.device, rows)
        self._unjudged_steps = []
        self._deviations_before_update = None  # no step is being taken
        self._skipped_in_a_row = []

    def recent_steps(self) -> list[dict[str, float]]:
        """Loss and gradient norm of each step in the window, oldest first, for a checkpoint. Waits for the device."""
        return [dict(zip(WATCHED_METRICS, row, strict=True)) for row in self._window.rows()]

    # -- in a step -------------------------------------------------------------------------------------------------------

    def update_filter(self, local_loss: Tensor, count: float) -> UpdateFilter | None:
        """The function by which the engine asks, just before it updates the weights, whether to leave this step's update out.

        The engine calls it with the gradient norm; all ranks must call. It also keeps how far the step stands out, for
        `record_step`. None unless `guards.loss` or `guards.grad_norm` is `skip`: no update is left out then.

        Arguments:
            local_loss: this rank's sum of the loss over the step.
            count: tokens or sequences of the step on all ranks, by which the loss is divided.
        """
        if not self.may_skip_updates:
            return None
        return partial(self._judge_update, local_loss, count)

    def _judge_update(self, local_loss: Tensor, count: float, grad_norm: Tensor) -> Tensor:
        """Judge the step that is being taken, before its update: returns whether to leave it out (0-d bool, on the device).

        Keeps how far the step stands out in `_deviations_before_update`. A collective: all ranks must call, and all get the
        same answer. `local_loss`, `count`: see `update_filter`. `grad_norm`: of the gradients of all ranks.
        """
        # Summed over the ranks, the first is the loss a token (or sequence). The second is the mean of the ranks' norms, which
        # should be equal: with their mean, no rank can come to another answer by rounding.
        # `count` is 0 if no rank has a supervised token: the loss is then 0 too.
        values = torch.stack([local_loss.double() / (count or 1), grad_norm.double() / self.runtime.world_size])
        if self.runtime.world_size > 1:
            values = sum_over_ranks(values)
        judged = self._judge_and_add_to_window(values)
        self._deviations_before_update = judged.deviations
        return judged.is_left_out

    def record_step(self, first_sample: int) -> None:
        """Remember a step that was taken, with its deviations if it was judged before its update, for `mark_outliers`."""
        self._unjudged_steps.append(UnjudgedStep(first_sample, self._deviations_before_update))
        self._deviations_before_update = None

    def _judge_and_add_to_window(self, values: Tensor) -> JudgedStep:
        """Judge a step against the window of the last steps, and add it to the window unless it is bad.

        `values` (float64 [2]): its loss and gradient norm. A number stands out if it lies more than `guards.threshold`
        robust standard deviations above the window's median. It is at a level if it stands out in two steps running.

        A step joins the window unless its update is left out or its loss is at a level: a run that has become bad must not
        become the measure of its own steps. A level of the gradient norm alone joins, since norms may rise for good reasons.
        A level is reported once: at its later steps the deviation is NaN, except for a number whose action is to leave out
        the update. Nothing waits for the device.
        """
        deviations = self._window.scores(values)
        # NaN compares as false: a step whose deviation is unknown never stands out.
        stands_out = deviations > self.config.threshold
        is_left_out = (stands_out & self._has_action).any()
        # The first step of a level has joined the window, and the others have not: it is the newest one there.
        is_level = stands_out & (self._window.newest_scores() > self.config.threshold)
        joins_window = values.isfinite().all() & ~is_left_out & ~is_level[0]
        self._window.push(values, joins_window)
        # A loss at a level has been reported before, and a gradient norm beside it is the same news.
        is_reported_before = (is_level | is_level[0]) & ~self._has_action
        reported_deviations = torch.where(is_reported_before, torch.nan, deviations)
        return JudgedStep(deviations=reported_deviations, is_left_out=is_left_out)

    # -- between steps ---------------------------------------------------------------------------------------------------

    def mark_outliers(self, rows: list[dict[str, Any]]) -> None:
        """Judge the steps of a logging interval: add the scores of what stands out to `rows`, and report it.

        `rows`: the metrics of each step since the last call, equal on all ranks. A number gets the key `outlier/NAME` with
        its score if it stands out in its step (a spike), or has risen and stayed (a level). Each is reported to
        `on_outlier`. Raises RollBack at the first one whose action is a rollback; the later rows are then not judged.
        """
        taken_steps = self._unjudged_steps
        self._unjudged_steps = []
        if not rows:
            return
        if self.may_skip_updates:
            deviations_by_step = self._deviations_from_before_updates(taken_steps)
        else:
            deviations_by_step = self._judge_steps_by_rows(rows)
        for row, taken_step, deviations in zip(rows, taken_steps, deviations_by_step, strict=True):
            self._mark_outliers_of_step(row, taken_step.first_sample, deviations)
            self._count_skipped(row, taken_step.first_sample)

    def _mark_outliers_of_step(self, row: dict[str, Any], first_sample: int, deviations: list[float]) -> None:
        """Find out whether a step is a spike, or shows that a number has risen and stayed; mark `row`, and report each.

        `deviations`: robust standard deviations of its loss and gradient norm above the median. Raises RollBack.
        """
        spike_scores: dict[str, float] = {}
        for name, deviation in zip(WATCHED_METRICS, deviations, strict=True):
            if deviation > self.config.threshold:
                spike_scores[name] = deviation
                row[OUTLIER_KEYS[name]] = deviation
        if spike_scores:
            outlier = self._outlier_of_spike(row, spike_scores, first_sample)
            if outlier.action is Action.rollback:
                outlier = self._count_rollback_and_extend_to_cause(outlier)
            self._report_or_roll_back(outlier)
        # A number that is a spike in this step is not reported once more as a rise.
        for rise in self.level_shifts.add_step(row, first_sample, reported_names=list(spike_scores)):
            row[OUTLIER_KEYS[rise.metric]] = rise.deviation
            self._report_or_roll_back(self._outlier_of_sustained_rise(rise, row["step"], first_sample))

    def _count_skipped(self, row: dict[str, Any], first_sample: int) -> None:
        """Count the updates in a row that were left out, up to the step of this row; `raise_if_diverged` reads them."""
        if row.get("skipped"):
            self._skipped_in_a_row = [*self._skipped_in_a_row, SkippedStep(first_sample, row["grad_norm"])]
        else:
            self._skipped_in_a_row = []

    def _deviations_from_before_updates(self, taken_steps: list[UnjudgedStep]) -> list[list[float]]:
        """How far each step stands out, by its judgement before the update: [steps][2], loss and gradient norm, on the host.

        NaN, which never stands out, if the engine did not call the update filter.
        """
        unknown = torch.full((len(WATCHED_METRICS),), torch.nan, dtype=torch.float64, device=self._has_action.device)
        known_or_nan = [unknown if step.deviations is None else step.deviations for step in taken_steps]
        return torch.stack(known_or_nan).tolist()  # type: ignore[no-any-return]  # one copy for all steps

    def _judge_steps_by_rows(self, rows: list[dict[str, Any]]) -> list[list[float]]:
        """How far each step stands out, by its numbers in `rows`: [steps][2], loss and gradient norm. Steps join the window."""
        deviations_by_step = []
        for row in rows:
            values = torch.tensor([row[name] for name in WATCHED_METRICS]).double()
            deviations_by_step.append(self._judge_and_add_to_window(values).deviations.tolist())
        return deviations_by_step

    def _outlier_of_spike(self, row: dict[str, Any], scores: dict[str, float], first_sample: int) -> Outlier:
        """Record a single step that stands out (a spike), with what is to be done about it (`guards.loss`, `guards.grad_norm`).

        `row`: the step's metrics. `scores`: standard deviations above the median, of the loss, the gradient norm or both,
        whichever stand out; if both do, the stronger of their two actions holds. `first_sample`: samples consumed before the
        step.
        """
        step = row["step"]
        actions = [action for name, action in self.action_by_metric.items() if name in scores]
        return Outlier(
            step=step,
            values={name: row[name] for name in scores},
            scores=scores,
            action=max(actions, key=list(Action).index),  # Action lists them from weak to strong
            first_sample=first_sample,
            began=step,
        )

    def _count_rollback_and_extend_to_cause(self, outlier: Outlier) -> Outlier:
        """An outlier of one step whose action is a rollback, extended to its cause, so that the run goes back to before that.

        - The number rose already before this step: the record begins where the rise began.
        - The run went back to one checkpoint several times, and the very next step stood out each time: the checkpoint itself is
          bad. The record includes the update that led to it.
        - Otherwise: the record as it is.

        Also counts the rollbacks to one checkpoint that were in vain.
        """
        was_last_rollback_in_vain = outlier.step == self._last_rollback_step + 1
        self._num_fruitless_rollbacks = self._num_fruitless_rollbacks + 1 if was_last_rollback_in_vain else 0
        first_step = self.level_shifts.first_step_of_rise(list(outlier.scores))
        if first_step is None and self._num_fruitless_rollbacks >= MAX_FRUITLESS_ROLLBACKS_TO_ONE_CHECKPOINT:
            first_step = outlier.step  # each attempt had other samples and failed alike
        return outlier if first_step is None else self._outlier_since_step(outlier, first_step)

    def _outlier_of_sustained_rise(self, rise: SustainedRise, step: int, first_sample: int) -> Outlier:
        """The record of a loss or gradient norm that has risen and stayed, which was found in this step.

        Its updates are made already, so only a rollback helps, and the action `skip` counts as `note`. It begins with the
        first step of the rise, and its samples with those of the update that led there.
        """
        action = self.action_by_metric[rise.metric]
        outlier = Outlier(
            step=step,
            values={rise.metric: rise.median_now},
            scores={rise.metric: rise.deviation},
            action=action if action is Action.rollback else Action.note,
            first_sample=first_sample,
            began=rise.first_step,
            is_level=True,
        )
        return self._outlier_since_step(outlier, rise.first_step)

    def _outlier_since_step(self, outlier: Outlier, first_step: int) -> Outlier:
        """Extend an outlier back to the step at which the rise began, so that its cause is among the samples that are left out.

        Its samples become those of all steps from the one before `first_step`, whose update led to the rise. If that step is
        not remembered any more, they stay those of the outlier's own step.
        """
        step_before = self.level_shifts.step_before(first_step)
        if step_before is None:
            return replace(outlier, began=first_step)
        num_steps = outlier.step - step_before.step + 1
        return replace(outlier, began=first_step, first_sample=step_before.first_sample, num_steps=num_steps)

    def _report_or_roll_back(self, outlier: Outlier) -> None:
        """Hand an outlier to `on_outlier`, on rank 0. Then raise RollBack, on all ranks, if its action is a rollback."""
        if self.runtime.is_main:
            self.on_outlier(outlier)
        if outlier.action is Action.rollback:
            raise RollBack(outlier)

    def record_rollback(self, step: int) -> None:
        """Remember that the run went back to the checkpoint of this step."""
        if step != self._last_rollback_step:
            self._num_fruitless_rollbacks = 0
        self._last_rollback_step = step

    def raise_if_diverged(
        self, num_rollbacks: int, num_consumed: int, position_ranges: Callable[[int, int], list[tuple[int, int]]]
    ) -> None:
        """Raise Diverged, on all ranks, if the run went back too often, or too many updates in a row were left out.

        `num_rollbacks`: how often the run went back. `num_consumed`: samples that it has consumed. `position_ranges(first,
        count)`: the consumed samples as ranges (first, count) in the run's order of samples, such as [(640, 32)]. The two
        differ once a rollback has passed over some; the error names samples by that order.
        """
        # Too many returns to a checkpoint.
        if num_rollbacks > self.config.max_rollbacks:
            raise Diverged(
                f"the run would go back for the {num_rollbacks}. time, since a step stood out once more: this is no longer about "
                "single samples; lower optim.lr, raise guards.threshold, or look at the documents in events.jsonl. Limit: "
                "guards.max_rollbacks"
            )
        # Too many updates left out in a row: by the guards, or by the engine, since gradients were not finite.
        num_skipped = len(self._skipped_in_a_row)
        if num_skipped < self.max_skipped_in_a_row:
            return

        first_consumed = self._skipped_in_a_row[0].first_sample
        last_consumed = max(first_consumed, num_consumed - 1)  # a round's samples count as consumed after its last step
        # Users find samples by their position in the order, which differs from their number once a rollback left some out.
        first_position, _ = position_ranges(first_consumed, 1)[0]
        last_position, _ = position_ranges(last_consumed, 1)[0]
        which_samples = f"(samples {first_position} to {last_position} of the run's order)"
        norms_are_finite = all(math.isfinite(skipped.grad_norm) for skipped in self._skipped_in_a_row)
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
