"""Supervised fine-tuning: the next-token loss on supervised tokens, with optional terms against forgetting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from strategies.errors import DataError
from strategies.settings import DESCRIBES, number, setting
from trainer.data.batches.collate import Collator
from trainer.data.config import Layout
from trainer.data.store.sequences import REPLAY, Sample, TokenDataset
from trainer.losses.divergence import Against, Divergence, Measure
from trainer.objectives.base import Around, Beside, Family, Objective, ObjectiveConfig, UnlabelledReading
from trainer.objectives.causal import counted, summed_loss, supervised_rows
from trainer.objectives.teacher import Teacher, teacher_of


@dataclass(kw_only=True, slots=True)
class ForgettingConfig:
    """Keeping a model as it was, on the documents of the sources marked `data.sources.<name>.replay=true`."""

    kl_weight: float = number(0.0, least=0, advice="0 leaves it out; 0.1 to 1 as a rule")
    """Weight of the divergence from the model before training, a mean over the tokens of replayed documents; 0 leaves it out."""
    replay_loss: bool = setting(True, reach=DESCRIBES)
    """Whether replayed documents are learned too, as any other; with `false` they only hold the model where it was."""


@dataclass(kw_only=True, slots=True)
class SftConfig(ObjectiveConfig):
    """Supervised fine-tuning: next-token loss on the supervised tokens."""

    label_smoothing: float = number(0.0, least=0, below=0.5, advice="0 trusts every label or pair; 0.1 as a rule")
    """Share of each target that is spread evenly over the vocabulary, 0 to below 0.5; in training only."""
    forgetting: ForgettingConfig = field(default_factory=ForgettingConfig)
    """What is done against forgetting."""


def forgetting_of(config: ObjectiveConfig) -> ForgettingConfig:
    """What is done against forgetting; nothing under settings that no choice was made of."""
    return config.forgetting if isinstance(config, SftConfig) else ForgettingConfig()


def smoothing_of(config: ObjectiveConfig) -> float:
    """How far labels are smoothed."""
    return config.label_smoothing if isinstance(config, SftConfig) else 0.0


def holds(config: ObjectiveConfig) -> bool:
    """Whether the objective compares with the distributions of the model as it was before training."""
    return forgetting_of(config).kl_weight > 0


def problems(config: ObjectiveConfig, around: Around) -> Iterator[str]:
    """Whether there is something to replay, and what for."""
    sources, forgetting = around.data.sources, forgetting_of(config)
    replayed = [name for name, source in sources.items() if source.replay]
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
    if smoothing_of(config) and forgetting.kl_weight > 0:
        yield (
            f"objective.label_smoothing={smoothing_of(config):g} with objective.forgetting.kl_weight={forgetting.kl_weight:g}: "
            "spread targets pull away from the model that is to be held; set one of them to 0"
        )
    if replayed and len(replayed) == len(sources) and not forgetting.replay_loss:
        yield (
            "objective.forgetting.replay_loss=false: every source is replayed, so that nothing would be learned; mark "
            "only the general text with replay=true"
        )


class SftReading(UnlabelledReading):
    """Documents as they are; where the model is held, the replayed ones of a micro-batch stand in it once more, apart."""

    def __init__(self, *, held: bool = False) -> None:
        self.held = held
        self.marks = {REPLAY: 1} if held else {}

    def counts(self, sample: Sample) -> dict[str, float]:
        """Supervised targets: a document's first token has none. Those of replayed documents are counted once more."""
        learned = sample.learned()
        return {"loss": learned, **({REPLAY: learned * int(sample.marks[REPLAY])} if REPLAY in sample.marks else {})}

    def check(self, train: TokenDataset) -> None:
        if self.held and (REPLAY not in train.counts or not train.counts[REPLAY].any()):
            raise DataError(
                "objective.forgetting.kl_weight: no learned token of the sources marked replay=true is left (see what was "
                "dropped in the data report); raise data.max_length, loosen data.filters, or set "
                "objective.forgetting.kl_weight=0"
            )

    def collator(self, layout: Layout, pad_token_id: int, decoder_start: int | None = None) -> Collator:
        return (ReplayCollator if self.held else Collator)(layout, pad_token_id)


