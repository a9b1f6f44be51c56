"""Knowledge distillation (Hinton et al. 2015, arXiv:1503.02531): imitate a teacher's distribution at each token.

Off-policy, on the supervised tokens of given documents, with the divergences of generalised knowledge distillation
(Agarwal et al. 2023, arXiv:2306.13649).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from strategies.settings import DESCRIBES, FREE, group, number, setting
from trainer.losses.divergence import DistillationLosses, Divergence, DivergenceMeasure, TeacherComparison
from trainer.model.config import may_be_hub_id
from trainer.objectives.base import (
    Objective,
    ObjectiveConfig,
    ObjectiveFamily,
    OtherSettings,
    ReferenceModels,
    TeacherConfig,
    UnlabelledDataSpec,
)
from trainer.objectives.causal import states_at_targets
from trainer.objectives.teacher import Teacher, teacher_of


@dataclass(kw_only=True, slots=True)
class DistillationConfig(ObjectiveConfig):
    """Knowledge distillation: the teacher's distribution over the vocabulary at each supervised token."""

    name: str = "distillation"
    teacher: TeacherConfig = group(TeacherConfig, resume=FREE)
    """The teacher model, which the student imitates."""
    divergence: Divergence = setting(Divergence.forward_kl, reach=DESCRIBES)
    """`forward_kl` makes the student cover all that the teacher may say, `reverse_kl` only what is likeliest; `jensen_shannon`
    lies between (arXiv:2306.13649)."""
    interpolation: float = number(0.5, above=0, below=1, advice="0.5 as a rule; objective.divergence has both ends")
    """Weight of the teacher in the mixture of `jensen_shannon` (beta in the paper), above 0 and below 1."""
    temperature: float = number(1.0, above=0, advice="1 to 4 as a rule")
    """Softens both distributions. The divergence is multiplied by the square of the temperature (arXiv:1503.02531)."""
    sft_weight: float = number(0.0, least=0, advice="0 leaves it out; 0.1 to 1 as a rule")
    """Weight of the cross-entropy loss on the same tokens, added to the divergence. 0: not added."""


def distillation_problems(config: DistillationConfig, other_settings: OtherSettings) -> Iterator[str]:
    """What is wrong with the settings of a distillation, one line each: the divergence, the teacher's path, and added tokens.

    `other_settings`: the rest of the run's configuration.
    """
    uses_interpolation = config.divergence is Divergence.jensen_shannon
    if not uses_interpolation and config.interpolation != DistillationConfig().interpolation:
        yield (
            f"objective.interpolation={config.interpolation:g}: only jensen_shannon mixes the two; set "
            f"objective.divergence=jensen_shannon, not {config.divergence}"
        )
    teacher_path = config.teacher.path
    directory = Path(teacher_path or "").expanduser()
    if teacher_path is None:
        yield "objective.teacher.path: not set; give the model to imitate, as in objective.teacher.path=models/large"
    elif not directory.is_dir() and (directory.is_file() or not may_be_hub_id(teacher_path)):
        what = "is a file" if directory.is_file() else "does not exist"
        yield f"objective.teacher.path={teacher_path}: {what}; give a model directory, or a hub id such as org/name"
    if other_settings.model.add_tokens:
        yield (
            f"model.add_tokens={list(other_settings.model.add_tokens)}: the teacher of objective=distillation does not know "
            "them; leave them out, or use objective=sft"
        )


class Distillation(Objective):
    """Terms, summed over supervised tokens: `loss` (carries the gradient), its parts `divergence` and `sft_loss`, and
    `accuracy` (the student's argmax is the token of the data, evaluation only).
    """

    metrics = ("divergence", "sft_loss")

    def __init__(self, config: DistillationConfig, teacher: Teacher) -> None:
        self.config = config
        self.teacher = teacher

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute how far the student's distribution is from the teacher's, and the loss on the data's own tokens.

        Both decoders run on all tokens, both heads on supervised positions only: those that predict a target.
        """
        teacher_head, teacher_hidden = self.teacher(model, batch)
        head, student_hidden, targets = states_at_targets(model, batch)
        config = self.config
        # Given a comparison, the head returns its losses in place of the plain one. It compares both distributions a chunk of
        # rows at a time: neither model's logits exist as a whole.
        comparison = TeacherComparison(
            measure=DivergenceMeasure(config.divergence, config.temperature, config.interpolation),
            hidden=teacher_hidden,
            head=teacher_head,
            divergence_weight=1.0,
            loss_weight=config.sft_weight,
            row_weights=batch.get("target_weights"),
        )
        losses = DistillationLosses(*head(student_hidden, targets=targets, comparison=comparison))
        return {
            "loss": losses.total,
            "divergence": losses.divergence.detach(),
            "sft_loss": losses.compared_nll.detach(),  # cross-entropy of the rows that are compared: here, all
            "accuracy": losses.correct.detach(),
        }


def build_distillation(config: DistillationConfig, references: ReferenceModels) -> Objective:
    """The loss with its teacher."""
    return Distillation(config, teacher_of(references))


DISTILLATION = ObjectiveFamily(
    settings=DistillationConfig,
    data_spec=lambda config: UnlabelledDataSpec(),
    build=build_distillation,
    problems=distillation_problems,
    compares_distributions=lambda config: True,
    teacher=lambda config: config.teacher,
)
