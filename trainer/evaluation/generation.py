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
from trainer.data.batches.loader import EvalShare, source_name_by_number
from trainer.data.store.sequences import Sample, TokenDataset
from trainer.evaluation.generate import AnswerGenerator

if TYPE_CHECKING:
    from strategies.base import Engine
    from trainer.evaluation.base import GenerateConfig


@dataclass(frozen=True, slots=True)
class AnswerWithReference:
    """The model's answer to an evaluation document, with the reference answer."""

    document: int
    """Index of the document in the evaluation set."""
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
        """`dataset`: the evaluation documents as tokens, of which `share` says which are answered. `settings`:
        `evaluation.generate`. `generation_config`: the model's, of transformers. `stop_now`: whether the run must stop, the
        same on all ranks.
        """
        self.dataset = dataset
        self.evaluated_share = share
        """Which documents of the data set are answered."""
        self.tokenizer = tokenizer
        self.settings = settings
        self.runtime = runtime
        self.answer_generator = AnswerGenerator(
            tokenizer, generation_config, runtime, batch=share.documents_per_micro_batch, stop_now=stop_now
        )
        self._named_sets = source_name_by_number(dataset) if share.by_source else {}
        """Names of the sets in `data.eval_path`, by source index; empty if they have no scores of their own."""
        self.on_answers: Callable[[list[AnswerWithReference]], None] = lambda answers: None
        """Called after each evaluation, on every rank, with the answers to all documents."""

    def run(self, engine: Engine) -> Iterator[tuple[str, float]]:
        """Let the model answer the evaluation documents, and yield (name, value) of each metric, equal on all ranks.

        `eval/bleu` and `eval/rougeL` compare with the reference answers. `eval/written_tokens_per_s` is the speed of all ranks
        together. `eval/weights_gathered` is yielded for sharded weights: 1 if they were gathered once for all answers, 0 if
        block by block in each pass.

        All ranks must call; raises Interrupted on all or none.
        """
        answers = self.answer_documents(engine)
        self.on_answers(answers)
        metrics = self._compute_metrics(answers) if self.runtime.is_main else None
        yield from broadcast_object(metrics, self.runtime).items()
        throughput = self.answer_generator.throughput
        assert throughput is not None, "set by `generate_answers`"
        yield "eval/written_tokens_per_s", throughput.tokens_per_s
        if throughput.gathering.sharded:
            yield "eval/weights_gathered", float(throughput.gathering.gathered_once)

    def _compute_metrics(self, answers: list[AnswerWithReference]) -> dict[str, float]:
        """BLEU and ROUGE-L of all answers (`eval/bleu`) and of those to each named set (`eval/SET/bleu`). Only rank 0 calls."""
        metrics = {f"eval/{name}": score for name, score in bleu_and_rouge(answers).items()}
        for source, set_name in self._named_sets.items():
            set_answers = [answer for answer in answers if self.dataset.sources[answer.document] == source]
            for name, score in bleu_and_rouge(set_answers).items():
                metrics[f"eval/{set_name}/{name}"] = score
        return metrics

    def answer_documents(self, engine: Engine) -> list[AnswerWithReference]:
        """Let the model answer the evaluation documents; returns an answer to each, in their order, the same on every rank.

        All ranks must call. The prompt is the document up to its first answer, which is the reference.
        """
        # Every rank has the prompts of all evaluated documents; `generate_answers` splits them over the ranks.
        # A data set whose answers are generated has one sequence for each document, so that the indices are the same.
        document_indices = [int(index) for index in self.evaluated_share.covered_documents(self.dataset)]
        samples = [self.dataset.sample(index) for index in document_indices]
        prompts = [sample.input_ids[: sample.answer_begin()].tolist() for sample in samples]
        answers = []
        for generated in self.answer_generator.generate_answers(engine, prompts, self.settings):
            prompt_index = generated.prompt_index
            answers.append(
                AnswerWithReference(
                    document=document_indices[prompt_index],
                    answer=generated.text.strip(),
                    reference=self._decode(reference_answer_ids(samples[prompt_index]).tolist()),
                    prompt=self._decode(prompts[prompt_index]),
                )
            )
        return answers

    def _decode(self, ids: list[int]) -> str:
        """Token ids as text, without special tokens and without white space around it."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()


def reference_answer_ids(sample: Sample) -> np.ndarray:
    """Token ids (int32) of the right answer in a sequence, with which a generated one is compared.

    It is the first answer: the first supervised tokens in a row.
    """
    start = sample.answer_begin()
    unsupervised = np.flatnonzero(~sample.supervised[start:])
    if not len(unsupervised):
        return sample.input_ids[start:]
    answer_length = int(unsupervised[0])
    return sample.input_ids[start : start + answer_length]


def bleu_and_rouge(answers: list[AnswerWithReference]) -> dict[str, float]:
    """Compare answers with their references: corpus BLEU (0 to 100) and mean ROUGE-L F-measure (0 to 1), by name.

    {"bleu": 31.4, "rougeL": 0.52}. ROUGE-L is 0 without answers.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    references = [answer.reference for answer in answers]
    bleu = corpus_bleu([answer.answer for answer in answers], [references])
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    rouge_scores = [scorer.score(answer.reference, answer.answer)["rougeL"].fmeasure for answer in answers]
    mean_rouge = float(np.mean(rouge_scores)) if rouge_scores else 0.0
    return {"bleu": float(bleu.score), "rougeL": mean_rouge}
