"""BLEU and ROUGE-L of answers that the model generates for held-out prompts, under every strategy.

BLEU (Papineni et al. 2002) is sacrebleu's corpus score, 0 to 100; ROUGE-L (Lin 2004) the mean F-measure of rouge-score
with stemming, 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from strategies.runtime import Runtime, broadcast_object
from trainer.data.batches.loader import EvalShare, sources_in
from trainer.data.store.sequences import Sample, TokenDataset
from trainer.evaluation.generate import Writer

if TYPE_CHECKING:
    from strategies.base import Engine
    from trainer.evaluation.base import GenerateConfig


@dataclass(frozen=True, slots=True)
class GeneratedAnswer:
    """One answer beside the one it should be."""

    document: int
    """Number in the evaluation set."""
    answer: str
    reference: str


class GenerationEvaluator:
    """Yields `bleu` and `rougeL` of the first documents of a data set; of sets named in `data.eval_path`, those of each too,
    if `share` tells them apart."""

    def __init__(
        self,
        dataset: TokenDataset,
        share: EvalShare,
        tokenizer: Any,
        settings: GenerateConfig,
        *,
        generation_config: Any,
        runtime: Runtime,
        stop_now: Callable[[], bool] = lambda: False,
    ) -> None:
        self.dataset, self.share, self.tokenizer, self.settings = dataset, share, tokenizer, settings
        self.runtime = runtime
        self.writer = Writer(tokenizer, generation_config, runtime, batch=share.batch, stop_now=stop_now)
        self._sets = sources_in(dataset) if share.by_source else {}
        self.on_answers: Callable[[list[tuple[str, str]]], None] = lambda pairs: None
        """Told (answer, reference) of all that was written."""

    def run(self, engine: Engine) -> Iterator[tuple[str, float]]:
        """Yield (name, value), equal on all ranks. All ranks must call; raises Interrupted on all or none.

        `eval/written_tokens_per_s` is the speed of all ranks together; `eval/weights_gathered` is there where weights are
        sharded: 1 where they were gathered once for all answers, 0 where block by block.
        """
        found = self.answers(engine)
        self.on_answers([(one.answer, one.reference) for one in found])
        values = self._metrics(found) if self.runtime.is_main else None
        yield from broadcast_object(values, self.runtime).items()
        assert self.writer.throughput is not None
        yield "eval/written_tokens_per_s", self.writer.throughput.tokens_per_s
        if self.writer.throughput.gathering.sharded:
            yield "eval/weights_gathered", float(self.writer.throughput.gathering.gathered_once)

    def _metrics(self, found: list[GeneratedAnswer]) -> dict[str, float]:
        """Scores by the name of their metric: of all answers, and of those to each set."""
        values = {f"eval/{name}": value for name, value in bleu_and_rouge(found).items()}
        for number, name in self._sets.items():
            mine = [one for one in found if self.dataset.sources[one.document] == number]
            values |= {f"eval/{name}/{metric}": value for metric, value in bleu_and_rouge(mine).items()}
        return values

    def answers(self, engine: Engine) -> list[GeneratedAnswer]:
        """What the model answers, by document, the same list on every rank. All ranks must call."""
        samples = {int(number): self.dataset.sample(int(number)) for number in self.share.documents(self.dataset)}
        prompts = [sample.input_ids[: sample.answer_begin()].tolist() for sample in samples.values()]
        written = self.writer.answers(engine, prompts, self.settings)
        documents = [*samples]
        return [
            GeneratedAnswer(documents[one.prompt], one.text.strip(), self._reference(samples[documents[one.prompt]]))
            for one in written
        ]

    def _reference(self, sample: Sample) -> str:
        return self.tokenizer.decode(first_answer(sample).tolist(), skip_special_tokens=True).strip()


def first_answer(sample: Sample) -> np.ndarray:
    """The first run of learned tokens, int32."""
    cut = sample.answer_begin()
    rest = np.flatnonzero(~sample.supervised[cut:])
    return sample.input_ids[cut : cut + int(rest[0])] if len(rest) else sample.input_ids[cut:]


def bleu_and_rouge(found: list[GeneratedAnswer]) -> dict[str, float]:
    """BLEU and ROUGE-L of answers against their references."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    bleu = corpus_bleu([one.answer for one in found], [[one.reference for one in found]])
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    parts = [scorer.score(one.reference, one.answer)["rougeL"].fmeasure for one in found]
    return {"bleu": float(bleu.score), "rougeL": float(np.mean(parts)) if parts else 0.0}
