"""The interface of an evaluator, and when evaluators run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from strategies.settings import DESCRIBES, Reach, group, number, setting
from trainer.data.config import DataFormat
from trainer.evaluation.endpoint.config import EndpointConfig, JudgeConfig
from trainer.evaluation.interval import AUTO

if TYPE_CHECKING:
    from strategies.base import Engine
    from trainer.reporting.trackers.base import LoggedTable


@dataclass(kw_only=True, slots=True)
class DecodingConfig:
    """How a model writes answers."""

    max_new_tokens: int = number(128, least=1, advice="as long as the answers: 64 to 256 for summaries")
    """Greatest length of an answer in tokens."""
    beams: int = number(1, least=1, advice="1 is greedy; 4 is usual for summaries and translation")
    """Number of beams of beam search. 1: greedy."""
    temperature: float = number(0.0, least=0, advice="0 is greedy, 0.7 to 1 as a rule")
    """Sampling temperature: divides the logits. 0: always the most likely token; 1: the model's own distribution."""
    top_p: float = number(1.0, above=0, most=1, advice="1 draws among all tokens, 0.9 to 0.95 as a rule")
    """Sample only from the most likely tokens whose probabilities together reach this share (nucleus sampling). 1: all
    tokens."""
    top_k: int = number(0, least=0, advice="0 draws among all tokens, 20 to 50 as a rule")
    """Sample only from this many most likely tokens. 0: all tokens."""
    stop: list[str] = setting(default_factory=list, reach=DESCRIBES)
    """Texts that end an answer. The answer is cut before them."""
    seed: int = number(0, least=0, advice="the default is 0")
    """Seed of sampling. An answer depends only on the seed, the index of its prompt and the index of the sample."""
    draws: int = number(1, least=1, advice="1 answers each prompt once")
    """Number of answers that are sampled for each prompt."""
    batch_tokens: int | None = number(
        None, least=1, advice="null takes evaluation.batch rows; 16384 to 131072 on a GPU"
    )
    """Most tokens of a batch on one rank: rows times the longest prompt plus answer. null: `evaluation.batch` rows, whatever
    their length."""

    def problems(self, key: str) -> Iterator[str]:
        """Yield an error message for each combination of settings of generation that does nothing or is refused.

        `key`: the setting that these are below, such as `evaluation.generate`.
        """
        if self.temperature and self.beams > 1:
            yield (
                f"{key}.temperature={self.temperature:g} with {key}.beams={self.beams}: a beam search draws nothing; set "
                f"{key}.beams=1, or {key}.temperature=0"
            )
        # These settings change how tokens are drawn, and at temperature 0 none are.
        is_set = {"top_p": self.top_p < 1, "top_k": self.top_k > 0, "draws": self.draws > 1}
        settings_without_effect = []
        for name, was_set in is_set.items():
            if was_set and not self.temperature:
                settings_without_effect.append(f"{key}.{name}={getattr(self, name)}")
        if settings_without_effect:
            yield (
                f"{', '.join(settings_without_effect)}: nothing is drawn at {key}.temperature=0; set "
                f"{key}.temperature=1, or leave it out"
            )
        if "" in self.stop:
            yield f"{key}.stop: has an empty text, which would end every answer; leave it out"


@dataclass(kw_only=True, slots=True)
class GenerateConfig(DecodingConfig):
    """Answers that the model writes to held-out prompts, for BLEU and ROUGE-L."""

    samples: int = number(0, least=0, advice="0 generates nothing; 50 to 500 as a rule")
    """Number of documents to which an answer is generated in each evaluation: the first ones, or the first ones of each named
    set. 0: none."""


@dataclass(kw_only=True, slots=True)
class TaskConfig:
    """One task: what is asked of the model, on which rows, and how its answers are judged.

    docs/reference/evaluation-tasks.md explains each kind."""

    kind: str = setting("", reach=DESCRIBES)
    """Kind of task, such as `exact_match`, `classification` or `multiple_choice`. For an unknown kind the error lists all."""
    path: Any = setting(None, reach=Reach.file)
    """Rows of the task: a file, directory, glob pattern, or list of these, in the formats of `data.path`. null: the run's
    evaluation documents."""
    format: DataFormat = setting(DataFormat.auto, reach=DESCRIBES)
    """Format of the rows, as `data.format`, if their columns match several formats."""
    columns: dict[str, str] = setting(default_factory=dict, reach=DESCRIBES)
    """Renames columns, as {expected name: name in the file}."""
    max_rows: int | None = number(None, least=1, advice="null asks all rows")
    """Largest number of rows that are evaluated, from the first. null: all."""
    write: DecodingConfig = group(
        DecodingConfig, advice={"max_new_tokens": "as long as the answers: 16 to 512 as a rule"}
    )
    """How answers are generated, for tasks that generate."""
    options: dict[str, Any] = setting(default_factory=dict, reach=Reach.file)
    """Options of this kind of task, such as `tokenize` of `translation`. For an unknown option the error lists all."""
    limit: dict[str, float] = setting(default_factory=dict, reach=DESCRIBES)
    """Regression limit: how much each metric, by name, may get worse than in an earlier report. Without a limit, a change
    beyond its confidence interval counts as a regression."""


