"""Supervised fine-tuning: the next-token loss on supervised tokens, with optional terms against forgetting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from strategies.errors import DataError
from strategies.sequence import all_to_all_vectors
from strategies.settings import DESCRIBES, number, setting
from trainer.data.batches.collate import Collator
from trainer.data.batches.cutting import AXES, Axis, RowCut, all_to_all_row_counts, num_rows_before
from trainer.data.config import Layout
from trainer.data.store.sequences import REPLAY, Sample, TokenDataset
from trainer.losses.divergence import DistillationLosses, Divergence, DivergenceMeasure, TeacherComparison
from trainer.objectives.base import (
    Objective,
    ObjectiveConfig,
    ObjectiveFamily,
    OtherSettings,
    ReferenceModels,
    UnlabelledDataSpec,
)
from trainer.objectives.causal import next_token_terms, states_at_targets, summed_loss
from trainer.objectives.teacher import Teacher, TeacherStates, teacher_of


@dataclass(kw_only=True, slots=True)
class ForgettingConfig:
    """Keeping a model as it was, on the documents of the sources marked `data.sources.<name>.replay=true`."""

    kl_weight: float = number(0.0, least=0, advice="0 leaves it out; 0.1 to 1 as a rule")
    """Weight of the KL divergence from the model before training, as a mean over the tokens of replayed documents. 0: not
    added."""
    replay_loss: bool = setting(True, reach=DESCRIBES)
    """Also train on replayed documents, as on any other. `false`: they only enter the divergence."""


@dataclass(kw_only=True, slots=True)
class SftConfig(ObjectiveConfig):
    """Supervised fine-tuning: next-token loss on the supervised tokens."""

    label_smoothing: float = number(0.0, least=0, below=0.5, advice="0 trusts every label or pair; 0.1 as a rule")
    """Share of each target that is spread evenly over the vocabulary, 0 to below 0.5. Only in training."""
    forgetting: ForgettingConfig = field(default_factory=ForgettingConfig)
    """Remedies for catastrophic forgetting."""


def forgetting_settings(config: ObjectiveConfig) -> ForgettingConfig:
    """The settings against forgetting; the defaults (off) for objectives that have none."""
    return config.forgetting if isinstance(config, SftConfig) else ForgettingConfig()


def label_smoothing(config: ObjectiveConfig) -> float:
    """The share of label smoothing; 0 for objectives without that setting."""
    return config.label_smoothing if isinstance(config, SftConfig) else 0.0


def uses_replay_kl(config: ObjectiveConfig) -> bool:
    """Whether the loss has the divergence from the model before training, on replayed documents."""
    return forgetting_settings(config).kl_weight > 0


def sft_problems(objective: ObjectiveConfig, other_settings: OtherSettings) -> Iterator[str]:
    """What is wrong with the settings of replay, forgetting and label smoothing together, one line each.

    A source is replayed if `data.sources.<name>.replay` is true: its documents, of general text, keep the model near what it was
    before. `forgetting.kl_weight` adds a divergence from the initial model on them. `other_settings`: the rest of the run's
    configuration.
    """
    sources = other_settings.data.sources
    forgetting = forgetting_settings(objective)
    replayed_sources = [name for name, source in sources.items() if source.replay]
    if forgetting.kl_weight > 0 and not replayed_sources:
        yield (
            f"objective.forgetting.kl_weight={forgetting.kl_weight:g}: no source is replayed; mark one of general text with "
            "data.sources.<name>.replay=true, or set it to 0"
        )
    if not forgetting.replay_loss and forgetting.kl_weight == 0:
        yield (
            "objective.forgetting.replay_loss=false: with objective.forgetting.kl_weight=0 replayed documents would do "
            "nothing; set objective.forgetting.kl_weight=0.5, or replay_loss=true"
        )
    if label_smoothing(objective) and forgetting.kl_weight > 0:
        yield (
            f"objective.label_smoothing={label_smoothing(objective):g} with "
            f"objective.forgetting.kl_weight={forgetting.kl_weight:g}: spread targets pull away from the model "
            "that is to be held; set one of them to 0"
        )
    if replayed_sources and len(replayed_sources) == len(sources) and not forgetting.replay_loss:
        yield (
            "objective.forgetting.replay_loss=false: every source is replayed, so that nothing would be learned; mark "
            "only the general text with replay=true"
        )


class SftDataSpec(UnlabelledDataSpec):
    """Documents as they are. With `separate_replayed`, a micro-batch also holds its replayed documents as a batch of their own,
    which the model before training reads."""

    def __init__(self, *, separate_replayed: bool = False) -> None:
        self.separate_replayed = separate_replayed
        self.marks = {REPLAY: 1} if separate_replayed else {}

    def counts(self, sample: Sample) -> dict[str, float]:
        """Count what a sample adds to the step's divisors: its supervised targets, and how many of them are replayed.

        A document's first token is no target, since nothing predicts it.
        """
        num_learned = sample.total_target_weight()
        counts = {"loss": num_learned}
        if REPLAY in sample.marks:
            counts[REPLAY] = num_learned * int(sample.marks[REPLAY])
        return counts

    def check(self, train: TokenDataset) -> None:
        if self.separate_replayed and (REPLAY not in train.counts or not train.counts[REPLAY].any()):
            raise DataError(
                "objective.forgetting.kl_weight: no learned token of the sources marked replay=true is left (see what was "
                "dropped in the data report); raise data.max_length, loosen data.filters, or set "
                "objective.forgetting.kl_weight=0"
            )

    def collator(self, layout: Layout, pad_token_id: int, decoder_start: int | None = None) -> Collator:
        if self.separate_replayed:
            return ReplayCollator(layout, pad_token_id)
        return Collator(layout, pad_token_id)


class ReplayCollator(Collator):
    """Adds `replay`, a batch of the replayed documents alone, and the indices of supervised positions by kind of document:
    `replay_rows` and `other_rows` (int64).

    A cut micro-batch also has `replay_moves`: numbers of rows that this rank sends to each rank of its group, and receives from
    each. The replayed documents are a row of their own, which is cut elsewhere than the row they are a part of.
    """

    axes = AXES | {
        "replay": Axis.batch,
        "replay_rows": Axis.supervised_row_index,
        "other_rows": Axis.supervised_row_index,
    }

    def add_loss_inputs(self, batch: dict[str, Any], samples: Sequence[Sample]) -> None:
        """Add to `batch` its replayed documents as a batch of their own, under `replay`, which the initial model reads.

        Replayed documents are general text, learned against forgetting. `replay_rows` and `other_rows`: indices into the
        supervised positions (tokens with a target) of `batch`, of replayed documents and of all others.
        """
        if REPLAY not in samples[0].marks:  # as in the replayed documents themselves, for which this is called below
            return
        is_replayed = torch.tensor([bool(sample.marks[REPLAY]) for sample in samples])
        # For each supervised position, the number of its document in the batch.
        document_of_row = batch["row_sequence"]
        is_replayed_row = is_replayed[document_of_row]
        batch["replay_rows"] = is_replayed_row.nonzero()[:, 0]
        batch["other_rows"] = (~is_replayed_row).nonzero()[:, 0]
        replayed = [replace(sample, marks={}) for sample in samples if sample.marks[REPLAY]]
        if not replayed:
            # All ranks must run the model equally often: the shortest document, with nothing supervised, fills in.
            shortest = min(samples, key=lambda sample: len(sample.input_ids))
            replayed = [Sample(shortest.input_ids, np.zeros_like(shortest.supervised))]
        batch["replay"] = self(replayed)  # collated as a micro-batch of its own

    def cut(self, batch: dict[str, Any], cut: RowCut) -> dict[str, Any]:
        """Cut this rank's slice of a row that ranks share, and note how rows of replayed documents get from one cut to the other.

        See the class. `cut`: which slice this rank has.
        """
        slices = super().cut(batch, cut)
        if "replay" in batch:
            replay_positions = batch["target_rows"][batch["replay_rows"]]
            # How many rows of replayed documents lie before each rank's slice: of the row of replayed documents, and of the whole
            # row.
            in_replay = num_rows_before(batch["replay"]["target_rows"], slices["replay"]["row_slices"])
            in_row = num_rows_before(replay_positions, slices["row_slices"])
            slices["replay_moves"] = all_to_all_row_counts(in_replay, in_row, cut.sequence_rank)
        return slices


class Sft(Objective):
    """Terms: `loss` (summed cross-entropy, carries the gradient), its parts by source where there are several, and `accuracy`
    (correct argmaxes, evaluation only)."""

    perplexity = True

    def __init__(self, smoothing: float = 0.0) -> None:
        self.smoothing = smoothing
        if smoothing:  # evaluations measure the loss without smoothing, so that is logged too
            self.metrics = ("nll",)
            self.comparable_term = "nll"

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Run the decoder on all tokens and the head on supervised positions only."""
        return next_token_terms(batch, summed_loss(model, batch, self.smoothing))


