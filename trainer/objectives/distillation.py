"""Knowledge distillation (Hinton et al. 2015, arXiv:1503.02531): imitate a teacher's distribution at each token.

Off-policy, on the supervised tokens of given documents, with the divergences of generalised knowledge distillation
(Agarwal et al. 2023, arXiv:2306.13649).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from trainer.heads.divergence import Against, Measure
from trainer.objectives.base import DistillationConfig
from trainer.objectives.causal import supervised_rows

if TYPE_CHECKING:
    from trainer.data.store.sequences import Sample
    from trainer.objectives.teacher import Teacher


class Distillation:
    """Terms, summed over supervised tokens: `loss` (carries the gradient), its parts `divergence` and `sft_loss`, and
    `accuracy` (the student's argmax is the token of the data, evaluation only).
    """

    sequences_per_document = 1
    perplexity = False
    metrics: tuple[str, ...] = ("divergence", "sft_loss")
    head_labels: int | None = None
    uses_reference = False
    looks_ahead = False

    def __init__(self, config: DistillationConfig, teacher: Teacher) -> None:
        self.config, self.teacher = config, teacher

    def counts(self, sample: Sample) -> dict[str, int]:
        """Supervised targets: a document's first token has none."""
        return {"loss": int(sample.supervised[1:].sum())}

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Run both decoders on all tokens and both heads on supervised rows only."""
        teacher_head, states = self.teacher(model, batch)
        head, selected, targets = supervised_rows(model, batch)
        config = self.config
        total, nll, apart, correct, _ = head(
            selected,
            targets=targets,
            against=Against(
                measure=Measure(config.divergence, config.temperature, config.interpolation),
                hidden=states,
                head=teacher_head,
                divergence_weight=1.0,
                loss_weight=config.sft_weight,
            ),
        )
        parts = {"divergence": apart, "sft_loss": nll, "accuracy": correct}
        return {"loss": total, **{name: value.detach() for name, value in parts.items()}}
