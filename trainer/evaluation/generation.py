"""BLEU and ROUGE-L of answers that the model writes to held-out prompts, under every strategy.

BLEU (Papineni et al. 2002) is sacrebleu's corpus score, 0 to 100; ROUGE-L (Lin 2004) the mean F-measure of rouge-score
with stemming, 0 to 1. Where parameters are sharded every forward pass is a collective: ranks take the same number of
batches, and one whose answers are finished goes on with the others until all are (transformers' `synced_gpus`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from strategies.runtime import Runtime, broadcast_object, gather_objects
from trainer.data.batches.loader import EvalShare, eval_plan, sources_of
from trainer.data.store.sequences import Sample, TokenDataset
from trainer.evaluation.loss import Interrupted
from trainer.model import attention, flex
from trainer.model.architecture import text_settings
from trainer.objectives.causal import plain_model

if TYPE_CHECKING:
    from strategies.base import Engine
    from trainer.evaluation.base import GenerateConfig


@dataclass(frozen=True, slots=True)
class Generated:
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
        self.generation_config = decoding(generation_config, settings, tokenizer)
        self.runtime, self._stop_now = runtime, stop_now
        self._sets = sources_of(dataset) if share.by_source else {}

    def run(self, engine: Engine) -> Iterator[tuple[str, float]]:
        """Yield (name, value), equal on all ranks. All ranks must call; raises Interrupted on all or none."""
        found = self.answers(engine)
        values = self._values(found) if self.runtime.is_main else None
        yield from broadcast_object(values, self.runtime).items()

    def _values(self, found: list[Generated]) -> dict[str, float]:
        """Scores by the name of their metric: of all answers, and of those to each set."""
        values = {f"eval/{name}": value for name, value in scores(found).items()}
        for number, name in self._sets.items():
            assert self.dataset.sources is not None
            mine = [one for one in found if self.dataset.sources[one.document] == number]
            values |= {f"eval/{name}/{metric}": value for metric, value in scores(mine).items()}
        return values

    def answers(self, engine: Engine) -> list[Generated]:
        """What the model answers, by document, the same list on every rank. All ranks must call."""
        plan = eval_plan(self.dataset, self.share)
        mine: list[Generated] = []
        with engine.inference() as module:
            step: Any = module
            # Asked through the root module's own forward: only there are its parameters gathered.
            objective, step.objective = step.objective, _Generate(self.generation_config, synced=engine.dp_size > 1)
            try:
                for documents in plan:
                    samples = [self.dataset.sample(number) for number in documents or [0]]
                    whole: Any = plain_model(step.model)
                    left = not whole.config.is_encoder_decoder
                    written = step(self._prompts(samples, on_the_left=left))["answers"].cpu()
                    if documents:
                        mine += self._decoded(documents, samples, written)
                    if self._stop_now():
                        raise Interrupted
            finally:
                step.objective = objective
        gathered = [one for part in gather_objects(mine, self.runtime) for one in part]
        return sorted(gathered, key=lambda one: one.document)

    def _prompts(self, samples: list[Sample], *, on_the_left: bool) -> dict[str, Any]:
        """Prompts as padded rows: on the right for an encoder, on the left for a decoder that goes on from the last token."""
        cuts = [sample.answer_begin() for sample in samples]
        longest = max(cuts)
        ids = np.full((len(samples), longest), self.tokenizer.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, (sample, cut) in enumerate(zip(samples, cuts, strict=True)):
            place = slice(longest - cut, longest) if on_the_left else slice(0, cut)
            ids[row, place], mask[row, place] = sample.input_ids[:cut], 1
        device = self.runtime.device
        return {"input_ids": torch.from_numpy(ids).to(device), "attention_mask": torch.from_numpy(mask).to(device)}

    def _decoded(self, documents: list[int], samples: list[Sample], written: Tensor) -> list[Generated]:
        def text(ids: np.ndarray) -> str:
            return self.tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip()

        return [
            Generated(number, text(row), text(first_answer(sample)))
            for number, sample, row in zip(documents, samples, written.numpy(), strict=True)
        ]


def first_answer(sample: Sample) -> np.ndarray:
    """The first run of learned tokens, int32."""
    cut = sample.answer_begin()
    rest = np.flatnonzero(~sample.supervised[cut:])
    return sample.input_ids[cut : cut + int(rest[0])] if len(rest) else sample.input_ids[cut:]


def scores(found: list[Generated]) -> dict[str, float]:
    """BLEU and ROUGE-L of answers against their references."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    bleu = corpus_bleu([one.answer for one in found], [[one.reference for one in found]])
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    parts = [scorer.score(one.reference, one.answer)["rougeL"].fmeasure for one in found]
    return {"bleu": float(bleu.score), "rougeL": float(np.mean(parts)) if parts else 0.0}


def decoding(base: Any, settings: GenerateConfig, tokenizer: Any) -> Any:
    """The model's own generation settings with the number of new tokens and beams asked for, and without sampling."""
    config = copy.deepcopy(base)
    config.max_new_tokens, config.max_length, config.num_beams = settings.max_new_tokens, None, settings.beams
    config.do_sample, config.temperature, config.top_p, config.top_k = False, None, None, None
    config.min_length = min(config.min_length or 0, settings.max_new_tokens)
    config.return_dict_in_generate, config.num_return_sequences = False, 1
    config.pad_token_id = tokenizer.pad_token_id
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    return config


class _Generate:
    """Stands in for the objective: the model's answers instead of a loss."""

    def __init__(self, config: Any, *, synced: bool) -> None:
        self.config, self.synced = config, synced

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`answers`, `[S, M]`: new tokens, padded on the right."""
        whole: Any = plain_model(model)
        with _stock_attention(whole):
            ids = whole.generate(**batch, generation_config=self.config, synced_gpus=self.synced)
        return {"answers": ids if whole.config.is_encoder_decoder else ids[:, batch["input_ids"].shape[1] :]}


@contextmanager
def _stock_attention(model: Any) -> Iterator[None]:
    """Attention that can go on from what it has seen, in place of that of padding-free rows."""
    config, before = model.config, model.config._attn_implementation
    if before in (attention.NAME, flex.NAME):
        config._attn_implementation = "eager" if flex.needs_eager(model, text_settings(config)) else "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = before
