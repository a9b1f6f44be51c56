"""Runs that learn from rewards (`objective=grpo`): rewards that are cheated, policies that collapse, groups that teach nothing.

Steps are collected in at most `MAX_BLOCKS` blocks of equally many steps. A block has the means of the steps' metrics. If all
are full, neighbours become one, so that a run of any length is judged by 24 to 48 numbers.

- Cheating: what is trained rises while something that was only measured falls. That is a control (a reward of weight 0), or
  `eval/reward`. Either alone is no sign: rewards rise in every good run, and controls hover. Both are tested for a trend
  (Mann and Kendall, one-sided); besides, the fall must be larger than the noise of a block. A control that holds and then
  drops shows no trend: it counts once it lies six standard deviations of its first half below that.
- Collapse: the entropy fell below a tenth of that of the first block; or answers are twice as long, and the reward did not rise.
- Idle: in nine of ten groups all answers score alike.
- No signal, told at the end: in all groups of the whole run, or no step had a gradient.

False alarms, by simulation: `tests/monitors/test_rewards.py`, and the table in docs/evidence/detectors-and-remedies.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from trainer.monitors.base import Finding
from trainer.monitors.config import Reaction, RewardsWatchConfig
from trainer.monitors.trend import rising_p_value

DETECTOR_NAME = "rewards"
MAX_BLOCKS = 48
MIN_BLOCKS = 12
"""Full blocks before which nothing is judged."""
RISING_LEVEL = 0.01
"""Level of the test that the trained reward rises."""
FALLING_LEVEL = 1e-4
"""Level of the test that a control falls. It is looked at after each block, so that chance has many tries."""
MIN_EVALUATIONS = 6
"""Evaluations before which `eval/reward` is not judged."""
COLLAPSED_ENTROPY_SHARE = 0.1
LONGER_ANSWERS_FACTOR = 2.0
END_BLOCKS = 3
"""Blocks at an end of a run whose mean is compared with others."""
MIN_DROP_IN_SPREADS = 6.0
MIN_SPREAD_SHARE = 0.02
"""Spread of a control that hardly varies, as a share of its level: one that was always 1 may fall to 0.88."""
MIN_IDLE_GROUP_SHARE = 0.9
SOLVED_SHARE_OF_BEST_REWARD = 0.95
"""Share of the best block's reward, from which on idle groups are no fault: everything is solved."""
ROUND_STEP_METRIC = "round_step"
"""Metric that says which step of its round a step is, from 0, if rounds are several steps."""
STEPS = "steps"
"""Key of a block: how many steps it has. All other keys are sums over them."""
REWARD, ENTROPY, LENGTH, IDLE_GROUP_SHARE = "reward", "entropy", "completions/mean_length", "frac_reward_zero_std"
"""Metrics of a step: the mean reward, nats a token, tokens of an answer, the share of groups whose answers all score alike."""
CLIPPED_SHARE, GRADIENT_NORM = "completions/clipped_ratio", "grad_norm"
"""Metrics of a step: the share of answers that were cut off by the length limit, and the norm of the gradients."""
NO_SIGNAL = "no signal"
"""Verdict on a whole run in which no step could learn anything."""
LONGER_ANSWERS_REMEDY = "a larger objective.rollout.max_new_tokens, since all answers were cut off"
REMEDIES_BY_VERDICT = {
    "cheated": (
        "read answers: rounds/ in the run directory",
        "give the reward what makes an answer good (`truncated`, a length, a format)",
        "give the control a weight",
        "objective.kl.weight=0.01",
        "an earlier checkpoint: checkpoint=best",
    ),
    "collapsed": (
        "a lower optim.lr",
        "objective.kl.weight=0.01",
        "objective.clip_high=0.28",
        "a larger objective.group_size",
    ),
    "longer": (
        "a reward of kind length",
        "score truncated answers 0",
        "objective.scale=none objective.normalise=constant",
    ),
    "idle": (
        "shardtune evaluate <the words of the run>: rates of the prompts",
        "objective.idle_groups=replace",
        "a larger objective.group_size",
        "prompts that the model solves sometimes",
    ),
    NO_SIGNAL: (
        "rewards that differ between answers to a prompt",
        "prompts that the model solves sometimes",
        "shardtune evaluate <the words of the run>: rates of the prompts",
    ),
}


