"""Averages of weights, smoothed labels and noise on embeddings, under every strategy. Part of `job.py`."""

from dataclasses import replace
from typing import Any

import torch

from strategies.parameters import named_parameters
from tests.helpers.building import STRATEGIES, model_dir, take_steps
from tests.parity.base import Job, lone_steps, values_of
from tests.parity.features import ELSEWHERE, against_lone, plain
from trainer.config.parallel import ParallelConfig
from trainer.data.config import DataConfig, Layout
from trainer.model.config import ModelConfig
from trainer.objectives.sft import SftConfig
from trainer.optim.config import AdamwConfig

DECAY, STEPS = 0.6, 4


def average(job: Job, strategy: str, tuning: str, experts: int = 1) -> dict[str, Any]:
    """The average against arithmetic on a lone process's weights; what training goes on with; both again in another strategy.

    `experts`: ranks over which experts are distributed (`parallel.experts`). Above 1 the model is a mixture.
    """
    config = plain(job, strategy, tuning, micro=2, steps=6, optim=AdamwConfig(lr=1e-3))
    if experts > 1:
        mixture = job.first_here(lambda: model_dir(job.root / "average", "qwen3_moe", num_experts=8))
        config = replace(config, model=ModelConfig(path=str(mixture)))
    averaged = replace(config, optim=replace(config.optim, ema_decay=DECAY), parallel=ParallelConfig(experts=experts))

    def by_hand():
        trainer = job.lone_trainer(config)
        mean, curve = values_of(trainer), []
        for step in range(1, STEPS + 1):
            curve += lone_steps(trainer, 1)
            keep = min(DECAY, (1 + step) / (10 + step))
            mean = {name: keep * mean[name] + (1 - keep) * now for name, now in values_of(trainer).items()}
        return mean, values_of(trainer), curve + lone_steps(trainer, 2)

    mean, last, curve = job.oracle(("average", tuning, experts > 1), by_hand, elsewhere=({}, {}, []))
    trainer = job.trainer(averaged)
    trained = {name for name, p in named_parameters(trainer.engine.step_module) if p.requires_grad}
    found = [list(pair) for pair in take_steps(trainer, STEPS)]
    path = job.saved(trainer)
    apart = job.gathered_apart(trainer, mean, of=trained)
    inside = _evaluated(job, trainer)
    found += [list(pair) for pair in take_steps(trainer, 2)]  # as if nobody had looked
    elsewhere = replace(averaged, strategy=STRATEGIES[ELSEWHERE[strategy]], parallel=ParallelConfig())
    other = job.trainer(elsewhere)
    other.progress = other.engine.load(path)
    moved = max((float((mean[name] - last[name]).abs().max()) for name in trained & set(mean)), default=0.0)
    return {
        "apart": [apart, job.gathered_apart(other, mean, of=trained)],
        "losses": [inside, _evaluated(job, other)],
        "moved": moved,
        "found": found,
        "expected": curve,
    }


def _evaluated(job: Job, trainer: Any) -> float:
    """The loss of the averaged model on one document, the same on every rank."""
    with trainer.engine.inference() as module, torch.no_grad():
        return float(module(trainer.loader.collator([job.data.train.sample(0)]))["loss"])


def smoothed(job: Job, strategy: str, tuning: str) -> dict[str, Any]:
    config = replace(plain(job, strategy, tuning), objective=SftConfig(label_smoothing=0.2))
    return against_lone(job, config, ("smoothed", tuning))


def noisy(job: Job, strategy: str, tuning: str, layout: str) -> dict[str, Any]:
    """Noise is a function of (seed, step, document, position), so it is the same however documents are dealt out."""
    config = plain(job, strategy, tuning, data=DataConfig(layout=Layout(layout)))
    config = replace(config, model=replace(config.model, neftune_alpha=5.0))
    found = against_lone(job, config, ("noisy", tuning, layout))
    quiet = replace(config, model=replace(config.model, neftune_alpha=0.0))
    return {**found, "quiet": job.oracle(("quiet", tuning), lambda: job.lone(quiet, 3), elsewhere=[])}
