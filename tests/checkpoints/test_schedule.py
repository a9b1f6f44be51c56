"""When checkpoints are due: by steps, by time on rank 0's clock, by what a save costs; the ranks hear of it at few steps."""

import itertools
import math

import pytest
import torch

from strategies.runtime import Runtime
from trainer.checkpoints import schedule
from trainer.checkpoints.config import CheckpointConfig
from trainer.checkpoints.schedule import Schedule, optimal_interval_s


class Job:
    """Two ranks in one process with a clock of their own each; rank 0's answer is what both hear."""

    def __init__(self, monkeypatch, **settings):
        self.now, self.heard, self.told = 0.0, 0, None
        monkeypatch.setattr(schedule, "broadcast_object", self.broadcast)
        self.ranks = []
        for rank, ahead in ((0, 0.0), (1, 5000.0)):
            runtime = Runtime(rank, 2, rank, 2, torch.device("cpu"), None)
            self.ranks.append(Schedule(CheckpointConfig(**settings), runtime, lambda ahead=ahead: self.now + ahead))
        self.step = 0

    def broadcast(self, value, runtime):
        if runtime.is_main:
            self.heard, self.told = self.heard + 1, value
        else:
            assert self.told is not None, "a rank asks, and the main one does not"
            value, self.told = self.told, None
        return value

    def run(self, seconds, until, price=None):
        """(step, time) of each checkpoint until the clock shows `until`."""
        made = []
        while self.now < until:
            self.now += seconds(self.step) if callable(seconds) else seconds
            self.step += 1
            due = {rank.is_due(self.step) for rank in self.ranks}
            assert len(due) == 1 and self.told is None
            if due == {True}:
                made.append((self.step, self.now))
                self.now += price or 0
                for rank in self.ranks:
                    if price is not None:
                        rank.record_cost(price, price)
                    rank.restart_interval(self.step)
        return made


def test_checkpoint_schedule_by_steps(monkeypatch):
    job = Job(monkeypatch, every_steps=3, every_minutes=1)
    assert [step for step, _ in job.run(100.0, 1000)] == [3, 6, 9] and job.heard == 0


def test_checkpoint_schedule_is_half_an_hour_until_a_measured_save_decides(monkeypatch):
    job = Job(monkeypatch, mtbf_h=24)
    made = [when for _, when in job.run(2.0, 4 * 3600, price=5.0)]
    assert made[0] == pytest.approx(1800, abs=4)
    expected = math.sqrt(2 * 5 * 24 * 3600) - 5
    gaps = [after - before - 5 for before, after in itertools.pairwise(made)]
    assert len(gaps) > 5 and all(gap == pytest.approx(expected, abs=4) for gap in gaps)
    assert job.heard < 45 * len(made), "of some hundreds of steps between two"


@pytest.mark.parametrize(("minutes", "gap"), [(10, 600), (0.5, 30)])
def test_checkpoint_schedule_by_minutes(monkeypatch, minutes, gap):
    job = Job(monkeypatch, every_minutes=minutes)
    made = [when for _, when in job.run(1.0, 3600, price=3.0)]
    assert made[0] == pytest.approx(gap, abs=2)
    assert all(b - a - 3 == pytest.approx(gap, abs=2) for a, b in itertools.pairwise(made))


def test_checkpoint_schedule_of_zero_minutes_saves_nothing_between(monkeypatch):
    job = Job(monkeypatch, every_minutes=0)
    assert job.run(50.0, 40_000) == [] and job.heard == 0


def test_checkpoint_schedule_is_delayed_little_by_steps_that_become_slow(monkeypatch):
    """An evaluation of ten minutes, and steps ten times as slow from then on."""
    job = Job(monkeypatch)
    seconds = {500: 600.0}
    made = job.run(lambda step: seconds.get(step, 1.0 if step < 500 else 10.0), 2500)
    assert len(made) == 1 and made[0][1] == pytest.approx(1800, abs=120)


def test_checkpoint_schedule_retries_a_failed_save_when_the_next_is_due(monkeypatch):
    made = Job(monkeypatch, every_minutes=10).run(5.0, 3000)
    assert [when for _, when in made] == pytest.approx([600, 1200, 1800, 2400, 3000], abs=15)


@pytest.mark.parametrize("price", [0.01, 2.0, 60.0, 3600.0])
def test_checkpoint_interval_costs_least(price):
    """Against the cost itself: the share of the time that goes to saves, to steps taken again."""
    mtbf = 12 * 3600.0

    def cost(interval):
        return price / (interval + price) + (interval + price) / 2 / mtbf

    found = optimal_interval_s(price, mtbf)
    if price < 0.05:
        assert found == 60
    else:
        assert all(cost(found) <= cost(found * factor) + 1e-9 for factor in (0.5, 0.8, 1.25, 2))


@pytest.mark.parametrize(
    ("settings", "save_s", "gap_s", "saved"),
    [
        ({}, 1.0, 5.0, 50),  # 50 saves of a second: less than a minute in all
        ({}, 100.0, 600.0, 8),  # one is dear, so that the others wait for sqrt(2 * 100 * 24 * 3600) - 100 = 4,057 s
        ({"every_minutes": 30}, 1.0, 600.0, 16),
        ({"every_minutes": 0}, 1.0, 600.0, 0),
        ({"every_steps": 1000}, 1.0, 5.0, 50),
    ],
)
def test_improvements_are_saved_no_more_often_than_the_interval_but_at_once_while_saving_is_cheap(
    monkeypatch, settings, save_s, gap_s, saved
):
    job = Job(monkeypatch, **settings)
    count = 0
    for step in range(50):  # each evaluation is an improvement
        job.now += gap_s
        due = {rank.is_improvement_due() for rank in job.ranks}
        assert len(due) == 1
        if due == {True}:
            count += 1
            job.now += save_s
            for rank in job.ranks:
                rank.record_cost(save_s, save_s)
                rank.restart_interval(step)
    assert count == saved