def add_step_to_blocks(
    blocks: list[dict[str, float]], step_metrics: Mapping[str, Any], control_metrics: Sequence[str]
) -> bool:
    """Add a step to the summary by which the rewards of a run are judged; returns whether the step has filled a block.

    `blocks`, changed in place: the run so far as at most `MAX_BLOCKS` sums of metrics over equally many steps each, oldest
    first, such as {"steps": 8.0, "reward": 3.2}. The newest may not be full. When all are full, neighbours are joined, so
    that blocks become twice as long and a run of any length fits. `control_metrics`: metrics of rewards of weight 0 (controls).
    """
    block_size = int(blocks[0][STEPS]) if len(blocks) > 1 else 1
    if not blocks or blocks[-1][STEPS] >= block_size:
        if len(blocks) == MAX_BLOCKS:
            blocks[:] = [_join_two_blocks(blocks[index], blocks[index + 1]) for index in range(0, MAX_BLOCKS, 2)]
            block_size *= 2
        blocks.append({STEPS: 0.0})
    block = blocks[-1]
    block[STEPS] += 1
    for name in (REWARD, ENTROPY, LENGTH, IDLE_GROUP_SHARE, CLIPPED_SHARE, GRADIENT_NORM, *control_metrics):
        if name in step_metrics:
            block[name] = block.get(name, 0.0) + float(step_metrics[name])
    return block[STEPS] >= block_size


