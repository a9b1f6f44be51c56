"""Reward models under every strategy: part of the parity job (`job.py`). Two steps learn from what two of them say."""

from dataclasses import replace
from typing import Any

import numpy as np

from strategies.base import Precision, Progress
from strategies.runtime import Runtime
from tests.helpers.building import GLOBAL_BATCH, STRATEGIES, alone, model_dir
from tests.helpers.reward_models import save_adapter, save_reward_model
from tests.helpers.tokenizers import tiny_tokenizer
from tests.parity.base import Job
from tests.parity.rounds import FixedPrompts, config_of, prompt_set
from trainer.build.parts import build_engine
from trainer.build.reward_models import open_model_scorer
from trainer.build.rounds import RoundInputs, build_round_loader
from trainer.config.parallel import ParallelConfig
from trainer.config.run import RunConfig
from trainer.data.prepare import PreparedData
from trainer.model.loading import load_tokenizer
from trainer.objectives.rollouts import RewardEntry
from trainer.planner.minimal_step import minimal_trainer
from trainer.rollout.rewards.scorer import open_scorer

STEPS = 2


def compare(job: Job, strategy: str, tuning: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(what the ranks say of each step, what `single` says). With a divergence, so that full tuning has a frozen copy too.

    `strategy`: also `distributed experts`, fsdp2 with experts over ranks, of a mixture whose answers another mixture scores.
    """
    dealt = strategy == "distributed experts"
    feature = "distributed experts" if dealt else "plain"
    config = config_of(job, "grpo near its start", tuning, "fsdp2" if dealt else strategy, feature)
    base = job.first_here(lambda: model_dir(job.root))
    if dealt:
        mixture = job.root / "mixture-scorer"
        model = job.first_here(lambda: save_reward_model(mixture, tiny_tokenizer(), num_experts=6))
    else:
        model = job.first_here(lambda: save_reward_model(job.root / "scorer", tiny_tokenizer()))
    adapter = job.first_here(lambda: save_adapter(job.root / "scorer-adapter", base))
    rewards = {
        # So few tokens at a time that ranks have unlike numbers of micro-batches.
        "model": RewardEntry(path=str(model), options={"batch_tokens": 100}),
        "adapter": RewardEntry(path=str(adapter), weight=0.5),
    }
    config = replace(config, objective=replace(config.objective, rewards=rewards))
    data = job.first_here(lambda: prompt_set(job.root))
    found = _steps(config, data, job.runtime)
    lone = replace(
        config,
        strategy=STRATEGIES["single"],
        batch={"global": GLOBAL_BATCH, "micro": GLOBAL_BATCH},
        parallel=ParallelConfig(),
    )
    expected = job.oracle(
        ("reward models", tuning, feature), lambda: _steps(lone, data, alone(job.runtime)), elsewhere=[]
    )
    return found, expected


def _steps(config: RunConfig, data: PreparedData, runtime: Runtime) -> list[dict[str, Any]]:
    """The answers of each step, their rewards and the norm of the gradients. All ranks of `runtime` must call."""
    tokenizer = load_tokenizer(config.model)
    engine, built, _ = build_engine(config, tokenizer, data, Precision.fp32, runtime, scores_answers=True)
    scorer = open_scorer(config.objective, runtime, None)
    scorer.model_scorer = open_model_scorer(config, engine, runtime)
    inputs = RoundInputs(tokenizer, Precision.fp32, scorer, Progress(), lambda: lambda: False)
    loader, _ = build_round_loader(config, data, built, engine, runtime, inputs)
    loader.round_builder.prompts = FixedPrompts(data.train, loader.round_builder.prompts.table, loader.order)
    trainer = minimal_trainer(engine)
    trainer.settings = replace(trainer.settings, seed=config.run.seed, total_steps=STEPS)
    steps = []
    for batch in loader.steps(0, STEPS):
        result = trainer.train_step(batch).result
        made = loader.current_round
        by_reward = {}
        for name in config.objective.rewards:
            by_reward[name] = np.stack([scores.scores_by_reward[name] for scores in made.scores]).tolist()
        steps.append(
            {
                "texts": [[answer.ids for answer in group.answers] for group in made.groups],
                "rewards": by_reward,
                "grad_norm": float(result.grad_norm),
            }
        )
    engine.close()
    return steps
