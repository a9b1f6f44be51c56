"""Divergence: a run whose losses are worse than at its own beginning, in training and on held-out data.

The loss of a uniform guess, ln(vocabulary), is no yardstick: IPO begins at 25 and random weights may begin at 38, while a model
that collapses to a plateau stays below it. So a run is compared with its first step, whose loss is taken before any update, and
with the evaluation before that step.

Held-out losses are paired by micro-batch, which holds the same documents in each evaluation. A rise is clear if its one-sided
lower bound is above 0, at a level of 5 % over all evaluations of a run. Objectives over preferences go by their margin instead:
their loss can rise while the model ranks answers better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from statistics import fmean, median, stdev

from trainer.monitors import forgetting, overfitting
from trainer.monitors.base import Finding
from trainer.monitors.config import DivergenceConfig, Reaction

DETECTOR_NAME = "divergence"
LOSS = "eval/loss"
MARGIN_METRIC = "eval/margin"
MIN_FIRST_JUDGED_STEP = 20
"""Step before which nothing is judged, whatever the warm-up."""
MIN_WINDOW = 10
MAX_WINDOW = 100
"""The training loss now is the median of the last steps: a tenth of the run's, within these bounds."""
MIN_TRAINING_RISE_SHARE = 0.10
"""Share by which the training loss must exceed that of step 1, if there is held-out data too."""
MIN_TRAINING_RISE_SHARE_WITHOUT_HELD_OUT = 0.25
"""Share by which the training loss must exceed that of step 1, if there is no held-out data."""
MIN_DEVIATIONS = 3
"""Robust standard deviations by which it must exceed that, besides."""
DEVIATIONS_PER_MAD = 1.4826
"""Standard deviations of normal values in one median absolute deviation."""
MIN_HELD_OUT_RISE_SHARE = 0.01
"""Share by which the held-out loss must exceed that before training, with a paired test."""
MIN_UNPAIRED_HELD_OUT_RISE_SHARE = 0.25
"""Share by which the held-out loss must exceed that before training, with too few micro-batches for a test."""
MIN_LOSS = 0.05
"""Loss below which a rise is a share of this value: a student that begins as its own teacher begins at 0."""
LEVEL = 0.05
"""How often, at most, a run that gets no worse is said to get worse."""
MIN_BATCHES = 8
"""Micro-batches below which there is no paired test."""
DIVERGENCE_REMEDIES = (
    "a lower optim.lr",
    "schedule.warmup_share=0.1",
    "optim.max_grad_norm=1",
    "challenges.divergence.action=stop (ends such a run early)",
)


class Verdict(StrEnum):
    """What is wrong with a run."""

    diverged = "diverged"
    worse = "worse than before training"
    """Held-out data alone: overfitting or forgetting."""


@dataclass(frozen=True, slots=True)
class HeldOutChange:
    """A held-out metric now beside what it was before the first step."""

    metric: str
    before: float
    now: float
    rise: float
    """How much worse it got: of a loss as a share of the one before, of a margin in its own unit."""
    bound: float | None = None
    """One-sided lower bound of `rise`; None if there are too few micro-batches."""

    @property
    def is_worse(self) -> bool | None:
        """Whether it is clearly worse than before; None if the difference is too uncertain."""
        if not math.isfinite(self.now):
            return True
        if self.metric == MARGIN_METRIC:
            return None if self.bound is None else self.bound > 0
        if self.bound is None:
            return self.rise > MIN_UNPAIRED_HELD_OUT_RISE_SHARE
        return self.rise > MIN_HELD_OUT_RISE_SHARE and self.bound > 0

    @property
    def text(self) -> str:
        """The change in words: both values, and how sure the difference is."""
        if self.metric == MARGIN_METRIC:
            change = f"{-self.rise:+.4f}"
        else:
            change = f"{self.rise:+.1%}"
        certainty = "" if self.bound is None else ", clear in a paired test over micro-batches"
        return f"{self.metric} from {self.before:.4f} to {self.now:.4g} ({change}{certainty})"


