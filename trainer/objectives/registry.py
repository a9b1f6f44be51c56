"""All objectives, and questions to the one that a configuration names."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.data.config import DataFormat
from trainer.data.objective_spec import Reading
from trainer.model.rules import kind_problems
from trainer.objectives import classification, distillation, kto, preference, pretrain, reward, seq2seq, sft
from trainer.objectives.base import Around, Beside, Family, Objective, ObjectiveConfig

FAMILIES: dict[str, Family] = {
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
    )
}
"""By name, in the order in which they are listed to users."""


def family_of(config: ObjectiveConfig) -> Family:
    """The objective whose settings these are; plain settings, with no choice made, are those of sft."""
    return FAMILIES[config.name]


def reading_of(config: ObjectiveConfig) -> Reading:
    """How data is read for it."""
    return family_of(config).reading(config)


def build_objective(config: ObjectiveConfig, beside: Beside | None = None) -> Objective:
    """Its loss. What it needs `beside` the model is asked for when `terms` is called, not here."""
    return family_of(config).build(config, beside or Beside())


def problems(config: ObjectiveConfig, around: Around) -> Iterator[str]:
    """What is wrong with an objective's own settings and with the others for it, one line each."""
    family = family_of(config)
    yield from family.problems(config, around)
    replayed = [name for name, source in around.data.sources.items() if source.replay]
    if replayed and not family.replays:
        yield (
            f"data.sources.{replayed[0]}.replay=true: objective={config.name} replays nothing; set it to false, or "
            "take objective=sft or objective=pretrain"
        )
    labelled = DataFormat.labelled in family.reading(config).formats
    if around.data.format is DataFormat.labelled and not labelled:
        yield "data.format=labelled: labels are learned with objective=classification; add it, or choose another format"


def model_problems(config: ObjectiveConfig, around: Around, model: dict | None) -> Iterator[str]:
    """What of a model, the content of its config.json, does not go with the objective; nothing where it is not known."""
    if model is not None:
        family = family_of(config)
        lengths = family.longest(config, around.data)
        yield from kind_problems(model, around.model.path, family.kind, config.name, lengths)
