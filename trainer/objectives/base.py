"""What an objective is: a family of settings, of how data is read, and of a loss; one family a module of this room.

`Family` lists what the rest of the trainer asks of one. docs/extending.md shows how to add an objective.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from strategies.settings import DESCRIBES, Reach, setting
from trainer.data.config import DataConfig, DataFormat
from trainer.data.document import WRONG_KIND, Document
from trainer.data.objective_spec import Reading
from trainer.data.store.sequences import TokenDataset
from trainer.model.config import ModelKind

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from strategies.base import StrategyConfig
    from trainer.model.config import ModelConfig
    from trainer.tuning.base import TuningConfig

Reference = Callable[["nn.Module"], "AbstractContextManager[None]"]
"""Within it the tuned model computes what it did before training: its adapter is switched off."""


@dataclass(kw_only=True, slots=True)
class ObjectiveConfig:
    """Settings shared by all objectives."""

    name: str = setting("sft", reach=DESCRIBES)
    """Which objective runs; set by the group choice `objective=<name>`, not by hand."""


@dataclass(kw_only=True, slots=True)
class TeacherConfig:
    """The model that is imitated. It is frozen, sharded beside the student, and no part of checkpoints or exports."""

    path: str | None = setting(None, reach=DESCRIBES)
    """Directory of a Hugging Face model with the student's vocabulary, or a hub id, as in `model.path`."""
    revision: str | None = setting(None, reach=DESCRIBES)
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = setting(False, reach=Reach.code)
    """Run Python code that comes with the teacher; `model.trust_remote_code` is for the student alone."""


class Objective(ABC):
    """Turns a batch into sums, which the loop divides by counts of the whole step.

    The term `loss` carries the gradient; other terms are for metrics and carry none. A term may be made in evaluation
    only, and then have a shape (`confusion`).
    """

    perplexity = False
    """Whether the exponential of the loss is the perplexity of a language model."""
    metrics: tuple[str, ...] = ()
    """Terms that are logged while training, beside the loss; each is divided by the count of `loss`."""
    compared = "loss"
    """Of the loss and these terms, the one that is like the loss of an evaluation."""
    uses_reference = False
    """Whether it compares with the log-probabilities of the model as it was before training."""
    ahead: tuple[str, ...] = ()
    """Terms whose means over the whole step it needs before the first backward pass, in `batch["ahead"]`: it makes them of
    batches that have `ahead_of` (`trainer/objectives/step_totals.py`)."""

    @abstractmethod
    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Sums over the micro-batch, by term: float32 tensors on the model's device, 0-d in training."""


class Around(Protocol):
    """The settings beside an objective's own that its rules may speak about."""

    data: DataConfig
    model: ModelConfig
    tuning: TuningConfig
    strategy: StrategyConfig


@dataclass(frozen=True, slots=True)
class Beside:
    """What an objective may compare the model with."""

    reference: Reference | None = None
    """Switches the tuned model's adapter off; None where there is none to switch off."""
    teacher: nn.Module | None = None
    """A frozen model of its own."""


def _nothing(config: Any, around: Around) -> Iterator[str]:
    yield from ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One objective as the rest of the trainer sees it. Functions get its settings first."""

    settings: type[ObjectiveConfig]
    reading: Callable[[Any], Reading]
    """How data is read for it."""
    build: Callable[[Any, Beside], Objective]
    """The loss."""
    problems: Callable[[Any, Around], Iterator[str]] = _nothing
    """What is wrong with its settings, alone and with others, one line each; before anything is read."""
    kind: ModelKind = ModelKind.causal
    """The model that it trains."""
    outputs: int | None = None
    """Outputs of the head that it gives a classifier; None: one a label of the data."""
    several: Callable[[Any], bool] = lambda config: False
    """Whether several outputs of the head may be true at once."""
    settle: Callable[[Any, TokenDataset, list[str] | None], tuple[Any, dict[str, str]]] = lambda config, *_: (
        config,
        {},
    )
    """The settings with what only the prepared data can tell, and what was put in their place, by key."""
    compares: Callable[[Any], bool] = lambda config: False
    """Whether it compares distributions over the vocabulary, with a teacher or with the model as it was."""
    teacher: Callable[[Any], TeacherConfig | None] = lambda config: None
    """The model that is imitated, where it is another one."""
    longest: Callable[[Any, DataConfig], dict[str, int]] = lambda config, data: {"data.max_length": data.max_length}
    """Most positions that a model needs, by the setting that says so."""
    replays: bool = False
    """Whether it knows what to do with sources marked `replay`."""
    writes_answers: bool = False
    """Whether answers can be generated and scored in evaluations."""
    judges_labels: bool = False
    """Whether evaluations count labels by their names (F1)."""
    better_when_larger: tuple[str, ...] = ("accuracy",)
    """Metrics of evaluations of which more is better."""

    @property
    def name(self) -> str:
        """What users type as `objective=<name>`."""
        return self.settings().name


class UnlabelledReading(Reading):
    """Documents without labels: of labelled texts this objective would learn nothing."""

    def refuses(self, document: Document) -> tuple[str, str] | None:
        if document.label is None:
            return None
        said = "is a labelled text, of which this objective would learn nothing; set objective=classification, or "
        return WRONG_KIND, f"{said}data.format=text to learn the texts themselves"


def formats_of(data: DataConfig) -> dict[str, DataFormat]:
    """Formats by the setting that holds them, up to its last word."""
    return {"data": data.format, **{f"data.sources.{name}": s.format for name, s in data.sources.items()}}
