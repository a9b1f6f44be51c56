"""A tiny model learns from rewards by every recipe of `conf/objective`, which the same run at a rate of zero does not."""

from dataclasses import replace

import pytest

from launch.config.choices import SETTINGS_BORROWED_FROM_CHOICE
from launch.config.compose import compose_config
from tests.helpers.building import model_dir
from tests.helpers.covering import EVERYTHING
from tests.helpers.rounds import prompts_of, round_config, round_trainer
from trainer.optim.config import AdamwConfig
from trainer.optim.schedule import ScheduleConfig, ScheduleName

STEPS = 16
RECIPES = ("grpo", *SETTINGS_BORROWED_FROM_CHOICE["objective"])
ALWAYS = ("grpo", "rloo", "cispo")
"""A ratio with bounds, plain REINFORCE with the divergence in the reward, a weight without gradient over several steps."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("learns")
    model_dir(path)
    return path


def rewards_of(root, runtime, recipe: str, rate: float) -> list[float]:
    """The mean reward of each step that wrote answers."""
    words = ["model.path=m", "data.path=p.jsonl", "budget.steps=1", "batch.global=32", f"objective={recipe}"]
    # The rewards of these words are never read: the scorer is a function of the test.
    objective = compose_config([*words, "objective.rewards=[maths]"], check=False).config.objective
    config = round_config(root, root / "llama", "single", micro=32)
    rollout = replace(objective.rollout, max_new_tokens=6)
    config = replace(
        config,
        # Nearly all answers of six tokens are cut off, and DAPO would learn none of these.
        objective=replace(objective, group_size=8, rollout=rollout, rewards={}, mask_truncated=False),
        batch={"global": 32, "micro": 32},
        budget=replace(config.budget, steps=STEPS),
        optim=AdamwConfig(lr=rate),
        schedule=ScheduleConfig(name=ScheduleName.constant),
    )
    trainer = round_trainer(config, prompts_of(config), runtime)
    for batch in trainer.loader.steps(0, STEPS):
        trainer.meter.add(trainer.train_step(batch))
    return [row["reward"] for row in trainer.meter.flush() if "reward" in row]


@pytest.mark.parametrize("recipe", RECIPES if EVERYTHING else ALWAYS)
def test_the_reward_of_a_tiny_model_rises(root, runtime, recipe):
    """The reward is the share of even ids, at first about a half."""
    learned = rewards_of(root, runtime, recipe, 0.02)
    still = rewards_of(root, runtime, recipe, 0.0)
    assert learned[0] == still[0], "the first round is written before anything is learned"
    assert max(still) < 0.6 < learned[-1], (learned, still)