class SftWithReplayKl(Sft):
    """Beside the loss, KL(before, now) on the supervised positions of replayed documents: a mean over their tokens.

    Terms in training, all to be divided by the count of `loss`: `loss`, the sum of both with the gradient, and its parts
    `sft_loss` and `replay_kl`. Evaluation has the plain loss.
    """

    metrics = ("sft_loss", "replay_kl")
    comparable_term = "sft_loss"

    def __init__(self, config: ForgettingConfig, initial_model: Teacher) -> None:
        super().__init__()
        self.config = config
        self.initial_model = initial_model

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the loss and its parts: `sft_loss`, and `replay_kl`, how far it is from the initial model on replayed text.

        The trained model runs once on all tokens, the initial model on the replayed documents. In evaluation: the terms without
        the divergence. All ranks must call; of the batch it reads the entries of `ReplayCollator`.
        """
        if not torch.is_grad_enabled():
            return super().terms(model, batch)
        initial_head, initial_hidden = self._initial_states(model, batch)
        head, hidden, targets = states_at_targets(model, batch)
        num_learned = batch["totals"]["loss"]
        num_replayed = batch["totals"][REPLAY]
        # The loop divides by all learned tokens of the step; these factors make it a mean over the tokens that have the term.
        replay_scale = num_learned / (num_replayed or 1)
        other_scale = 1.0
        if not self.config.replay_loss:
            other_scale = num_learned / ((num_learned - num_replayed) or 1)
        comparison = TeacherComparison(
            measure=DivergenceMeasure(Divergence.forward_kl),
            hidden=initial_hidden,
            head=initial_head,
            divergence_weight=self.config.kl_weight * replay_scale,
            loss_weight=float(self.config.replay_loss),
            compared_rows=batch["replay_rows"],
            uncompared_rows=batch["other_rows"],
            uncompared_weight=other_scale,
            row_weights=batch.get("target_weights"),
        )
        # Given a comparison, the head returns all of these sums, with the weights above in `total`.
        losses = DistillationLosses(*head(hidden, targets=targets, comparison=comparison))
        if self.config.replay_loss:
            sft_loss = losses.uncompared_nll + losses.compared_nll
        else:
            sft_loss = losses.uncompared_nll * other_scale
        return {
            "loss": losses.total,
            "sft_loss": sft_loss.detach(),
            "replay_kl": losses.divergence.detach() * replay_scale,
        }

    def _initial_states(self, model: nn.Module, batch: dict[str, Any]) -> TeacherStates:
        """Run the initial model on the supervised positions of replayed documents. All ranks must call.

        If ranks share rows, the replayed documents are cut otherwise than the whole batch: the states then move to the ranks that
        have the same tokens of the batch.
        """
        head, hidden = self.initial_model(model, batch["replay"])
        if "replay_moves" in batch:
            sent_to_rank, received_from_rank = batch["replay_moves"]  # numbers of rows
            hidden = all_to_all_vectors(hidden, sent_to_rank, received_from_rank, batch["row_slices"])
        return TeacherStates(head, hidden)


def build_sft(config: ObjectiveConfig, references: ReferenceModels) -> Objective:
    """The plain loss, or the one with a divergence on replayed documents if `objective.forgetting.kl_weight` asks for it."""
    if uses_replay_kl(config):
        return SftWithReplayKl(forgetting_settings(config), teacher_of(references))
    return Sft(label_smoothing(config))


SFT = ObjectiveFamily(
    settings=SftConfig,
    data_spec=lambda config: SftDataSpec(separate_replayed=uses_replay_kl(config)),
    build=build_sft,
    problems=sft_problems,
    compares_distributions=uses_replay_kl,
    can_replay=True,
    generates_answers=True,
)
