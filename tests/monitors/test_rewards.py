"""What is said of rewards: cheating, collapse and idle groups; blocks of any length; and false alarms on noise."""

import numpy as np
import pytest

from strategies.base import Progress
from trainer.monitors import rewards
from trainer.monitors.config import ChallengesConfig, Reaction, RewardsWatchConfig
from trainer.monitors.detectors import ChallengeDetectors

CONTROL = "rewards/control/mean"


def verdicts(rows, controls=(CONTROL,), evaluations=()):
    """The verdicts on a run, and the step at which each was first found."""
    blocks, found = [], {}
    for step, row in enumerate(rows, start=1):
        if rewards.add_step_to_blocks(blocks, row, controls):
            for finding in rewards.find_problems(RewardsWatchConfig(), step, blocks, evaluations, controls):
                found.setdefault(finding.verdict, step)
    return found


def rows_of(reward, control=None, **others):
    names = {rewards.REWARD: reward, CONTROL: control, **others}
    given = {name: values for name, values in names.items() if values is not None}
    return [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]


@pytest.mark.parametrize("steps", [1, 2, 47, 48, 49, 96, 97, 400])
def test_blocks_hold_the_mean_of_every_full_block(steps):
    blocks = []
    for value in range(steps):
        rewards.add_step_to_blocks(blocks, {rewards.REWARD: value}, ())
    assert sum(block[rewards.STEPS] for block in blocks) == steps
    assert len(blocks) <= rewards.MAX_BLOCKS
    size = int(blocks[0][rewards.STEPS])
    means = rewards.block_means(blocks, rewards.REWARD)
    assert means == [pytest.approx(number * size + (size - 1) / 2) for number in range(steps // size)]


def test_a_control_that_falls_while_the_reward_rises_is_cheating():
    drawn = np.random.default_rng(0)
    steps = np.arange(60)
    reward = 0.1 + 0.01 * steps + drawn.normal(0, 0.05, 60)
    control = 0.8 - 0.01 * steps + drawn.normal(0, 0.05, 60)
    assert verdicts(rows_of(reward, control)).keys() == {"cheated"}
    assert not verdicts(rows_of(reward, -control))
    assert not verdicts(rows_of(np.full(60, 0.5) + drawn.normal(0, 0.05, 60), control))


def test_a_control_that_holds_and_then_drops_is_cheating():
    """As in a run of the small model of benchmarks/challenges: the language held for 40 steps, and was gone after 60."""
    drawn = np.random.default_rng(0)
    control = np.concatenate([np.full(40, 0.7), np.linspace(0.7, 0.05, 20)]) + drawn.normal(0, 0.03, 60)
    reward = np.concatenate([np.linspace(0.1, 0.4, 40), np.linspace(0.4, 0.95, 20)]) + drawn.normal(0, 0.03, 60)
    found = verdicts(rows_of(reward, control))
    assert found.keys() == {"cheated"}
    assert 40 < found["cheated"] <= 56
    assert not verdicts(rows_of(reward, 0.7 + drawn.normal(0, 0.03, 60)))


def test_held_out_rewards_that_fall_are_cheating():
    reward = np.linspace(0.1, 0.8, 40)
    evaluations = [{"step": step, "train": step / 10, "held_out": 0.5 - step / 40} for step in range(10)]
    assert verdicts(rows_of(reward), (), evaluations).keys() == {"cheated"}
    assert not verdicts(rows_of(reward), (), [{**evaluation, "held_out": 0.5} for evaluation in evaluations])


def test_collapse_length_and_idle_groups():
    level = np.full(30, 0.5)
    rising = np.linspace(0.1, 0.9, 30)
    falling = np.geomspace(3.0, 0.05, 30)
    assert verdicts(rows_of(rising, **{rewards.ENTROPY: falling})).keys() == {"collapsed"}
    assert not verdicts(rows_of(rising, **{rewards.ENTROPY: np.linspace(3.0, 0.5, 30)}))
    longer = np.linspace(100, 300, 30)
    assert verdicts(rows_of(level, **{rewards.LENGTH: longer})).keys() == {"longer"}
    assert not verdicts(rows_of(rising, **{rewards.LENGTH: longer}))
    idle = {rewards.IDLE_GROUP_SHARE: np.full(30, 0.95)}
    assert verdicts(rows_of(level, **idle)).keys() == {"idle"}
    assert not verdicts(rows_of(rising, **idle))  # everything is solved


def no_signal(num_steps, **values):
    blocks = []
    for row in rows_of(np.full(num_steps, 0.5), **{name: np.full(num_steps, value) for name, value in values.items()}):
        rewards.add_step_to_blocks(blocks, row, [])
    return rewards.find_no_signal(RewardsWatchConfig(), num_steps, blocks)


@pytest.mark.parametrize("num_steps", [1, 2, 100])
def test_a_run_without_any_signal_says_so_at_its_end(num_steps):
    alike, cut, gradient = rewards.IDLE_GROUP_SHARE, rewards.CLIPPED_SHARE, rewards.GRADIENT_NORM
    found = no_signal(num_steps, **{alike: 1.0, cut: 0.5, gradient: 0.0})
    assert found.verdict == "no signal" and "in every step all answers to a prompt scored alike" in found.message
    assert found.remedies[0].startswith("rewards that differ")
    found = no_signal(num_steps, **{alike: 0.5, cut: 1.0, gradient: 0.0})
    assert "no step had a gradient" in found.message and "all answers were cut off" in found.message
    assert found.remedies[0].startswith("a larger objective.rollout.max_new_tokens")
    assert no_signal(num_steps, **{alike: 0.5, cut: 1.0, gradient: 0.1}) is None
    assert no_signal(num_steps) is None, "a run of an earlier version, whose blocks lack them"


@pytest.mark.parametrize("carried", [0.0, 0.5])
def test_noise_raises_few_alarms(carried):
    """Runs of 200 steps whose reward rises while a control hovers, with noise that carries over from step to step or not."""
    drawn = np.random.default_rng(1)
    runs = 40
    alarms = 0
    for _ in range(runs):
        noise = drawn.normal(0, 0.05, (2, 200))
        for step in range(1, 200):
            noise[:, step] += carried * noise[:, step - 1]
        reward = np.linspace(0.1, 0.7, 200) + noise[0]
        alarms += bool(verdicts(rows_of(reward, 0.5 + noise[1])))
    assert alarms <= 1


def test_a_run_that_learns_from_rewards_is_not_judged_by_its_loss():
    lines = []
    challenges = ChallengeDetectors(
        ChallengesConfig(rewards=RewardsWatchConfig(action=Reaction.stop)), 4, "loss", lines.append
    )
    challenges.metrics_of_control_rewards = [CONTROL]
    progress = Progress()
    for step in range(1, 41):
        progress.step = step
        row = {"step": step, "loss": (-1) ** step * 0.1, rewards.REWARD: step / 40, CONTROL: 1 - step / 40}
        challenges.add_step_metrics(progress, [row])
    assert progress.first_loss is None
    assert progress.recent_losses == []
    challenges.run_detectors(progress, {"eval/reward": 0.5})
    assert progress.evaluations[-1] == {"step": 40.0, "train": pytest.approx(20.5 / 40), "held_out": 0.5}
    (line,) = lines
    assert line.startswith("warning: rewards at step ")
    assert "while the control rewards/control/mean fell" in line
    assert challenges.findings_by_detector["rewards"]["verdict"] == "cheated"
    assert challenges.stopping_finding is not None


def test_a_run_that_rewards_have_stopped_stops_again_on_every_rank(tmp_path):
    """Rank 0 alone reads that an earlier start has reported it, and a rank that saves alone would wait forever."""
    config = ChallengesConfig(rewards=RewardsWatchConfig(action=Reaction.stop))
    progress = Progress()
    first_start = ChallengeDetectors(config, 4, "loss", events_file=tmp_path / "events.jsonl")
    first_start.metrics_of_control_rewards = [CONTROL]
    for step in range(1, 41):
        progress.step = step
        row = {"step": step, "loss": 0.0, rewards.REWARD: step / 40, CONTROL: 1 - step / 40}
        first_start.add_step_metrics(progress, [row])
    assert first_start.stopping_finding is not None

    events = (tmp_path / "events.jsonl").read_text()
    for events_of_rank in (tmp_path / "events.jsonl", None):
        lines = []
        resumed = ChallengeDetectors(config, 4, "loss", lines.append, events_file=events_of_rank)
        resumed.metrics_of_control_rewards = [CONTROL]
        resumed.restore_findings(progress)
        resumed.run_detectors(progress, {"eval/reward": 0.5})  # which the checkpoint owes
        assert resumed.stopping_finding is not None
    assert (tmp_path / "events.jsonl").read_text() == events
