"""Builds the product's own trainer around tiny models and hand-made data, without a run directory."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from strategies import runtime as processes
from strategies.base import (
    DdpConfig,
    Fsdp2Config,
    Precision,
    Progress,
    SingleConfig,
    StrategyConfig,
    StrategyName,
    ZeroConfig,
)
from tests.helpers.models import tiny_model_dir
from tests.helpers.stores import write
from tests.helpers.tokenizers import tiny_tokenizer
from trainer.build.parts import build_engine, build_loader
from trainer.config.run import RunConfig, RunSettings
from trainer.data.batches.order import BudgetConfig
from trainer.data.config import Layout
from trainer.data.prepare import PreparedData
from trainer.data.store.sequences import REPLAY, Sample, TokenDataset
from trainer.loop import Trainer
from trainer.loop_types import Monitors, Sinks
from trainer.model.config import ModelConfig
from trainer.model.loading import load_tokenizer
from trainer.monitors.anomalies import Guards
from trainer.monitors.config import ChallengesConfig
from trainer.monitors.detectors import ChallengeDetectors
from trainer.monitors.stragglers import Stragglers
from trainer.objectives.base import ObjectiveConfig
from trainer.objectives.kto import DESIRABLE, RatedDataSpec
from trainer.objectives.pairs import REJECTED, PairDataSpec
from trainer.objectives.registry import data_spec_of
from trainer.objectives.sft import SftDataSpec
from trainer.optim.config import AdamwConfig
from trainer.optim.schedule import ScheduleConfig, ScheduleName
from trainer.reporting.console import Console
from trainer.reporting.metrics import Meter
from trainer.reporting.tracking import Trackers
from trainer.run import loop_settings, record_reference_logps_of_data
from trainer.session.attempt import Attempt
from trainer.session.context import RunContext
from trainer.step import BuiltModel
from trainer.stopping.preempt import RankStopAgreement
from trainer.stopping.signals import StopRequest
from trainer.tuning.base import FullConfig, LoraConfig

STRATEGIES: dict[str, StrategyConfig] = {
    "single": SingleConfig(),
    "ddp": DdpConfig(),
    "fsdp2": Fsdp2Config(),
    "hsdp": Fsdp2Config(name=StrategyName.hsdp, replicate=2),
    "zero1": ZeroConfig(name=StrategyName.zero1, stage=1),
    "zero2": ZeroConfig(name=StrategyName.zero2, stage=2),
    "zero3": ZeroConfig(name=StrategyName.zero3, stage=3),
}
TUNINGS = {"full": FullConfig(), "lora": LoraConfig(rank=4)}
GLOBAL_BATCH = 16


def model_dir(root: Path, architecture: str = "llama", **overrides) -> Path:
    """A tiny model with its tokenizer; made once."""
    path = root / architecture
    if not (path / "tokenizer.json").exists():
        tokenizer = tiny_tokenizer()
        tiny_model_dir(path, architecture, vocab_size=len(tokenizer) + 10, **overrides)
        tokenizer.save_pretrained(path)
    return path


def samples(num: int, *, uneven: bool, vocab: int = 300) -> list[Sample]:
    """Random documents of 4 to 40 tokens. Uneven: supervised shares from none to all; every third document has none."""
    generator = np.random.default_rng(0)
    made = []
    for index in range(num):
        length = int(generator.integers(4, 41))
        supervised = np.ones(length, dtype=bool)
        if uneven:
            supervised = generator.random(length) < (index % 3) / 2
        supervised[0] = False
        made.append(Sample(generator.integers(3, vocab, length).astype(np.int32), supervised))
    return made


def weighed(made: list[Sample]) -> list[Sample]:
    """The samples with weights between 0.05 and 1 on their targets; every fourth keeps the weight 1."""
    generator = np.random.default_rng(4)
    for index, sample in enumerate(made):
        if index % 4:
            weights = generator.uniform(0.05, 1, len(sample.input_ids)).astype(np.float32)
            sample.weights = np.where(sample.supervised, weights, np.float32(0))
    return made


def data_set(root: Path, *, uneven: bool, num: int = 48, weighted: bool = False) -> PreparedData:
    """A prepared data set of `samples`, serving as training and evaluation set."""
    directory = root / f"data-{uneven}-{num}-{weighted}"
    if not (directory / "manifest.json").exists():
        made = samples(num, uneven=uneven)
        write(directory, weighed(made) if weighted else made, SftDataSpec().counts, {"fingerprint": "x"})
    opened = TokenDataset.open(directory)
    return PreparedData(train=opened, evaluation=opened, directory=directory, report={}, label_names=None)


def pair_samples(num: int, *, vocab: int = 300) -> list[Sample]:
    """Random pairs of answers of 1 to 20 tokens to prompts of 2 to 20, chosen and rejected in turn."""
    generator = np.random.default_rng(3)
    made = []
    for _ in range(num):
        prompt = generator.integers(3, vocab, generator.integers(2, 21))
        for rejected in (False, True):
            answer = generator.integers(3, vocab, generator.integers(1, 21))
            supervised = np.arange(len(prompt) + len(answer)) >= len(prompt)
            made.append(
                Sample(np.concatenate([prompt, answer]).astype(np.int32), supervised, {REJECTED: int(rejected)})
            )
    return made


def pair_set(root: Path, *, num: int = 48) -> PreparedData:
    """A prepared data set of `pair_samples`, serving as training and evaluation set; opened anew each time."""
    directory = root / f"pairs-{num}"
    if not (directory / "manifest.json").exists():
        write(directory, pair_samples(num), PairDataSpec().counts, {"fingerprint": "pairs"})
    train, held_out = TokenDataset.open(directory), TokenDataset.open(directory)
    return PreparedData(train=train, evaluation=held_out, directory=directory, report={}, label_names=None)


def two_sided_samples(num: int, *, vocab: int = 300) -> list[Sample]:
    """Random prompts of 1 to 30 tokens, each followed by its answer of 1 to 12, which is learned."""
    generator = np.random.default_rng(5)
    made = []
    for _ in range(num):
        prompt, answer = int(generator.integers(1, 31)), int(generator.integers(1, 13))
        ids = generator.integers(3, vocab, prompt + answer).astype(np.int32)
        made.append(Sample(ids, np.arange(prompt + answer) >= prompt))
    return made


def two_sided_set(root: Path, *, num: int = 48) -> PreparedData:
    """A prepared data set of `two_sided_samples` for encoder-decoder models, serving as training and evaluation set."""
    directory = root / f"two-sided-{num}"
    if not (directory / "manifest.json").exists():
        write(
            directory,
            two_sided_samples(num),
            lambda s: {"loss": int(s.supervised[1:].sum())},
            {"fingerprint": "two-sided"},
        )
    opened = TokenDataset.open(directory)
    return PreparedData(train=opened, evaluation=opened, directory=directory, report={}, label_names=None)


def rated_set(root: Path, *, num: int = 48) -> PreparedData:
    """The answers of `pair_samples`, each with a verdict; two of three are desirable."""
    directory = root / f"rated-{num}"
    if not (directory / "manifest.json").exists():
        made = pair_samples(num // 2)
        for index, sample in enumerate(made):
            sample.marks[DESIRABLE] = int(index % 3 != 0)
        write(directory, made, RatedDataSpec().counts, {"fingerprint": "rated"})
    train, held_out = TokenDataset.open(directory), TokenDataset.open(directory)
    return PreparedData(train=train, evaluation=held_out, directory=directory, report={}, label_names=None)


def replay_set(root: Path, *, num: int = 48, weighted: bool = False) -> PreparedData:
    """`samples` of uneven masks, of which the first of each four are replayed, so that some micro-batches have none."""
    directory = root / f"replay-{num}-{weighted}"
    if not (directory / "manifest.json").exists():
        made = weighed(samples(num, uneven=True)) if weighted else samples(num, uneven=True)
        for index, sample in enumerate(made):
            sample.marks[REPLAY] = int(index % 4 == 0)
        write(directory, made, SftDataSpec().counts, {"fingerprint": "replay"})
    opened = TokenDataset.open(directory)
    return PreparedData(train=opened, evaluation=opened, directory=directory, report={}, label_names=None)


def run_config(
    model: Path, strategy: str | StrategyConfig, tuning: str, *, micro: int, steps: int = 5, **changes
) -> RunConfig:
    """A fp32 run at lr 1e-3 with clipping and a schedule that moves."""
    config = RunConfig(
        run=RunSettings(seed=7),
        model=ModelConfig(path=str(model)),
        batch={"global": GLOBAL_BATCH, "micro": micro},
        budget=BudgetConfig(steps=steps),
        precision=Precision.fp32,
        tuning=TUNINGS[tuning],
        strategy=STRATEGIES[strategy] if isinstance(strategy, str) else strategy,
        optim=AdamwConfig(lr=1e-3, weight_decay=0.1, max_grad_norm=0.5),
        schedule=ScheduleConfig(name=ScheduleName.linear, warmup_steps=2),
    )
    return replace(config, **changes)


def trainer_for(
    config: RunConfig, data: PreparedData, runtime: processes.Runtime, *, progress: Progress | None = None
) -> Trainer:
    """The product's trainer with its engine and loader, and nothing that writes."""
    return built_trainer(config, data, runtime, progress=progress)[0]


