"""What an objective is, and the settings of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from trainer.heads.divergence import Divergence

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainer.data.store.sequences import Sample


class ObjectiveName(StrEnum):
    """The names users type as `objective=<name>`."""

    sft = "sft"
    pretrain = "pretrain"
    classification = "classification"
    dpo = "dpo"
    orpo = "orpo"
    simpo = "simpo"
    reward = "reward"
    seq2seq = "seq2seq"
    kto = "kto"
    distillation = "distillation"


class PairLoss(StrEnum):
    """How DPO turns the difference of two rewards into a loss."""

    sigmoid = "sigmoid"
    ipo = "ipo"
    hinge = "hinge"


@dataclass(kw_only=True, slots=True)
class ObjectiveConfig:
    """Settings shared by all objectives."""

    name: ObjectiveName = ObjectiveName.sft
    """Which objective runs; set by the group choice `objective=<name>`, not by hand."""


@dataclass(kw_only=True, slots=True)
class ForgettingConfig:
    """Keeping a model as it was, on the documents of the sources marked `data.sources.<name>.replay=true`."""

    kl_weight: float = 0.0
    """Weight of the divergence from the model before training, a mean over the tokens of replayed documents; 0 leaves it out."""
    replay_loss: bool = True
    """Whether replayed documents are learned too, as any other; with `false` they only hold the model where it was."""


@dataclass(kw_only=True, slots=True)
class SftConfig(ObjectiveConfig):
    """Supervised fine-tuning: next-token loss on the supervised tokens."""

    forgetting: ForgettingConfig = field(default_factory=ForgettingConfig)
    """What is done against forgetting."""


@dataclass(kw_only=True, slots=True)
class PretrainConfig(SftConfig):
    """Continued pre-training: next-token loss on every token of plain texts."""

    name: ObjectiveName = ObjectiveName.pretrain


@dataclass(kw_only=True, slots=True)
class ClassificationConfig(ObjectiveConfig):
    """Labels of a document, predicted from the sequence-classification head: one, or any number of them."""

    name: ObjectiveName = ObjectiveName.classification
    labels: list[str] | None = None
    """Label names in the order of their ids; default: the sorted labels of the training data."""
    multi_label: bool = False
    """A document has any number of labels: a list, or one text with `|` between them, empty for none; 62 labels at most."""
    class_weights: Any = None
    """A weight for each label in the order of `labels`, or `balanced`; with `multi_label` it counts where the label is true."""


@dataclass(kw_only=True, slots=True)
class DpoConfig(ObjectiveConfig):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) against the model as it was."""

    name: ObjectiveName = ObjectiveName.dpo
    beta: float = 0.1
    """How closely the model stays with the reference: larger is closer (for `ipo`, its tau)."""
    loss_type: PairLoss = PairLoss.sigmoid
    """`sigmoid` (DPO), `ipo` (Azar et al. 2023, arXiv:2310.12036, per token) or `hinge` (SLiC, arXiv:2305.10425)."""
    label_smoothing: float = 0.0
    """Share of pairs believed to be labelled the wrong way round, 0 to below 0.5 (conservative DPO); `sigmoid` only."""
    sft_weight: float = 0.0
    """Weight of the chosen answer's own loss, its mean over tokens, added to each pair's; 0 leaves it out."""


@dataclass(kw_only=True, slots=True)
class OrpoConfig(ObjectiveConfig):
    """Odds-ratio preference optimisation (Hong et al. 2024, arXiv:2403.07691): SFT and preference at once, no reference."""

    name: ObjectiveName = ObjectiveName.orpo
    beta: float = 0.1
    """Weight of the odds ratio beside the chosen answer's own loss (the paper's lambda)."""


@dataclass(kw_only=True, slots=True)
class SimpoConfig(ObjectiveConfig):
    """Simple preference optimisation (Meng et al. 2024, arXiv:2405.14734): mean log-probabilities, no reference."""

    name: ObjectiveName = ObjectiveName.simpo
    beta: float = 2.0
    """Scale of the reward, which is beta times the mean log-probability of a token."""
    gamma: float = 1.0
    """Margin by which the chosen answer's reward should exceed the other's; about half of beta as a rule."""
    label_smoothing: float = 0.0
    """Share of pairs believed to be labelled the wrong way round, 0 to below 0.5."""
    sft_weight: float = 0.0
    """Weight of the chosen answer's own loss, its mean over tokens, added to each pair's; 0 leaves it out."""