def _join_two_blocks(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    """Join two neighbouring blocks of steps into one: each metric is the sum of both."""
    return {name: first.get(name, 0.0) + second.get(name, 0.0) for name in first | second}


def block_means(blocks: Sequence[Mapping[str, float]], name: str) -> list[float]:
    """The mean of a metric in each full block; empty if a block lacks it."""
    if not blocks:
        return []
    size = blocks[0][STEPS]
    full = [block for block in blocks if block[STEPS] >= size]
    if not all(name in block for block in full):
        return []
    return [block[name] / block[STEPS] for block in full]


def find_problems(
    config: RewardsWatchConfig,
    step: int,
    blocks: Sequence[Mapping[str, float]],
    evaluations: Sequence[Mapping[str, float]],
    controls: Sequence[str],
) -> Iterator[Finding]:
    """Look for what goes wrong in runs that learn from rewards, after each full block of steps and each evaluation.

    Findings have one of these verdicts:

    - `cheated`: the trained reward rises while a control (a reward of weight 0) or `eval/reward` falls.
    - `collapsed`: the entropy fell to a tenth, so that the model hardly explores any more.
    - `longer`: answers became twice as long, and the reward did not rise.
    - `idle`: in nine of ten groups of answers all score alike, and the reward is not simply near its best.

    Nothing is found before `MIN_BLOCKS` full blocks.

    Arguments:
        step: the current step of the run.
        blocks: sums of metrics over equally many steps each, oldest first, such as {STEPS: 8.0, REWARD: 3.2}.
        evaluations: rewards at each, such as {"step": 100, "train": 0.4, "held_out": 0.3}; `train` is the mean since the last
            one.
        controls: names of the metrics of rewards of weight 0.
    """
    reward = block_means(blocks, REWARD)
    if len(reward) < MIN_BLOCKS:
        return
    make_finding = partial(_make_finding, step, config.action is Reaction.stop)
    # Trained reward against controls.
    if rising_p_value(reward) < RISING_LEVEL:
        control_series = {name: block_means(blocks, name) for name in controls}
        for name, values in control_series.items():
            if falls_beyond_noise(values) or drops_below_first_half(values):
                text = f"the trained reward rose from {reward[0]:.3g} to {reward[-1]:.3g} while the control {name} fell"
                yield make_finding("cheated", f"{text} from {values[0]:.3g} to {values[-1]:.3g}", control=values[-1])
    # Trained reward against the held-out one.
    after_start = [evaluation for evaluation in evaluations if evaluation["step"]]
    held_out = [evaluation["held_out"] for evaluation in after_start]
    trained = [evaluation["train"] for evaluation in after_start]
    if (
        len(held_out) >= MIN_EVALUATIONS
        and rising_p_value(trained) < RISING_LEVEL
        and falls_beyond_noise(held_out, RISING_LEVEL)
    ):
        text = f"the trained reward rose from {trained[0]:.3g} to {trained[-1]:.3g} while eval/reward fell"
        yield make_finding("cheated", f"{text} from {held_out[0]:.3g} to {held_out[-1]:.3g}", held_out=held_out[-1])
    yield from _collapse_findings(make_finding, reward, block_means(blocks, ENTROPY), block_means(blocks, LENGTH))
    # Groups that teach nothing.
    idle = block_means(blocks, IDLE_GROUP_SHARE)
    recent_blocks = MIN_BLOCKS // 2
    share = float(np.mean(idle[-recent_blocks:])) if idle else 0.0
    if share >= MIN_IDLE_GROUP_SHARE and not _is_solved(reward, float(np.mean(reward[-recent_blocks:]))):
        yield make_finding(
            "idle", f"in {100 * share:.0f} % of the groups all answers score alike, and teach nothing", idle=share
        )


class NoSignal(NamedTuple):
    """Why a whole run could learn nothing from its rewards."""

    message: str
    remedies: tuple[str, ...]


def no_signal_of_run(blocks: Sequence[Mapping[str, float]]) -> NoSignal | None:
    """Why no step of a run could learn from rewards; None if some step could, or if the run has no blocks of steps.

    Either rewards never differed, so that no answer was better than another, or every gradient was 0, as with
    `objective.mask_truncated` if all answers are cut off. Another learning rate helps in neither case.
    """
    if _mean_over_run(blocks, IDLE_GROUP_SHARE) == 1:
        message = "in every step all answers to a prompt scored alike, so that nothing was learned from them"
    elif _mean_over_run(blocks, GRADIENT_NORM) == 0:
        message = "no step had a gradient, so that nothing was learned"
    else:
        return None
    remedies = REMEDIES_BY_VERDICT[NO_SIGNAL]
    if _mean_over_run(blocks, CLIPPED_SHARE) == 1:
        message += "; all answers were cut off by the length limit"
        remedies = (LONGER_ANSWERS_REMEDY, *remedies)
    return NoSignal(message, remedies)


def _mean_over_run(blocks: Sequence[Mapping[str, float]], name: str) -> float | None:
    """The mean of a metric over all steps; None if there are none, or if a block lacks it, as in a run of an earlier version."""
    if not blocks or any(name not in block for block in blocks):
        return None
    num_steps = sum(block[STEPS] for block in blocks)
    return sum(block[name] for block in blocks) / num_steps


def find_no_signal(config: RewardsWatchConfig, step: int, blocks: Sequence[Mapping[str, float]]) -> Finding | None:
    """The finding, at the end of a run at `step`, that no step of it could learn from rewards; None if some step could."""
    no_signal = no_signal_of_run(blocks)
    if no_signal is None or config.action is Reaction.off:
        return None
    finding = _make_finding(step, ends_run=False, verdict=NO_SIGNAL, message=no_signal.message)
    return replace(finding, remedies=no_signal.remedies)


def _make_finding(step: int, ends_run: bool, verdict: str, message: str, **numbers: float) -> Finding:
    """Make a finding of this detector at `step`, with the remedies of its `verdict`, such as "cheated".

    `ends_run`: whether the run is to end for it (challenges.rewards.action=stop). `numbers`: what was measured, by name.
    """
    return Finding(
        detector=DETECTOR_NAME,
        step=step,
        message=message,
        numbers=numbers,
        remedies=REMEDIES_BY_VERDICT[verdict],
        ends_run=ends_run,
        verdict=verdict,
    )


def _is_solved(reward: Sequence[float], recent: float) -> bool:
    """Whether the model has learned the task, so that idle groups are no fault: rewards rose, and are near the best seen.

    `reward`: the mean reward of each full block of steps. `recent`: their mean over the last blocks.
    """
    level = max(recent, reward[-1])
    is_near_best = level >= SOLVED_SHARE_OF_BEST_REWARD * max(reward)
    return rising_p_value(reward) < RISING_LEVEL and is_near_best and level >= 1.5 * reward[0]


def _collapse_findings(
    make_finding: Callable[..., Finding], mean_rewards: list[float], entropy: list[float], length: list[float]
) -> Iterator[Finding]:
    """Findings `collapsed` (a policy that stopped exploring) and `longer` (answers that grow without more reward).

    `mean_rewards`, `entropy` (nats a token) and `length` (tokens of an answer): means of each full block of steps, oldest
    first; empty if not measured. `make_finding(verdict, text, **numbers)` makes a Finding.
    """
    if entropy and entropy[0] > 0 and entropy[-1] < COLLAPSED_ENTROPY_SHARE * entropy[0]:
        text = f"the entropy fell from {entropy[0]:.3g} to {entropy[-1]:.3g} nats a token: the model hardly explores any more"
        yield make_finding("collapsed", text, entropy=entropy[-1])
    if not length:
        return
    # Single blocks are noisy: where lengths vary much, one of 40 is twice another by chance.
    first_length = float(np.mean(length[:END_BLOCKS]))
    last_length = float(np.mean(length[-END_BLOCKS:]))
    # Above 0.5, rewards fall more often than they rise.
    reward_did_not_rise = rising_p_value(mean_rewards) > 0.5
    if last_length > LONGER_ANSWERS_FACTOR * first_length and reward_did_not_rise:
        text = f"answers grew from {first_length:.0f} to {last_length:.0f} tokens, and the reward did not rise"
        yield make_finding("longer", text, length=last_length)


def p_value_corrected_for_autocorrelation(p_value: float, values: Sequence[float]) -> float:
    """Correct the p-value of a trend in more than four `values` for noise that carries over from one value to the next.

    Such noise looks like a trend: the variance of the test's score grows by (1 + r) / (1 - r), where r is the correlation of
    neighbours around a straight line (Bayley and Hammersley 1946). In a short series, r comes out too small by (2 + 4 r) / n
    (Marriott and Pope 1954, with a line taken off), which is undone.
    """
    count = len(values)
    positions = np.arange(count)
    fitted_line = np.polyval(np.polyfit(positions, values, 1), positions)
    residuals = np.asarray(values) - fitted_line
    sum_of_squares = float(np.dot(residuals, residuals))
    if sum_of_squares <= 1e-12 * float(np.ptp(values)) ** 2:  # a straight line has no noise but rounding
        return p_value
    sample_correlation = float(np.dot(residuals[1:], residuals[:-1])) / sum_of_squares
    # sample_correlation = r - (2 + 4 r) / n, solved for r. At r = 1 the variance would be infinite.
    correlation = min(0.98, max(0.0, (sample_correlation + 2 / count) / (1 - 4 / count)))
    normal = NormalDist()
    # A p-value of exactly 0 or 1 would have an infinite score.
    score = normal.inv_cdf(1 - min(1 - 1e-15, max(1e-15, p_value)))
    return 1 - normal.cdf(score * math.sqrt((1 - correlation) / (1 + correlation)))


def drops_below_first_half(values: Sequence[float]) -> bool:
    """Whether the last values of a series lie far below its first half: a fall that comes late, which a trend does not show.

    `values`: the mean of a control (a reward of weight 0) in each block of steps, oldest first. Far is six standard
    deviations of the first half. If the control drifts, that widens the deviation, so that a drop within its usual drift
    does not count.
    """
    if len(values) < MIN_BLOCKS:
        return False
    first_half = np.asarray(values[: len(values) // 2])
    level = float(first_half.mean())
    spread = max(float(first_half.std()), MIN_SPREAD_SHARE * abs(level))
    return level - float(np.mean(values[-END_BLOCKS:])) > MIN_DROP_IN_SPREADS * spread


def falls_beyond_noise(values: Sequence[float], level: float = FALLING_LEVEL) -> bool:
    """Whether a series falls: by its trend, and by more than its noise.

    `values`: of a control (a reward of weight 0) or `eval/reward`, oldest first. `level`: of the trend's test. The fall is
    that from the mean of the first quarter of the values to that of the last.
    """
    if len(values) < MIN_EVALUATIONS:
        return False
    p_value_of_fall = rising_p_value([-value for value in values])
    if p_value_corrected_for_autocorrelation(p_value_of_fall, values) > level:
        return False
    quarter = max(1, len(values) // 4)
    first_mean = float(np.mean(values[:quarter]))
    last_mean = float(np.mean(values[-quarter:]))
    # Differences of neighbours have twice the variance of the noise, whatever the trend is.
    noise = float(np.std(np.diff(values))) / np.sqrt(2)
    return first_mean - last_mean > noise