def built_trainer(
    config: RunConfig, data: PreparedData, runtime: processes.Runtime, *, progress: Progress | None = None
) -> tuple[Trainer, BuiltModel]:
    """The same, and what is known of its model."""
    if "deepspeed" in sys.modules:
        # A process of the product has one engine; this one may have had ZeRO-3's, which leaves a linear function behind
        # that selective checkpointing cannot take.
        from strategies.compat.deepspeed import restore_torch_linear

        restore_torch_linear()
    tokenizer = load_tokenizer(config.model)
    engine, built, _ = build_engine(config, tokenizer, data, config.precision, runtime)
    stop_agreement = RankStopAgreement(StopRequest(), runtime)
    where = data.directory / f"run-{os.environ.get('RANK', 0)}"  # a lone oracle on every rank
    key = f"{config.strategy.name} {config.model} {config.tuning} {runtime.world_size}"
    record_reference_logps_of_data(
        config,
        data,
        engine,
        built,
        RunContext(key, runtime, Console(enabled=False), stop_agreement, Attempt(run_dir=where)),
    )
    loader, total = build_loader(config, data, built, runtime)
    meter = Meter(runtime, 1.0, None, built.step_module.objective.metrics)
    trainer = Trainer(
        loop_settings(config, total),
        engine=engine,
        loader=loader,
        progress=progress or Progress(),
        evaluators=[],
        sinks=Sinks(meter, Trackers(), Console(enabled=False), checkpoints=None),  # type: ignore[arg-type]
        monitors=Monitors(
            stop_agreement,
            Guards(config.guards, config.optim.max_skipped_steps, runtime),
            Stragglers(0, runtime),
            ChallengeDetectors(ChallengesConfig(), planned_evaluations=1, judged_loss_term="loss"),
        ),
    )
    return trainer, built


def collate(
    samples: list[Sample], layout: Layout, pad_token_id: int = 0, objective: ObjectiveConfig | None = None
) -> dict:
    """Samples as one micro-batch on the CPU, with what the objective (sft) adds."""
    return data_spec_of(objective or ObjectiveConfig()).collator(layout, pad_token_id)(samples)


def take_steps(trainer: Trainer, num: int) -> list[tuple[float, float]]:
    """(loss, grad norm) of `num` further steps. All ranks must call."""
    for batch in trainer.loader.steps(trainer.progress.samples, num):
        trainer.meter.add(trainer.train_step(batch))
    return [(row["loss"], row["grad_norm"]) for row in trainer.meter.flush()]


def alone(runtime: processes.Runtime) -> processes.Runtime:
    """The same process as if it were the only one: for the oracle."""
    return replace(runtime, rank=0, world_size=1, local_rank=0, local_world_size=1, sequence_size=1)
