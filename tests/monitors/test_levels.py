"""Levels on made-up courses: found soon after they began, not found where there is none, and undone from before they began."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trainer.monitors.anomalies import MAX_FRUITLESS_ROLLBACKS_TO_ONE_CHECKPOINT, Guards, Outlier, RollBack
from trainer.monitors.guard_config import Action, GuardsConfig
from trainer.monitors.levels import LEVEL_LOOK_BACK_STEPS, LevelShiftDetector

STEPS = 300
BEGAN = 150
T = np.arange(STEPS)


def correlated(rng: np.random.Generator, memory: float) -> np.ndarray:
    """Noise of deviation 1, of which each step keeps a share from the one before."""
    values = np.zeros(STEPS)
    for number in range(1, STEPS):
        values[number] = memory * values[number - 1] + np.sqrt(1 - memory**2) * rng.normal()
    return values


def healthy(rng: np.random.Generator) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Loss and gradient norm of each step, by the kind of course."""
    noise = rng.normal(0, 1, STEPS)
    factors = np.exp(0.3 * rng.normal(0, 1, STEPS))
    falling = 2 + 6 * np.exp(-T / 40)
    odd = rng.random(STEPS) < 0.02
    return {
        "a loss that falls, a norm that falls": (falling + 0.1 * noise, (1 + 3 * np.exp(-T / 30)) * factors),
        "an adapter that leaves its zeros": (
            falling * np.exp(0.03 * noise),
            (0.3 + 1.5 * (1 - np.exp(-T / 30))) * factors,
        ),
        "a long warm-up": (8 - T / 60 + 0.1 * noise, (0.5 + np.clip(T / 100, 0, 1)) * factors),
        "a norm that triples slowly": (2 + 0.05 * noise, (1 + 2 * T / STEPS) * factors),
        "epochs": (2.5 - 0.3 * (T // 100) + 0.001 * (T % 100) + 0.05 * noise, (1 + 0.3 * (T // 100)) * factors),
        "batches that resemble those before": (2 + 0.05 * correlated(rng, 0.9), np.exp(0.3 * correlated(rng, 0.9))),
        "single spikes": (2 + 0.05 * noise + 3 * odd, factors * (1 + 20 * odd)),
    }


def rising(rng: np.random.Generator) -> dict[str, tuple[str, np.ndarray]]:
    """(what rises from step `BEGAN` on, its values), by the kind of course. No step is far above those before."""
    noise = 2 + 0.05 * rng.normal(0, 1, STEPS)
    factors = np.exp(0.2 * rng.normal(0, 1, STEPS))
    since = T - BEGAN + 1
    return {
        "a loss by 7 deviations": ("loss", noise + 0.35 * (since >= 0)),
        "a loss within 12 steps": ("loss", noise + 0.6 * np.clip(since / 12, 0, 1)),
        "a norm by four": ("grad_norm", factors * np.where(since >= 0, 4, 1)),
        "a norm by ten within 40 steps": ("grad_norm", factors * 10 ** np.clip(since / 40, 0, 1)),
    }


def levels(loss: np.ndarray, norm: np.ndarray) -> list:
    """(step at which it was told, level) of each."""
    watch = LevelShiftDetector(8.0, 100)
    found = []
    for step, (each_loss, each_norm) in enumerate(zip(loss, norm, strict=True), 1):
        row = {"step": step, "loss": each_loss, "grad_norm": each_norm}
        found += [(step, level) for level in watch.add_step(row, 4 * (step - 1), [])]
        if step % 7 == 0:  # a run that is resumed judges likewise
            watch = LevelShiftDetector(8.0, 100, watch.rows)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_a_level_is_told_once_soon_after_it_began_and_no_other_course_has_one(seed):
    rng = np.random.default_rng(seed)
    for kind, (loss, norm) in healthy(rng).items():
        assert levels(loss, norm) == [], kind
    for kind, (name, values) in rising(rng).items():
        loss = values if name == "loss" else np.full(STEPS, 2.0)
        norm = values if name == "grad_norm" else np.full(STEPS, 1.0)
        ((told_at, level),) = levels(loss, norm)
        assert level.metric == name and BEGAN < told_at <= BEGAN + 30, (kind, told_at)
        assert told_at - level.first_step <= LEVEL_LOOK_BACK_STEPS + 5 and abs(level.first_step - BEGAN) <= 10, (
            kind,
            level,
        )


def guards_of(**actions: Action) -> tuple[Guards, list[Outlier]]:
    """Guards, and the outliers that they tell."""
    runtime = SimpleNamespace(device=torch.device("cpu"), is_main=True, world_size=1)
    told: list[Outlier] = []
    return Guards(GuardsConfig(**actions), 10, runtime, told.append), told


def take(guards: Guards, step: int, loss: float, norm: float = 1.0) -> None:
    """A step of four samples."""
    guards.record_step(4 * (step - 1))
    guards.mark_outliers([{"step": step, "loss": loss, "grad_norm": norm}])


def test_a_gradient_norm_that_stays_high_is_told_once():
    noise = 0.05 * np.random.default_rng(0).normal(0, 1, 200)
    guards, told = guards_of()
    for step in range(1, 200):
        take(guards, step, 2 + noise[step], (40.0 if step > 60 else 1.0) + noise[step])
    assert [(outlier.step, [*outlier.values]) for outlier in told] == [(61, ["grad_norm"])]
    take(guards, 200, 2.0, 400.0)  # it has become the measure, for the loss has not suffered
    assert told[-1].step == 200 and told[-1].scores["grad_norm"] > 8


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_rollback_from_a_level_goes_to_before_it_began(name):
    """The rise takes nine steps: a checkpoint that was written meanwhile is of no use."""
    deviation, factor = {"loss": (0.02, 1.5), "grad_norm": (0.1, 8.0)}[name]
    noise = deviation * np.random.default_rng(1).normal(0, 1, 100)
    guards, told = guards_of(**{name: Action.rollback})
    with pytest.raises(RollBack) as raised:
        for step in range(1, 100):
            value = np.exp(noise[step] + np.log(factor) * np.clip((step - 49) / 9, 0, 1))
            take(guards, step, *((value, 1.0) if name == "loss" else (1.0, value)))
    outlier = raised.value.outlier
    assert told == [outlier] and 50 < outlier.step < 65
    assert 42 <= outlier.began <= 53 and outlier.last_good_step == outlier.began - 2
    # What led to the first step of the level is the update of the one before: its samples and all later ones are left out.
    assert outlier.first_sample == 4 * (outlier.began - 2)
    assert outlier.first_sample + 4 * outlier.num_steps == 4 * outlier.step


def test_a_checkpoint_after_which_every_sample_stands_out_is_at_the_level_itself():
    """An update that breaks the model is seen in the next step, which may be the first one after a checkpoint."""
    guards, _ = guards_of(loss=Action.rollback)
    noise = 0.02 * np.random.default_rng(2).normal(0, 1, 60)
    for step in range(1, 31):
        take(guards, step, 2 + noise[step])
    kept = guards.recent_steps(), [dict(row) for row in guards.level_shifts.rows]
    last_good_steps = []
    for _ in range(MAX_FRUITLESS_ROLLBACKS_TO_ONE_CHECKPOINT + 1):
        with pytest.raises(RollBack) as raised:
            take(guards, 31, 9.0)
        last_good_steps.append(raised.value.outlier.last_good_step)
        guards.restore_recent_steps(*kept)
        guards.record_rollback(30)
    assert last_good_steps == [30] * MAX_FRUITLESS_ROLLBACKS_TO_ONE_CHECKPOINT + [29]
    assert raised.value.outlier.first_sample == 4 * 29 and raised.value.outlier.num_steps == 2