@dataclass(kw_only=True, slots=True)
class RewardConfig(ObjectiveConfig):
    """A reward model: one score an answer, the preferred one's higher (Bradley and Terry 1952)."""

    name: ObjectiveName = ObjectiveName.reward
    centre: float = 0.0
    """Weight of the squared sum of a pair's scores, which keeps scores around zero (arXiv:2312.09244); 0 leaves it out."""


@dataclass(kw_only=True, slots=True)
class Seq2seqConfig(ObjectiveConfig):
    """Encoder-decoder models (T5, BART and their kin): the answer is learned by the decoder, the prompt read by the encoder."""

    name: ObjectiveName = ObjectiveName.seq2seq
    prefix: str = ""
    """Text put before every prompt, such as `summarize: ` (its space included) for T5 models that were trained with it."""
    max_target: int = 256
    """Longest answer in tokens; `data.max_length` bounds the prompt, and `data.over_length` says what happens beyond either."""


@dataclass(kw_only=True, slots=True)
class KtoConfig(ObjectiveConfig):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306): answers with a verdict each, no pairs."""

    name: ObjectiveName = ObjectiveName.kto
    beta: float = 0.1
    """How closely the model stays with the reference: larger is closer."""
    desirable_weight: float = 1.0
    """Weight of desirable answers; the denominator stays the number of answers."""
    undesirable_weight: float = 1.0
    """Weight of undesirable ones; keep weight times number of both kinds within 1:1 and 4:3, the desirable ones heavier."""


@dataclass(kw_only=True, slots=True)
class TeacherConfig:
    """The model that is imitated. It is frozen, sharded beside the student, and no part of checkpoints or exports."""

    path: str | None = None
    """Directory of a Hugging Face model with the student's vocabulary, or a hub id, as in `model.path`."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""


@dataclass(kw_only=True, slots=True)
class DistillationConfig(ObjectiveConfig):
    """Knowledge distillation: the teacher's distribution over the vocabulary at each supervised token."""

    name: ObjectiveName = ObjectiveName.distillation
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The model that is imitated."""
    divergence: Divergence = Divergence.forward_kl
    """`forward_kl` covers all a teacher would say, `reverse_kl` its likeliest, `jensen_shannon` is between (arXiv:2306.13649)."""
    interpolation: float = 0.5
    """The teacher's weight in the mixture of `jensen_shannon` (the paper's beta), above 0 and below 1."""
    temperature: float = 1.0
    """Softens both distributions; the divergence is multiplied by its square (arXiv:1503.02531)."""
    sft_weight: float = 0.0
    """Weight of the plain loss on the same tokens, added to the divergence; 0 leaves it out."""


class Objective(Protocol):
    """Turns a batch into sums and a sample into the counts that divide them.

    The term `loss` carries the gradient; other terms are for metrics and carry none. A term may be made in evaluation
    only, and then have a shape (`confusion`).
    """

    sequences_per_document: int
    """How many sequences of the prepared data make one document: 1, or 2 for pairs (the chosen answer, then the other)."""
    perplexity: bool
    """Whether the exponential of the loss is the perplexity of a language model."""
    metrics: tuple[str, ...]
    """Terms that are logged while training, beside the loss; each is divided by the count of `loss`."""
    head_labels: int | None
    """Outputs of the classification head that takes the place of the language model's; 0: one a label of the data."""
    uses_reference: bool
    """Whether it compares with the log-probabilities of the model as it was before training."""
    looks_ahead: bool
    """Whether `terms` needs means over the whole step (`batch["ahead"]`), of batches marked `mismatched` that it is given
    before the first backward pass (`trainer/objectives/ahead.py`)."""

    def counts(self, sample: Sample) -> dict[str, int]:
        """Denominators that this sample adds, by term; stored when the data is prepared, after the shift."""

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Sums over the micro-batch, by term: float32 tensors on the model's device, 0-d in training."""
