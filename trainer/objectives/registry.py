"""All objectives, and questions to the one that a configuration names."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.data.config import DataFormat
from trainer.data.objective_spec import DataSpec
from trainer.model.rules import kind_problems
from trainer.objectives import (
    classification,
    distillation,
    grpo,
    kto,
    preference,
    pretrain,
    reward,
    seq2seq,
    sft,
)
from trainer.objectives.base import (
    Objective,
    ObjectiveConfig,
    ObjectiveFamily,
    OtherSettings,
    ReferenceModels,
    formats_of,
)

FAMILIES: dict[str, ObjectiveFamily] = {
    family.name: family
    for family in (
        sft.SFT,
        pretrain.PRETRAIN,
        classification.CLASSIFICATION,
        preference.DPO,
        preference.ORPO,
        preference.SIMPO,
        reward.REWARD,
        seq2seq.SEQ2SEQ,
        kto.KTO,
        distillation.DISTILLATION,
        grpo.GRPO,
    )
}
"""By name, in the order in which they are listed to users."""


def objective_family(config: ObjectiveConfig) -> ObjectiveFamily:
    """The objective whose settings these are; plain settings, with no choice made, are those of sft."""
    return FAMILIES[config.name]


def max_generated_tokens(config: ObjectiveConfig) -> int:
    """Tokens of the longest answer that the model writes behind a document to learn from it; 0 if the data has the answers."""
    rollout = objective_family(config).rollout
    return 0 if rollout is None else int(rollout(config).max_new_tokens)


def data_spec_of(config: ObjectiveConfig) -> DataSpec:
    """How data is read for it."""
    return objective_family(config).data_spec(config)


def build_objective(config: ObjectiveConfig, references: ReferenceModels | None = None) -> Objective:
    """The loss. `references` are needed when `terms` is called, not here: counting samples does without them."""
    if references is None:
        references = ReferenceModels()
    return objective_family(config).build(config, references)


def objective_problems(config: ObjectiveConfig, other_settings: OtherSettings) -> Iterator[str]:
    """What is wrong with an objective's own settings, and with settings of data and model that it cannot work with.

    One line each. The objective's family (what one name, such as `sft`, stands for) checks its own; then follow what it cannot do
    with the data: replay, labels, prompts without answers.
    """
    family = objective_family(config)
    yield from family.problems(config, other_settings)
    replayed_sources = [name for name, source in other_settings.data.sources.items() if source.replay]
    if replayed_sources and not family.can_replay:
        yield (
            f"data.sources.{replayed_sources[0]}.replay=true: objective={config.name} replays nothing; set it to false, or "
            "take objective=sft or objective=pretrain"
        )
    readable_formats = family.data_spec(config).formats
    reads_labels = DataFormat.labelled in readable_formats
    if other_settings.data.format is DataFormat.labelled and not reads_labels:
        yield "data.format=labelled: labels are learned with objective=classification; add it, or choose another format"
    for key, data_format in formats_of(other_settings.data).items():
        if data_format is DataFormat.prompt and data_format not in readable_formats:
            yield f"{key}.format=prompt: reads no answers to learn from; add objective=grpo, which writes its own, or drop it"


def model_problems(config: ObjectiveConfig, other_settings: OtherSettings, hf_config: dict | None) -> Iterator[str]:
    """What in a model's config.json (`hf_config`; None if it is not known) does not go with the objective."""
    if hf_config is None:
        return
    family = objective_family(config)
    lengths = family.max_positions(config, other_settings.data)
    yield from kind_problems(hf_config, other_settings.model.path, family.kind, config.name, lengths)
