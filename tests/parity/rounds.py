"""Rounds of written answers under every strategy and in one process: part of the parity job (`job.py`).

The loss of a round is near 0 by construction, so that what is compared is its gradient: of each kind of parameter, after each
step. It is read from the update, as `trainer/verification/steps.py` does: plain SGD without clipping moves by rate x gradient.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from strategies import runtime as processes
from strategies.base import Precision, Progress
from strategies.runtime import Runtime
from strategies.sequence import with_sequence_parallelism
from tests.helpers.building import GLOBAL_BATCH, STRATEGIES, alone, model_dir, run_config
from tests.helpers.objectives import OBJECTIVE_TESTS
from tests.helpers.stores import write
from tests.parity.base import Job
from tests.parity.plan import CASES
from trainer.build.parts import build_engine
from trainer.build.rounds import RoundInputs, build_round_loader
from trainer.config.parallel import ParallelConfig
from trainer.config.run import RunConfig
from trainer.data.prepare import PreparedData
from trainer.data.store.sequences import Sample, TokenDataset
from trainer.model.config import Quantisation
from trainer.model.loading import load_tokenizer
from trainer.objectives.answers import PromptDataSpec
from trainer.objectives.rollouts import RolloutConfig
from trainer.optim.config import SgdConfig
from trainer.optim.schedule import ScheduleConfig, ScheduleName
from trainer.planner.minimal_step import minimal_trainer
from trainer.rollout.loader import RolloutLoader
from trainer.rollout.prompts import PromptReader
from trainer.rollout.round import stack_rewards
from trainer.rollout.types import AnswerGroup, GroupScores, Prompt
from trainer.verification.gradients import gradient_distances_by_kind, kind_by_parameter

STEPS = 5
RATE = 0.25
SMALL_RATES = {"lora olora": 0.01}
"""Of methods whose gradients are much larger: at 0.25, `single` alone differs by 4e-5 of itself in the second step between
micro-batches of 2 and of 8, so that nothing could be compared."""
PROMPTS = 24
LONGEST = 8
VARIANTS = OBJECTIVE_TESTS["grpo"].variants
FEATURES = ("plain", "accumulation", "several", "nf4", "shared rows", "distributed experts")
"""`several`: a round of two steps, taken twice. `shared rows`: both ranks share each row in training. `distributed experts`: each
rank holds half of the experts of a mixture, in writing too."""
READING = 2.0**-23
"""Rounding of a weight before and after the update, as a share of the weight."""


class FixedPrompts(PromptReader):
    """Prompts of which nobody asks the text."""

    def prompt(self, sequence: int, place: int) -> Prompt:
        return Prompt(place, self.dataset.sample(sequence).input_ids.tolist(), "", {}, f"prompts:{sequence}")


class TokenScorer:
    """Rewards that tokens alone decide, in this process; one answer of some groups is unscored."""

    def score(self, groups: list[AnswerGroup], *, step: int) -> list[GroupScores]:
        scores = []
        for group in groups:
            rewards = [np.mean(np.array(answer.ids) % 3 == 0) + len(answer.ids) / 100 for answer in group.answers]
            if group.prompt.prompt_number % 5 == 3:
                rewards[1] = np.nan
            scores.append(GroupScores(np.array(rewards, dtype=np.float64)))
        return scores

    def close(self) -> None: ...


def prompt_set(root) -> PreparedData:
    """Random prompts of 3 to 12 tokens."""
    directory = root / "prompts"
    if not (directory / "manifest.json").exists():
        generator = np.random.default_rng(4)
        made = []
        for _ in range(PROMPTS):
            ids = generator.integers(3, 300, int(generator.integers(3, 13))).astype(np.int32)
            made.append(Sample(ids, np.zeros(len(ids), dtype=bool)))
        write(directory, made, PromptDataSpec().counts, {"fingerprint": "prompts"})
    return PreparedData(
        train=TokenDataset.open(directory), evaluation=None, directory=directory, report={}, label_names=None
    )


def config_of(job: Job, variant: str, tuning: str, strategy: str, feature: str) -> RunConfig:
    """The settings of a case."""
    if feature == "distributed experts":
        model = job.first_here(lambda: model_dir(job.root / "written", "qwen3_moe", num_experts=4))
    else:
        model = job.first_here(lambda: model_dir(job.root))
    rollout = RolloutConfig(max_new_tokens=LONGEST, temperature=0.9)
    if feature == "several":
        rollout = replace(rollout, steps=2, iterations=2)
    readers = 1 if feature == "shared rows" else job.runtime.world_size
    config = run_config(
        model,
        strategy,
        "full",
        micro=2 if feature == "accumulation" else GLOBAL_BATCH // readers,
        steps=STEPS,
        objective=replace(VARIANTS[variant], rollout=rollout),
        optim=SgdConfig(lr=SMALL_RATES.get(tuning, RATE), momentum=0.0, max_grad_norm=0.0),
    )
    config.tuning = CASES[tuning]
    if feature == "nf4":
        config.model.quantisation = Quantisation.nf4
    if feature == "shared rows":
        config.parallel = ParallelConfig(sequence=2)
    if feature == "distributed experts":
        config.parallel = ParallelConfig(experts=2)
    return config


def compare(
    job: Job, variant: str, tuning: str, strategy: str, feature: str, fault: bool = False
) -> list[dict[str, Any]]:
    """What the ranks and `single` say of each step; and of each kind of gradient (largest difference, largest element, rounding).

    `fault`: rank 1 takes the advantages of the first group twice.
    """
    config = config_of(job, variant, tuning, strategy, feature)
    data = job.first_here(lambda: prompt_set(job.root))
    found = steps_of(config, data, with_sequence_parallelism(job.runtime, config.parallel.sequence), fault=fault)
    lone = replace(
        config,
        strategy=STRATEGIES["single"],
        batch={"global": GLOBAL_BATCH, "micro": GLOBAL_BATCH},
        parallel=ParallelConfig(),
    )
    key = "rounds", variant, tuning, feature in ("several", "nf4", "distributed experts") and feature
    expected = job.oracle(key, lambda: steps_of(lone, data, alone(job.runtime)), elsewhere=[])
    compared = []
    for step, right in zip(found, expected, strict=False):
        by_kind = gradient_distances_by_kind(step.pop("gradients"), right["gradients"], right["kinds"])
        rounding = dict.fromkeys(by_kind, 0.0)
        for name, kind in right["kinds"].items():
            rounding[kind] = max(rounding[kind], READING * right["largest"][name] / config.optim.lr)
        kinds = {kind: (*distance, rounding[kind]) for kind, distance in by_kind.items()}
        kept = ("texts", "values", "size")
        compared.append({"found": {k: step[k] for k in kept}, "expected": {k: right[k] for k in kept}, "kinds": kinds})
    return compared


def steps_of(
    config: RunConfig, data: PreparedData, runtime: Runtime, *, fault: bool = False, num_steps: int = STEPS
) -> list[dict[str, Any]]:
    """Some steps: their texts, values and gradients. All ranks of `runtime` must call; rank 0 alone has gradients."""
    tokenizer = load_tokenizer(config.model)
    engine, built, _ = build_engine(config, tokenizer, data, Precision.fp32, runtime)
    progress = Progress()
    inputs = RoundInputs(tokenizer, Precision.fp32, TokenScorer(), progress, lambda: lambda: False)
    loader, _ = build_round_loader(config, data, built, engine, runtime, inputs)
    loader.round_builder.prompts = FixedPrompts(data.train, loader.round_builder.prompts.table, loader.order)
    if fault and runtime.rank == 1:
        double_first_group(loader)
    trainer = minimal_trainer(engine)
    constant = ScheduleConfig(name=ScheduleName.constant, warmup_steps=0)
    trainer.settings = replace(trainer.settings, seed=config.run.seed, schedule=constant, total_steps=STEPS)
    trainer.progress = progress
    names = ("loss", *built.step_module.objective.metrics)
    steps = []
    before = weights(engine)
    for batch in loader.steps(0, num_steps):
        record = trainer.train_step(batch)
        after = weights(engine)
        sums = [record.local_sums[name].double() for name in names]
        if runtime.world_size > 1:
            sums = [processes.sum_over_ranks(value) for value in sums]
        values = [float(value) / record.counts["loss"] for value in sums]
        gradients = {name: (weight - after[name]) / config.optim.lr for name, weight in before.items()}
        steps.append(
            {
                "texts": [[answer.ids for answer in group.answers] for group in loader.current_round.groups],
                "values": dict(zip((*names, "grad_norm"), (*values, float(record.result.grad_norm)), strict=True)),
                "size": size_of_loss(loader, record.counts["tokens"]),
                "gradients": gradients,
                "kinds": kind_by_parameter(built, list(gradients)),
                "largest": {name: float(weight.abs().max()) for name, weight in before.items()},
            }
        )
        before = after
    engine.close()
    return steps


def weights(engine) -> dict[str, torch.Tensor]:
    """A copy of every trained parameter; empty on all ranks but 0. All ranks must call."""
    gathered = engine.gather_full_parameters(trainable_only=True)
    return {name: weight.float().clone() for name, weight in gathered if weight is not None}


def size_of_loss(loader: RolloutLoader, tokens: float) -> float:
    """The sum of |advantage| times length over the round, a token: what nearly cancels in the loss."""
    made = loader.current_round
    lengths = np.array([[len(answer.ids) for answer in group.answers] for group in made.groups])
    assert np.isfinite(stack_rewards(made.scores)).any()
    return float((np.abs(made.advantages) * lengths).sum() / tokens)


def double_first_group(loader: RolloutLoader) -> None:
    """Let every round of this rank have twice the advantages in its first group."""
    build_round = loader.round_builder.build_round

    def faulty(first_sample: int, step: int):
        made = build_round(first_sample, step)
        made.advantages[0] *= 2
        return made

    loader.round_builder = FaultyMaker(loader.round_builder, faulty)


class FaultyMaker:
    """A round builder with another `build_round`."""

    def __init__(self, round_builder: Any, build_round: Any) -> None:
        self._round_builder = round_builder
        self.build_round = build_round

    def __getattr__(self, name: str) -> Any:
        return getattr(self._round_builder, name)