LOSS = "eval/loss"
"""The loss on held-out data."""


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """When held-out data is evaluated and what its result decides."""

    every_steps: int | str = number(AUTO, least=0, words=(AUTO,), advice="0 evaluates only at the end")
    """Optimizer steps between evaluations. 0: only at the end (and at the start, see `at_start`). `auto`: only the held-out
    loss, about twenty times a run, for at most 5 % of the run's tokens and at most every 10 steps; tasks and answers at the
    start and the end."""
    at_start: bool = setting(True, reach=DESCRIBES)
    """Also evaluate before the first step, to measure the improvement."""
    batch: int = number(8, least=1, advice="8 as a rule")
    """Most documents in one evaluation micro-batch of one rank. It does not change the result."""
    max_documents: int | None = number(None, least=1, advice="null takes all")
    """Largest number of documents that are evaluated, from the first; of several sources, for each source. null: all."""
    loss_by_position: bool | None = setting(None, reach=DESCRIBES)
    """Also report the loss by position in the document, such as `eval/loss_by_position/2048` (tokens 1,024 to 2,047). null: if
    a document is longer than 8,192 tokens."""
    watch: str | None = setting(None, reach=DESCRIBES)
    """Metric that decides the best checkpoint and early stopping. null: `eval/reward` with `objective=grpo`, else `eval/loss`.
    `eval/loss/NAME` is the loss on one of `data.sources`."""
    greater_is_better: bool | None = setting(None, reach=DESCRIBES)
    """Whether a larger value of the watched metric is better. null: known from the metric."""
    patience: int = number(0, least=0, advice="0 never stops early")
    """Early stopping: end the run after this many evaluations without improvement. 0: never."""
    min_delta: float = number(0.0, least=0, advice="0 counts any improvement")
    """Least change of the watched metric that counts as an improvement."""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """Answers that are generated to held-out prompts, for the metrics `eval/bleu` and `eval/rougeL`, also for each set named in
    `data.eval_path`."""
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    """Tasks by names of your choice, which run in each evaluation as `eval/NAME/METRIC`. `[loss,bits_per_byte]` is short for
    tasks named like their kind."""
    server: EndpointConfig = field(default_factory=EndpointConfig)
    """Server (vLLM, SGLang) that generates the answers for `shardtune evaluate model.path=...`. The model is then not loaded
    locally."""
    judge: JudgeConfig = group(
        JudgeConfig,
        advice={
            "parallel": "4 to 32, as the server can handle",
            "timeout_s": "120 as a rule, more for reasoning models",
        },
    )
    """Judge model behind an OpenAI-compatible address, which the tasks `judge` and `preference` use."""
    resamples: int = number(10000, least=1, advice="1000 to 10000 as a rule")
    """Number of bootstrap resamples for each confidence interval of `shardtune evaluate`."""
    resample_seed: int = number(0, least=0, advice="the default is 0")
    """Seed of the bootstrap resamples."""

    @property
    def watched(self) -> str:
        """The metric that is watched. Composing puts that of the objective in the place of null."""
        return self.watch or LOSS


class Evaluator(Protocol):
    """Runs the model without gradients.

    One that also runs in the evaluations on the way of `evaluation.every_steps=auto` has the attribute `on_the_way`, set to True:
    it writes no answers and asks nobody.
    """

    def run(self, engine: Engine) -> Iterable[tuple[str, float]]:
        """Yield (name, value), equal on all ranks. All ranks must call. What it leaves in `tables` is shown too."""


def intermediate_evaluators(evaluators: list[Evaluator]) -> list[Evaluator]:
    """Those that also run in the evaluations before the last step of `evaluation.every_steps=auto`: the held-out loss."""
    return [evaluator for evaluator in evaluators if getattr(evaluator, "on_the_way", False)]


def tables_of_evaluators(evaluators: list[Evaluator]) -> dict[str, LoggedTable]:
    """The tables that these evaluators left in their attribute `tables`, by name; many evaluators have none."""
    tables: dict[str, LoggedTable] = {}
    for evaluator in evaluators:
        tables.update(getattr(evaluator, "tables", {}))
    return tables