class ReplayCollator(Collator):
    """Adds a micro-batch of the replayed documents alone, `replay`, and whose each supervised row is: `replay_rows` and
    `other_rows` (int64 each)."""

    def add(self, batch: dict[str, Any], samples: Sequence[Sample]) -> None:
        if REPLAY not in samples[0].marks:
            return
        ours = torch.tensor([bool(sample.marks[REPLAY]) for sample in samples])[batch["row_sequence"]]
        batch |= {"replay_rows": ours.nonzero()[:, 0], "other_rows": (~ours).nonzero()[:, 0]}
        chosen = [replace(sample, marks={}) for sample in samples if sample.marks[REPLAY]]
        # Where there is none, the shortest document with nothing supervised: all ranks must run the model alike.
        shortest = min(samples, key=lambda sample: len(sample.input_ids))
        batch["replay"] = self(chosen or [Sample(shortest.input_ids, np.zeros_like(shortest.supervised))])


class Sft(Objective):
    """Terms: `loss` (summed cross-entropy, carries the gradient), its parts by source where there are several, and `accuracy`
    (correct argmaxes, evaluation only)."""

    perplexity = True

    def __init__(self, smoothing: float = 0.0) -> None:
        self.smoothing = smoothing
        if smoothing:  # the loss without it is logged, and is like that of evaluations
            self.metrics, self.compared = ("nll",), "nll"

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Run the decoder on all tokens and the head on supervised rows only."""
        return counted(batch, *summed_loss(model, batch, self.smoothing))


class Replaying(Sft):
    """Beside the loss, KL(before, now) on the supervised rows of replayed documents: a mean over their tokens.

    Terms in training, all to be divided by the count of `loss`: `loss`, the sum of both with the gradient, and its parts
    `sft_loss` and `replay_kl`. Evaluation has the plain loss.
    """

    metrics = ("sft_loss", "replay_kl")
    compared = "sft_loss"

    def __init__(self, config: ForgettingConfig, before: Teacher) -> None:
        super().__init__()
        self.config, self.before = config, before

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Run the decoder once on all tokens, and the model before training on the replayed documents."""
        if not torch.is_grad_enabled():
            return super().terms(model, batch)
        before_head, before = self.before(model, batch["replay"])
        head, selected, targets = supervised_rows(model, batch)
        learned, replayed = batch["totals"]["loss"], batch["totals"][REPLAY]
        # The loop divides by all learned tokens; these turn that into a division by their own number.
        per_replayed = learned / (replayed or 1)
        per_other = 1.0 if self.config.replay_loss else learned / ((learned - replayed) or 1)
        total, replayed_nll, apart, _, nll = head(
            selected,
            targets=targets,
            against=Against(
                measure=Measure(Divergence.forward_kl),
                hidden=before,
                head=before_head,
                divergence_weight=self.config.kl_weight * per_replayed,
                loss_weight=float(self.config.replay_loss),
                rows=batch["replay_rows"],
                others=batch["other_rows"],
                others_weight=per_other,
                weights=batch.get("target_weights"),
            ),
        )
        nll = nll + replayed_nll if self.config.replay_loss else nll * per_other
        return {"loss": total, "sft_loss": nll.detach(), "replay_kl": apart.detach() * per_replayed}


def build(config: ObjectiveConfig, beside: Beside) -> Objective:
    """The plain loss, or that which holds the model."""
    return Replaying(forgetting_of(config), teacher_of(beside)) if holds(config) else Sft(smoothing_of(config))


SFT = Family(
    settings=SftConfig,
    reading=lambda config: SftReading(held=holds(config)),
    build=build,
    problems=problems,
    compares=holds,
    replays=True,
    writes_answers=True,
)
