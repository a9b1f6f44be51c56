"""Classifiers and reward models whose rows several ranks share, against one process on padded rows. Part of the parity job.

The one process is transformers' own classifier; the ranks score one token of each document in a row without padding.
"""

from dataclasses import replace
from pathlib import Path

from strategies.base import StrategyName, ZeroConfig
from strategies.sequence import with_sequence_parallelism
from tests.helpers.building import GLOBAL_BATCH, STRATEGIES, model_dir, pair_samples, pair_set, run_config, trainer_for
from tests.helpers.stores import write
from tests.parity.base import Curve, Job
from tests.parity.sequences import STEPS, curve
from trainer.config.parallel import ParallelConfig
from trainer.data.prepare import PreparedData
from trainer.data.store.sequences import LABEL, Sample, TokenDataset
from trainer.model.config import ModelConfig
from trainer.model.loading import load_tokenizer
from trainer.objectives.classification import ClassificationConfig
from trainer.objectives.reward import RewardConfig

LABEL_NAMES = ["a", "b", "c"]
OBJECTIVES = {
    "classification": ClassificationConfig(class_weights=[0.5, 1.0, 2.0]),
    "multi_label": ClassificationConfig(multi_label=True),
    "reward": RewardConfig(centre=0.01),
}
SHARDING = {**STRATEGIES, "zero3": ZeroConfig(name=StrategyName.zero3, stage=3, persistence_threshold=0)}


def labelled_set(root: Path, *, several: bool, padding: int) -> PreparedData:
    """Documents of 3 to 40 tokens with one of three labels, or with any number. Some end with the token that pads."""
    directory = root / f"pooled-labels-{several}"
    if not (directory / "manifest.json").exists():
        made = []
        for index, sample in enumerate(pair_samples(24)):
            ids = sample.input_ids.copy()
            if index % 5 == 0:
                ids[-1] = padding
            label = index % 7 if several else index * index % 7 % 3
            made.append(Sample(ids, sample.supervised, {LABEL: label}))
        write(directory, made, lambda sample: {"loss": 1}, {"fingerprint": "pooled labels"})
    opened = TokenDataset.open(directory)
    return PreparedData(train=opened, evaluation=opened, directory=directory, report={}, label_names=LABEL_NAMES)


def compare(job: Job, objective: str, tuning: str, strategy: str, degree: int, experts: int = 1) -> dict[str, Curve]:
    """Loss, gradient norm and metrics of each step: of ranks of which `degree` share each row, and of one process.

    `experts`: ranks over which experts are distributed (`parallel.experts`). Above 1 the model is a mixture.
    """

    def made() -> tuple[Path, PreparedData]:
        model = model_dir(job.root, "llama")
        if experts > 1:
            model = model_dir(job.root / "pooled", "qwen3_moe", num_experts=8)
        if objective == "reward":
            return model, pair_set(job.root)
        padding = load_tokenizer(ModelConfig(path=str(model))).pad_token_id
        return model, labelled_set(job.root, several=objective == "multi_label", padding=padding)

    model, data = job.first_here(made)
    readers = job.runtime.world_size // degree
    config = run_config(
        model,
        SHARDING[strategy],
        tuning,
        micro=GLOBAL_BATCH // (2 * readers),
        steps=STEPS,
        objective=OBJECTIVES[objective],
        parallel=ParallelConfig(sequence=degree, experts=experts),
    )
    runtime = with_sequence_parallelism(job.runtime, degree)
    found = curve(trainer_for(config, data, runtime), runtime.world_size)
    lone = replace(config, parallel=ParallelConfig())
    key = ("pooled", objective, tuning, experts > 1)
    expected = job.oracle(key, lambda: curve(job.lone_trainer(lone, data), 1), elsewhere=[])
    return {"found": found, "expected": expected}
