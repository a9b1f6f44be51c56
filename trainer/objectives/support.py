"""What each objective asks of its own settings and of the data, before anything is read."""

from __future__ import annotations

import math
from collections.abc import Iterator

from trainer.data.config import DataConfig, DataFormat, Layout, OverLength
from trainer.data.tokens.template import LearnConfig
from trainer.heads.divergence import Divergence
from trainer.objectives.base import (
    ClassificationConfig,
    DistillationConfig,
    DpoConfig,
    KtoConfig,
    ObjectiveConfig,
    ObjectiveName,
    OrpoConfig,
    PairLoss,
    PretrainConfig,
    RewardConfig,
    Seq2seqConfig,
    SftConfig,
    SimpoConfig,
)

MOST_BITS = 62
"""Labels of one document that a prepared data set can keep, a bit each."""

PAIRS = DpoConfig | OrpoConfig | SimpoConfig | RewardConfig
"""The objectives over pairs of answers."""


def problems(objective: ObjectiveConfig, data: DataConfig) -> Iterator[str]:
    """What is wrong with an objective's own settings, and with the data for it, one line each."""
    if isinstance(objective, PAIRS):
        yield from _pairs(objective, data)
    if isinstance(objective, KtoConfig):
        yield from _rated(objective, data)
    if isinstance(objective, PretrainConfig):
        yield from _texts(data)
    if isinstance(objective, DistillationConfig):
        yield from _distillation(objective)
    yield from _forgetting(objective, data)
    classification = objective.name is ObjectiveName.classification
    if classification and data.packing:
        yield "data.packing=true: a classified document has a row of its own; set data.packing=false"
    if classification and data.format not in (DataFormat.auto, DataFormat.labelled):
        yield f"data.format={data.format}: objective=classification reads labelled rows; set data.format=labelled"
    if not classification and data.format is DataFormat.labelled:
        yield "data.format=labelled: labels are learned with objective=classification; add it, or choose another format"
    if isinstance(objective, ClassificationConfig):
        yield from _labels(objective)
    if isinstance(objective, Seq2seqConfig):
        yield from _two_sides(data)


def _two_sides(data: DataConfig) -> Iterator[str]:
    """What encoder-decoder models ask of the data."""
    if data.packing:
        yield "data.packing=true: prompts and answers are rows of their own, padded; set data.packing=false"
    if data.layout is Layout.padding_free:
        yield "data.layout=padding_free: encoder-decoder models are trained with padded rows; set data.layout=auto"
    if data.over_length in (OverLength.truncate_left, OverLength.split):
        yield (
            f"data.over_length={data.over_length.value}: would part a prompt from its answer; set data.over_length=truncate, "
            "drop or fail"
        )
    if data.learn != LearnConfig():
        yield "data.learn: objective=seq2seq learns the answer and nothing else; leave data.learn.turns and roles alone"
    named = {"data": data.format, **{f"data.sources.{name}": s.format for name, s in data.sources.items()}}
    for key, chosen in named.items():
        if chosen in (DataFormat.text, DataFormat.preference):  # labelled rows are refused above
            yield (
                f"{key}.format={chosen}: objective=seq2seq reads a prompt and an answer; set {key}.format=prompt_completion, "
                "pair or messages"
            )


def _labels(config: ClassificationConfig) -> Iterator[str]:
    labels, weights = config.labels, config.class_weights
    if labels is not None and len(set(labels)) < max(1 if config.multi_label else 2, len(labels)):
        yield f"objective.labels={labels}: must be two or more different names; null takes those of the data"
    if labels is not None and config.multi_label and len(labels) > MOST_BITS:
        yield f"objective.labels: {len(labels)} names, at most {MOST_BITS} with objective.multi_label=true; leave some out"
    if labels is not None and config.multi_label and (marked := next((n for n in labels if "|" in n), None)):
        yield f"objective.labels: {marked!r} contains |, which stands between labels; rename it"
    if weights is None or weights == "balanced":
        return
    numbers = weights if isinstance(weights, list) else []
    if not numbers or not all(isinstance(w, int | float) and math.isfinite(w) and w > 0 for w in numbers):
        yield f"objective.class_weights={weights}: must be balanced, or a list of numbers above 0, one for each label"
    elif labels is not None and len(numbers) != len(labels):
        yield f"objective.class_weights: {len(numbers)} weights for {len(labels)} labels; give one for each, or balanced"


