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
from trainer.evaluation.generate import AnswerGenerator

if TYPE_CHECKING:
    from strategies.base import Engine
    from trainer.evaluation.base import GenerateConfig


@dataclass(frozen=True, slots=True)
class AnswerWithReference:
    """An answer with its reference."""

    document: int
    """Number in the evaluation set."""
    answer: str
    reference: str
    prompt: str = ""


class GenerationEvaluator:
    """Yields `bleu` and `rougeL` of the first documents of a data set.

    If `share` is by source, each set named in `data.eval_path` has its own scores too.
    """

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
        self.dataset = dataset
        self.share = share
        self.tokenizer = tokenizer
        self.settings = settings
        self.runtime = runtime
        self.answer_generator = AnswerGenerator(
            tokenizer, generation_config, runtime, batch=share.batch, stop_now=stop_now
        )
        self._sets = sources_in(dataset) if share.by_source else {}
        self.on_answers: Callable[[list[AnswerWithReference]], None] = lambda answers: None
        """Called with the answers to all documents after each evaluation."""

    def run(self, engine: Engine) -> Iterator[tuple[str, float]]:
        """Yield (name, value), equal on all ranks. All ranks must call; raises Interrupted on all or none.

        `eval/written_tokens_per_s` is the speed of all ranks together. `eval/weights_gathered` is yielded for sharded weights:
        1 if they were gathered once for all answers, 0 if block by block in each pass.
        """
        answers = self.generate_answers(engine)
        self.on_answers(answers)
        metrics = self._metrics(answers) if self.runtime.is_main else None
        yield from broadcast_object(metrics, self.runtime).items()
        assert self.answer_generator.throughput is not None
        yield "eval/written_tokens_per_s", self.answer_generator.throughput.tokens_per_s
        if self.answer_generator.throughput.gathering.sharded:
            yield "eval/weights_gathered", float(self.answer_generator.throughput.gathering.gathered_once)

    def _metrics(self, answers: list[AnswerWithReference]) -> dict[str, float]:
        """BLEU and ROUGE-L of all answers (`eval/bleu`) and of those to each named set (`eval/SET/bleu`). On rank 0."""
        metrics = {f"eval/{name}": score for name, score in bleu_and_rouge(answers).items()}
        for number, set_name in self._sets.items():
            set_answers = [answer for answer in answers if self.dataset.sources[answer.document] == number]
            for name, score in bleu_and_rouge(set_answers).items():
                metrics[f"eval/{set_name}/{name}"] = score
        return metrics

    def generate_answers(self, engine: Engine) -> list[AnswerWithReference]:
        """What the model answers to the evaluation documents, in their order, the same on every rank. All ranks must call."""
        documents = []  # numbers in the data set
        samples = []
        prompts = []
        for number in self.share.documents(self.dataset):
            sample = self.dataset.sample(int(number))
            documents.append(int(number))
            samples.append(sample)
            prompts.append(sample.input_ids[: sample.answer_begin()].tolist())
        answers = []
        for written in self.answer_generator.generate_answers(engine, prompts, self.settings):
            reference = self._reference(samples[written.prompt_index])
            prompt = self.tokenizer.decode(prompts[written.prompt_index], skip_special_tokens=True).strip()
            answers.append(
                AnswerWithReference(documents[written.prompt_index], written.text.strip(), reference, prompt)
            )
        return answers

    def _reference(self, sample: Sample) -> str:
        """The text that the model should have answered."""
        reference_ids = first_answer(sample).tolist()
        return self.tokenizer.decode(reference_ids, skip_special_tokens=True).strip()


def first_answer(sample: Sample) -> np.ndarray:
    """Token ids (int32) of the first answer in a sequence: the first run of learned tokens."""
    start = sample.answer_begin()
    not_learned = np.flatnonzero(~sample.supervised[start:])
    if not len(not_learned):
        return sample.input_ids[start:]
    answer_length = int(not_learned[0])
    return sample.input_ids[start : start + answer_length]


def bleu_and_rouge(answers: list[AnswerWithReference]) -> dict[str, float]:
    """Corpus BLEU (0 to 100) and mean ROUGE-L F-measure (0 to 1) of answers against their references."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    references = [answer.reference for answer in answers]
    bleu = corpus_bleu([answer.answer for answer in answers], [references])
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    rouge_scores = [scorer.score(answer.reference, answer.answer)["rougeL"].fmeasure for answer in answers]
    mean_rouge = float(np.mean(rouge_scores)) if rouge_scores else 0.0
    return {"bleu": float(bleu.score), "rougeL": mean_rouge}
