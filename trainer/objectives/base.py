"""What an objective is: a family of settings, of how data is read, and of a loss; one family a module of this room.

`ObjectiveFamily` lists what the rest of the trainer asks of one. docs/extending.md shows how to add an objective.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from strategies.settings import DESCRIBES, Reach, setting
from trainer.data.config import DataConfig, DataFormat
from trainer.data.document import WRONG_KIND_REASON, Document
from trainer.data.objective_spec import DataSpec
from trainer.data.store.sequences import TokenDataset
from trainer.model.config import ModelKind

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from strategies.base import StrategyConfig
    from trainer.model.config import ModelConfig
    from trainer.tuning.base import TuningConfig

Reference = Callable[["nn.Module"], "AbstractContextManager[None]"]
"""Switches the adapter of a tuned model off while the context is entered: the model then computes what it did before
training."""


@dataclass(kw_only=True, slots=True)
class ObjectiveConfig:
    """Settings shared by all objectives."""

    name: str = setting("sft", reach=DESCRIBES)
    """Which objective runs; set by the group choice `objective=<name>`, not by hand."""


@dataclass(kw_only=True, slots=True)
class TeacherConfig:
    """The model that is imitated. It is frozen, sharded beside the student, and no part of checkpoints or exports."""

    path: str | None = setting(None, reach=DESCRIBES)
    """Directory of a Hugging Face model with the student's vocabulary, or a Hub id, as in `model.path`."""
    revision: str | None = setting(None, reach=DESCRIBES)
    """Branch, tag or commit of a Hub model."""
    trust_remote_code: bool = setting(False, reach=Reach.code)
    """Run Python code that comes with the teacher. `model.trust_remote_code` is only for the student."""


class Objective(ABC):
    """Turns a micro-batch into sums ("terms"). The loop divides each by its count over the whole step.

    Sums, not means: a mean of means would depend on how documents are dealt to micro-batches and ranks. The term `loss`
    carries the gradient; all other terms are metrics, without a gradient. A term that exists in evaluation only may have
    a shape (`confusion`).
    """

    perplexity = False
    """Whether the exponential of the loss is the perplexity of a language model."""
    metrics: tuple[str, ...] = ()
    """Terms that are logged while training, beside the loss; each is divided by the count of `loss`."""
    comparable_term = "loss"
    """Name of the training term that can be compared with the loss of an evaluation: `loss` or one of `metrics`."""
    uses_reference = False
    """Whether it compares with the log-probabilities of the model as it was before training."""
    look_ahead_terms: tuple[str, ...] = ()
    """Terms whose mean over the whole step is needed before the first backward pass.

    A pass over extra batches (marked by the key `is_look_ahead`) makes their sums, and `batch["step_means"]` holds the means; see
    `trainer/objectives/step_totals.py`."""

    @abstractmethod
    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Sums over the micro-batch, by term: float32 tensors on the model's device, 0-d in training."""


class OtherSettings(Protocol):
    """The rest of the run's settings (data, model, tuning, strategy), for rules that concern an objective and something else."""

    data: DataConfig
    model: ModelConfig
    tuning: TuningConfig
    strategy: StrategyConfig


@dataclass(frozen=True, slots=True)
class ReferenceModels:
    """The models that an objective may compare the trained one with."""

    reference: Reference | None = None
    """Switches the tuned model's adapter off; None if no adapter can be switched off."""
    teacher: nn.Module | None = None
    """A second, frozen model; None without one."""
    keeps_initial_weights: bool = False
    """Whether the engine has a copy of the trained weights as the run began (`StepPlan.keeps_initial_weights`)."""


def _no_problems(config: Any, other_settings: OtherSettings) -> Iterator[str]:
    yield from ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveFamily:
    """One objective as the rest of the trainer sees it. Functions get its settings first."""

    settings: type[ObjectiveConfig]
    data_spec: Callable[[Any], DataSpec]
    """Makes its data spec: the rows it takes and how they become sequences."""
    build: Callable[[Any, ReferenceModels], Objective]
    """Makes the loss."""
    problems: Callable[[Any, OtherSettings], Iterator[str]] = _no_problems
    """Finds what is wrong with its settings, alone and with others, one line each. Runs before anything is read."""
    kind: ModelKind = ModelKind.causal
    """The kind of model that it trains."""
    num_outputs: int | None = None
    """Size of the classification head; None: one output for each label of the data."""
    multi_label: Callable[[Any], bool] = lambda config: False
    """Whether several outputs of the head may be true at once."""
    settle: Callable[[Any, TokenDataset, list[str] | None], tuple[Any, dict[str, str]]] = lambda config, *_: (
        config,
        {},
    )
    """Fills in the settings that depend on the prepared data (`balanced` class weights): returns the new settings, and what
    was put in their place, by key."""
    compares_distributions: Callable[[Any], bool] = lambda config: False
    """Whether it compares distributions over the vocabulary, with a teacher or with the model as it was."""
    compares_with_initial_model: Callable[[Any], bool] = lambda config: False
    """Whether it compares log-probabilities of texts that are not known beforehand with those of the model as the run began. That
    model is then kept: as the tuned one with its adapter off, or as a frozen copy."""
    teacher: Callable[[Any], TeacherConfig | None] = lambda config: None
    """Settings of the teacher model; None without a teacher."""
    max_positions: Callable[[Any, DataConfig], dict[str, int]] = lambda config, data: {
        "data.max_length": data.max_length
    }
    """The positions that the model must have, by the setting that asks for them."""
    rollout: Callable[[Any], Any] | None = None
    """How the answers of a round are written (`RolloutConfig` in `rollouts.py`), if its batches are rounds: the model writes what
    it learns from, and the settings derive from `RoundsConfig`. None: the data has what it learns."""
    can_replay: bool = False
    """Whether it can use sources that are marked `replay`."""
    generates_answers: bool = False
    """Whether answers can be generated and scored in evaluations."""
    scores_labels: bool = False
    """Whether evaluations count labels by their names (F1)."""
    watched_metric: str = "eval/loss"
    """What `evaluation.watch=null` stands for: the metric that decides the best checkpoint."""
    better_when_larger: tuple[str, ...] = ("accuracy",)
    """Metrics of evaluations of which more is better."""

    @property
    def name(self) -> str:
        """What users type as `objective=<name>`."""
        return self.settings().name


class UnlabelledDataSpec(DataSpec):
    """Documents without labels. A labelled text is refused, since the objective would ignore its label."""

    def reason_to_reject(self, document: Document) -> tuple[str, str] | None:
        if document.label is None:
            return None
        problem = "has a label, which this objective does not use; set objective=classification, or "
        return WRONG_KIND_REASON, f"{problem}data.format=text to train on the text"


def formats_of(data: DataConfig) -> dict[str, DataFormat]:
    """The format of each source, by the setting's key without its last part: `data` or `data.sources.<name>`."""
    formats = {"data": data.format}
    for name, source in data.sources.items():
        formats[f"data.sources.{name}"] = source.format
    return formats
