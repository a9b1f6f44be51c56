"""What an evaluator is, and when evaluators run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from trainer.data.config import DataFormat
from trainer.evaluation.endpoint.config import EndpointConfig, JudgeConfig

if TYPE_CHECKING:
    from strategies.base import Engine


@dataclass(kw_only=True, slots=True)
class WritingConfig:
    """How a model writes answers."""

    max_new_tokens: int = 128
    """Longest answer in tokens."""
    beams: int = 1
    """Width of the beam search; 1 is greedy."""
    temperature: float = 0.0
    """Divides the logits that answers are drawn from; 0 takes the likeliest token each time, 1 draws as the model says."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that have this share of the probability together; 1 for all."""
    top_k: int = 0
    """Draw among this many likeliest tokens; 0 for all."""
    stop: list[str] = field(default_factory=list)
    """Texts that end an answer, which is cut off before them."""
    seed: int = 0
    """Seed of the draws: a text depends on it, on the number of its prompt and of the draw, and on nothing else."""
    draws: int = 1
    """Answers drawn for each prompt."""
    batch_tokens: int | None = None
    """Most tokens of a batch per rank, longest prompt and answer times rows; null: `evaluation.batch` rows, however long."""

    def problems(self, key: str) -> Iterator[str]:
        """What does not go together, one line each; `key` is the setting that these are below."""
        if self.temperature and self.beams > 1:
            yield (
                f"{key}.temperature={self.temperature:g} with {key}.beams={self.beams}: a beam search draws nothing; set "
                f"{key}.beams=1, or {key}.temperature=0"
            )
        unused = {"top_p": self.top_p < 1, "top_k": self.top_k > 0, "draws": self.draws > 1}
        if not self.temperature and (idle := [name for name, given in unused.items() if given]):
            yield (
                f"{', '.join(f'{key}.{name}={getattr(self, name)}' for name in idle)}: nothing is drawn at "
                f"{key}.temperature=0; set {key}.temperature=1, or leave it out"
            )
        if "" in self.stop:
            yield f"{key}.stop: has an empty text, which would end every answer; leave it out"


@dataclass(kw_only=True, slots=True)
class GenerateConfig(WritingConfig):
    """Answers that the model writes to held-out prompts, for BLEU and ROUGE-L."""

    samples: int = 0
    """Documents answered in each evaluation (the first ones, of several named sets those of each); 0 generates nothing."""


@dataclass(kw_only=True, slots=True)
class TaskConfig:
    """One task: what is asked of the model, on which rows, and how its answers are judged (docs/evaluation.md)."""

    kind: str = ""
    """What is measured, as `exact_match`, `classification` or `multiple_choice`; an unknown one is told with all there are."""
    path: Any = None
    """Its rows: a file, directory, glob or list of these, in the formats of `data.path`; null: the run's evaluation documents."""
    format: DataFormat = DataFormat.auto
    """Format of the rows where their columns fit several; as `data.format`."""
    columns: dict[str, str] = field(default_factory=dict)
    """Other names of columns, as pairs of the name that is read and the name in the file."""
    max_rows: int | None = None
    """Rows asked, the first ones; null for all."""
    write: WritingConfig = field(default_factory=WritingConfig)
    """How answers are written, by tasks that need some."""
    options: dict[str, Any] = field(default_factory=dict)
    """What its kind lets one choose, as `tokenize` of `translation`; an unknown one is told with all there are."""
    limit: dict[str, float] = field(default_factory=dict)
    """Largest loss of a metric against an earlier report, by its name; without it a loss beyond the interval counts."""


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """When held-out data is evaluated and what its result decides."""

    every_steps: int = 0
    """Steps between evaluations; 0 evaluates only at the end (and at the start, see `at_start`)."""
    at_start: bool = True
    """Evaluate before the first step, so that the gain is known."""
    batch: int = 8
    """Most documents in one evaluation micro-batch, per rank; does not change the result."""
    max_documents: int | None = None
    """Evaluate at most this many documents, the first ones; of several sources, of each."""
    watch: str = "eval/loss"
    """Metric that decides the best checkpoint and early stopping; `eval/loss/NAME` is the loss on one of `data.sources`."""
    greater_is_better: bool | None = None
    """Whether a larger value of the watched metric is better; null: as the metric itself says."""
    patience: int = 0
    """Stop after this many evaluations without improvement; 0 never stops early."""
    min_delta: float = 0.0
    """Smallest change of the watched metric that counts as improvement."""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """Answers written and scored: `eval/bleu` and `eval/rougeL`, and those of each set named in `data.eval_path`."""
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    """Tasks by names of your choice, run in each evaluation as `eval/NAME/METRIC`; `[loss,bits_per_byte]` names kinds alone."""
    server: EndpointConfig = field(default_factory=EndpointConfig)
    """A server (vLLM, SGLang) that writes the answers of `shardtune evaluate model.path=...`; the model here is not loaded."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """The model behind an OpenAI-compatible address that tasks `judge` and `preference` ask."""
    resamples: int = 10000
    """Bootstrap resamples behind each interval of `shardtune evaluate`."""
    resample_seed: int = 0
    """Seed of the bootstrap."""


class Evaluator(Protocol):
    """Runs the model without gradients."""

    def run(self, engine: Engine) -> Iterable[tuple[str, float]]:
        """Yield (name, value), equal on all ranks. All ranks must call. What it leaves in `tables` is shown too."""