@dataclass(frozen=True, slots=True)
class TrainingChange:
    """The training loss now beside that of step 1."""

    first: float
    """Loss of step 1, before any update."""
    now: float
    """Median of the last steps."""
    deviations: float
    """How far `now` is above `first`, in robust standard deviations of the last steps."""
    steps: int
    """How many last steps that are."""

    def rose_by(self, share: float) -> bool:
        """Whether the training loss rose by this share of the first one, and beyond what batches differ by."""
        limit = self.first + share * _reference_loss(self.first)
        return self.now > limit and self.deviations > MIN_DEVIATIONS

    @property
    def text(self) -> str:
        """The change in words."""
        return f"the training loss went from {self.first:.4g} at step 1 to {self.now:.4g} (median of the last {self.steps} steps)"


def num_steps_of_loss_median(total_steps: int) -> int:
    """How many last steps the training loss now is the median of: a tenth of the run's, within bounds."""
    return max(MIN_WINDOW, min(MAX_WINDOW, total_steps // 10))


def first_judged_step(warmup_steps: int) -> int:
    """The first step at which a run is judged: losses may rise while the learning rate warms up."""
    return max(MIN_FIRST_JUDGED_STEP, warmup_steps)


def training_change(first_loss: float | None, recent_losses: Sequence[float], window: int) -> TrainingChange | None:
    """Measure how far the training loss rose since step 1, to tell whether a run has diverged.

    The loss now is the median of the last `window` steps.
    `recent_losses`: of the last steps, oldest first, `window` of them or more. The rise is stated in standard deviations of
    single steps. None if there are too few losses, or `first_loss`, that of step 1, is not known.
    """
    if first_loss is None or len(recent_losses) < window:
        return None
    compared_first = first_loss
    compared_losses = list(recent_losses)
    if first_loss > 0 and min(recent_losses) > 0:
        # A diverged loss jumps by factors: on a linear scale its own deviation would hide it.
        compared_first = math.log(first_loss)
        compared_losses = [math.log(loss) for loss in recent_losses]
    rise = median(compared_losses[-window:]) - compared_first
    spread = _robust_spread(compared_losses, window)
    deviations = rise / spread if spread else math.copysign(math.inf, rise)
    return TrainingChange(first=first_loss, now=median(recent_losses[-window:]), deviations=deviations, steps=window)


def _robust_spread(values: Sequence[float], window: int) -> float:
    """By how much the losses of single steps vary: a standard deviation by medians, so that a few outliers do not widen it.

    `values`: losses (or their logarithms) of at least two steps, oldest first.

    The larger of two: that of the last `window` values around their median, and that of the differences from step to step,
    which has more values and knows no trend. Ten values alone look calm by chance once in some tens of runs.
    """
    last_values = values[-window:]
    middle = median(last_values)
    spread_around_median = DEVIATIONS_PER_MAD * median(abs(value - middle) for value in last_values)
    differences = [abs(later - earlier) for earlier, later in pairwise(values)]
    # A difference of two independent values has twice the variance of one.
    spread_between_steps = DEVIATIONS_PER_MAD * median(differences) / math.sqrt(2)
    return max(spread_around_median, spread_between_steps)


def held_out_change(
    metric: str,
    before: float,
    now: float,
    paired_batch_sums: tuple[Sequence[float], Sequence[float]] | None,
    significance_level: float,
) -> HeldOutChange:
    """Measure how much worse a held-out metric is than before the first step, with a bound from a paired test where possible.

    Arguments:
        metric: the margin of preference pairs, which is better if higher, or a loss.
        before: its value before the first step.
        now: its value at this step.
        paired_batch_sums: its sums over each micro-batch, before and now; None if they are not the same micro-batches.
        significance_level: of the one-sided test, such as 0.05.
    """
    is_margin = metric == MARGIN_METRIC
    if is_margin:
        worsening = before - now
    else:
        worsening = (now - before) / _reference_loss(before)
    bound = None
    # The paired test of a loss divides by the sums before training, which are close to 0 for a small loss.
    is_too_small = not is_margin and abs(before) < MIN_LOSS
    if paired_batch_sums is not None and not is_too_small:
        sums_before, sums_now = paired_batch_sums
        # A rank that has run out of documents has an empty micro-batch, which sums to 0 and is left out.
        pairs = [(old, new) for old, new in zip(sums_before, sums_now, strict=True) if old or new]
        all_finite = all(math.isfinite(old) and math.isfinite(new) for old, new in pairs)
        if len(pairs) >= MIN_BATCHES and all_finite:
            if is_margin:
                bound = _bound_of_margin_drop(pairs, significance_level)
            else:
                bound = _bound_of_loss_rise(worsening, pairs, significance_level)
    return HeldOutChange(metric=metric, before=before, now=now, rise=worsening, bound=bound)


def _bound_of_margin_drop(pairs: Sequence[tuple[float, float]], level: float) -> float:
    """The one-sided lower bound of the mean drop of a margin. Only its sign counts.

    `pairs`: (sum before, sum now) of the margin over each micro-batch. Sums, unlike the metric, are no means over preference
    pairs.
    """
    drops = [old - new for old, new in pairs]
    standard_error = stdev(drops) / math.sqrt(len(drops))
    return fmean(drops) - _paired_t_quantile(pairs, level) * standard_error


def _bound_of_loss_rise(rise: float, pairs: Sequence[tuple[float, float]], level: float) -> float:
    """The one-sided lower bound of the `rise` of a loss, as a share. `pairs`: (sum before, sum now) over each micro-batch."""
    sums_before = [before for before, _ in pairs]
    sums_now = [now for _, now in pairs]
    standard_error = forgetting.standard_error_of_ratio(sums_before, sums_now)
    return rise - _paired_t_quantile(pairs, level) * standard_error


def _paired_t_quantile(pairs: Sequence[tuple[float, float]], level: float) -> float:
    """Student's quantile for a one-sided test at `level` on paired values."""
    return forgetting.student_t_quantile(1 - level, len(pairs) - 1)


def _reference_loss(loss: float) -> float:
    """What a rise of a loss is a share of: the loss itself, but at least `MIN_LOSS`."""
    return max(abs(loss), MIN_LOSS)


def divergence_verdict(training: TrainingChange | None, held_out: HeldOutChange | None) -> Verdict | None:
    """Decide from the training loss and a held-out metric whether a run has diverged or got worse; None if nothing is wrong.

    Either argument is None if it could not be compared. The cases, in their order:
    - No held-out metric: `diverged` if the training loss rose very far, else None.
    - The held-out metric is not worse: None, whatever the training loss, which can rise by chance or by harder data.
    - It is no number any more, or the training loss rose too: `diverged`.
    - The held-out metric alone is worse, as with overfitting or forgetting: `worse`.
    """
    is_worse = None if held_out is None else held_out.is_worse
    if is_worse is None:
        training_diverged = training is not None and training.rose_by(MIN_TRAINING_RISE_SHARE_WITHOUT_HELD_OUT)
        return Verdict.diverged if training_diverged else None
    if not is_worse:
        return None
    # A model whose held-out loss is no number any more has not overfitted, however low its training loss is.
    is_broken = held_out is not None and not math.isfinite(held_out.now)
    diverged = is_broken or (training is not None and training.rose_by(MIN_TRAINING_RISE_SHARE))
    return Verdict.diverged if diverged else Verdict.worse


def divergence_finding(
    config: DivergenceConfig, step: int, training: TrainingChange | None, held_out: HeldOutChange | None
) -> Finding | None:
    """Report that a run is worse than at its own beginning, with what to do about it; None if it is not worse.

    `training`, `held_out`: how the training loss and the held-out metric changed since then; None if not known.

    The remedies are

    - for a run that is `worse` though its training loss fell: those against overfitting;
    - for another run that is `worse`: those against forgetting;
    - for a run that has `diverged`: those against divergence.
    """
    verdict = divergence_verdict(training, held_out)
    if verdict is None:
        return None
    remedies: tuple[str, ...] = DIVERGENCE_REMEDIES
    meaning = ""
    if verdict is Verdict.worse and training is not None and training.now < training.first:
        remedies = overfitting.REMEDIES
        meaning = "; the run overfits"
    elif verdict is Verdict.worse:
        remedies = forgetting.REMEDIES
        meaning = "; the run forgets what the model knew"

    changes = [change.text for change in (training, held_out) if change is not None]
    numbers: dict[str, float] = {}
    if training is not None:
        numbers |= {"training_before": training.first, "training_now": training.now}
    if held_out is not None:
        numbers |= {"before": held_out.before, "now": held_out.now, "rise": held_out.rise}
        if held_out.bound is not None:
            numbers["bound"] = held_out.bound
    return Finding(
        detector=DETECTOR_NAME,
        step=step,
        message=f"{verdict}: {', '.join(changes)}{meaning}",
        numbers=numbers,
        remedies=remedies,
        ends_run=verdict is Verdict.diverged and config.action is Reaction.stop,
        verdict=verdict,
    )