def _formats(data: DataConfig) -> dict[str, DataFormat]:
    """Formats by the setting that holds them, up to its last word."""
    return {"data": data.format, **{f"data.sources.{name}": s.format for name, s in data.sources.items()}}


def _rated(objective: KtoConfig, data: DataConfig) -> Iterator[str]:
    """What answers with a verdict ask of the data."""
    if data.packing:
        yield "data.packing=true: objective=kto counts answers, each with its verdict; set data.packing=false"
    if data.over_length in (OverLength.truncate_left, OverLength.split):
        yield (
            f"data.over_length={data.over_length.value}: would part an answer from its prompt; set "
            "data.over_length=truncate or data.over_length=drop"
        )
    for key, chosen in _formats(data).items():
        if chosen not in (DataFormat.auto, DataFormat.thumbs, DataFormat.preference):
            yield (
                f"{key}.format={chosen}: objective=kto reads answers with a verdict; set {key}.format=thumbs, or "
                f"{key}.format=preference"
            )


def _texts(data: DataConfig) -> Iterator[str]:
    """What continued pre-training leaves no room for."""
    for key, chosen in _formats(data).items():
        if chosen not in (DataFormat.auto, DataFormat.text):
            yield f"{key}.format={chosen}: objective=pretrain learns plain texts; set {key}.format=text, or objective=sft"
    if data.learn != LearnConfig():
        yield "data.learn: says which turns of a conversation are learned, and objective=pretrain reads none; leave it out"


def _distillation(objective: DistillationConfig) -> Iterator[str]:
    """What is wrong with the settings of a teacher; `trainer.config.validate` looks at its path."""
    mixes = objective.divergence is Divergence.jensen_shannon
    if not mixes and objective.interpolation != DistillationConfig().interpolation:
        yield (
            f"objective.interpolation={objective.interpolation:g}: only jensen_shannon mixes the two; set "
            f"objective.divergence=jensen_shannon, not {objective.divergence}"
        )


def _forgetting(objective: ObjectiveConfig, data: DataConfig) -> Iterator[str]:
    """Whether there is something to replay, and what for."""
    replayed = [name for name, source in data.sources.items() if source.replay]
    if not isinstance(objective, SftConfig):
        if replayed:
            yield (
                f"data.sources.{replayed[0]}.replay=true: objective={objective.name} replays nothing; set it to false, or "
                "take objective=sft or objective=pretrain"
            )
        return
    forgetting = objective.forgetting
    if forgetting.kl_weight > 0 and not replayed:
        yield (
            f"objective.forgetting.kl_weight={forgetting.kl_weight:g}: no source is replayed; mark one of general text with "
            "data.sources.<name>.replay=true, or set it to 0"
        )
    if not forgetting.replay_loss and forgetting.kl_weight == 0:
        yield (
            "objective.forgetting.replay_loss=false: with objective.forgetting.kl_weight=0 replayed documents would do "
            "nothing; set objective.forgetting.kl_weight=0.5, or replay_loss=true"
        )
    if replayed and len(replayed) == len(data.sources) and not forgetting.replay_loss:
        yield (
            "objective.forgetting.replay_loss=false: every source is replayed, so that nothing would be learned; mark "
            "only the general text with replay=true"
        )


def _pairs(objective: DpoConfig | OrpoConfig | SimpoConfig | RewardConfig, data: DataConfig) -> Iterator[str]:
    """What objectives over pairs of answers ask of the data, and of their own settings."""
    if data.packing:
        yield "data.packing=true: the two answers of a pair stay together and fill no rows; set data.packing=false"
    if data.over_length in (OverLength.truncate_left, OverLength.split):
        yield (
            f"data.over_length={data.over_length.value}: would cut the two answers of a pair differently; set "
            "data.over_length=truncate or data.over_length=drop"
        )
    for key, chosen in _formats(data).items():
        if chosen not in (DataFormat.auto, DataFormat.preference):
            yield f"{key}.format={chosen}: objective={objective.name} reads pairs; set {key}.format=preference"
    if isinstance(objective, RewardConfig) and data.layout is Layout.padding_free:
        yield "data.layout=padding_free: a score belongs to a row of its own; set data.layout=auto"
    if isinstance(objective, DpoConfig) and objective.label_smoothing and objective.loss_type is not PairLoss.sigmoid:
        yield (
            f"objective.label_smoothing={objective.label_smoothing:g}: objective.loss_type={objective.loss_type} knows "
            "no doubt about labels; set it to 0, or objective.loss_type=sigmoid"
        )
