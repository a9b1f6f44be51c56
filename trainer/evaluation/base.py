"""What an evaluator is, and when evaluators run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from strategies.base import Engine


@dataclass(kw_only=True, slots=True)
class GenerateConfig:
    """Answers that the model writes to held-out prompts, for BLEU and ROUGE-L."""

    samples: int = 0
    """Documents answered in each evaluation (the first ones, of several named sets those of each); 0 generates nothing."""
    max_new_tokens: int = 128
    """Longest answer in tokens."""
    beams: int = 1
    """Width of the beam search; 1 is greedy."""


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
    greater_is_better: bool = False
    """Whether a larger value of the watched metric is better."""
    patience: int = 0
    """Stop after this many evaluations without improvement; 0 never stops early."""
    min_delta: float = 0.0
    """Smallest change of the watched metric that counts as improvement."""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """Answers written and scored: `eval/bleu` and `eval/rougeL`, and those of each set named in `data.eval_path`."""


class Evaluator(Protocol):
    """Runs the model without gradients."""

    def run(self, engine: Engine) -> Iterable[tuple[str, float]]:
        """Yield (name, value), equal on all ranks. All ranks must call."""
