"""Ranks that share each row of documents (`parallel.sequence`) against one process. Part of the parity job (`job.py`).

Rows are packed and uneven: documents begin anywhere, borders of slices fall into documents, and some ranks hold no target.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from strategies import runtime as processes
from strategies.base import ActivationCheckpointing, Precision, StrategyName, ZeroConfig
from strategies.sequence import with_sequence
from tests.helpers.building import (
    GLOBAL_BATCH,
    STRATEGIES,
    data_set,
    model_dir,
    pair_set,
    rated_set,
    replay_set,
    run_config,
    samples,
    trainer_for,
)
from tests.helpers.objectives import variants_of
from tests.helpers.stores import write
from tests.parity.base import Curve, Job
from tests.parity.teachers import objective_of
from trainer.config.parallel import ParallelConfig
from trainer.config.run import RunConfig
from trainer.data.config import DataConfig
from trainer.data.prepare import PreparedData
from trainer.data.store.sequences import TokenDataset
from trainer.loop import Trainer
from trainer.objectives.pretrain import PretrainConfig
from trainer.objectives.sft import SftConfig, SftDataSpec

STEPS = 3
PREFERENCES = variants_of("dpo", "orpo", "simpo")
SHARDING = {**STRATEGIES, "zero3": ZeroConfig(name=StrategyName.zero3, stage=3, persistence_threshold=0)}


@dataclass(frozen=True, slots=True)
class Case:
    """One run on ranks of which `degree` share each row."""

    objective: str = "sft"
    tuning: str = "full"
    architecture: str = "llama"
    strategy: str = "fsdp2"
    degree: int = 2
    feature: str = "plain"
    """`plain`, a mode of recomputation, `accumulation`, `packing`, `short` (rows with fewer tokens than ranks), `bf16`."""

    @property
    def oracle(self) -> tuple[str, ...]:
        """What the run of one process has in common with it."""
        data = self.feature if self.feature in ("packing", "short", "bf16") else "documents"
        return self.objective, self.tuning, self.architecture, data


def compare(job: Job, *case: Any) -> dict[str, Curve]:
    """Loss, gradient norm and metrics of each step: of all ranks, and of `single`, which takes whole rows."""
    asked = Case(*case)
    config, data = _run_of(job, asked)
    runtime = with_sequence(job.runtime, asked.degree)
    found = curve(trainer_for(config, data, runtime), runtime.world_size)
    lone = replace(config, parallel=ParallelConfig())
    expected = job.oracle(asked.oracle, lambda: curve(job.lone_trainer(lone, data), 1), elsewhere=[])
    return {"found": found, "expected": expected}


def _run_of(job: Job, case: Case) -> tuple[RunConfig, PreparedData]:
    """The settings of a case, and its data."""
    made = job.first_here(lambda: (model_dir(job.root, case.architecture), _data_of(job.root, case)))
    model, data = made
    readers = job.runtime.world_size // case.degree
    accumulation = 2 if case.feature in ("accumulation", "packing", "short") else 1
    config = run_config(
        model,
        _strategy_of(case),
        case.tuning,
        micro=GLOBAL_BATCH // (readers * accumulation),
        steps=STEPS,
        objective=_objective_of(case.objective, job.root),
        parallel=ParallelConfig(sequence=case.degree),
        data=DataConfig(packing=case.feature == "packing", max_length=64),
    )
    if case.feature == "bf16":
        config.precision = Precision.bf16
    return config, data


def _strategy_of(case: Case) -> Any:
    """The strategy, with the recomputation that the case asks for."""
    modes = {"full": ActivationCheckpointing.full, "selective": ActivationCheckpointing.selective}
    strategy = SHARDING[case.strategy]
    if case.feature in modes:
        return replace(strategy, activation_checkpointing=modes[case.feature])
    if case.feature == "auto":
        # So little memory that some blocks recompute and some do not.
        return replace(strategy, activation_checkpointing=ActivationCheckpointing.auto, memory_gib=0.004)
    return strategy


def _objective_of(name: str, root: Path) -> Any:
    """The settings of an objective by its short name."""
    if name in PREFERENCES:
        return PREFERENCES[name]
    if name in ("sft", "pretrain", "smoothed"):
        return {"sft": SftConfig(), "pretrain": PretrainConfig(), "smoothed": SftConfig(label_smoothing=0.2)}[name]
    return objective_of(name, root)


def _data_of(root: Path, case: Case) -> PreparedData:
    """Documents of the objective's kind."""
    model_dir(root, "qwen3")  # the teacher of distillation
    if case.feature == "short":
        return short_set(root)
    name = case.objective.removeprefix("weighed_")
    makers = {"kto": rated_set, "replay": replay_set, "held": replay_set}
    if name in PREFERENCES:
        return pair_set(root)
    weighted = {"weighted": True} if case.objective.startswith("weighed_") else {}
    return makers.get(name, partial(data_set, uneven=True))(root, **weighted)


def short_set(root: Path, *, num: int = 48) -> PreparedData:
    """Documents of one to three tokens, taken one at a time: fewer than there are ranks in a group."""
    directory = root / f"short-{num}"
    if not (directory / "manifest.json").exists():
        short = []
        for index, sample in enumerate(samples(num, uneven=False)):
            length = 1 + index % 3
            short.append(replace(sample, input_ids=sample.input_ids[:length], supervised=sample.supervised[:length]))
        write(directory, short, SftDataSpec().counts, {"fingerprint": "short"})
    opened = TokenDataset.open(directory)
    return PreparedData(train=opened, evaluation=opened, directory=directory, report={}, label_names=None)


def curve(trainer: Trainer, world: int) -> Curve:
    """Loss, gradient norm and the objective's metrics of the first steps. All `world` ranks must call, or one that is alone."""
    names = ("loss", *trainer.engine.step_module.objective.metrics)
    rows = []
    for batch in trainer.loader.steps(0, STEPS):
        record = trainer.train_step(batch)
        sums = [record.local_sums[name].double() for name in names]
        if world > 1:
            sums = [processes.dist_sum(value) for value in sums]
        loss, *others = (float(value) / (record.counts["loss"] or 1) for value in sums)
        rows.append([loss, float(record.result.grad_norm), *others])
    return rows
