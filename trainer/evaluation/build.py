"""The evaluators that a run asks for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from strategies.base import Engine
from strategies.runtime import Runtime
from trainer.data.batches.loader import EvalShare, eval_batches
from trainer.data.store.sequences import TokenDataset
from trainer.evaluation.base import EvaluationConfig, Evaluator
from trainer.evaluation.generation import GenerationEvaluator
from trainer.evaluation.loss import LossEvaluator
from trainer.model.config import ModelConfig
from trainer.model.loading import generation_config
from trainer.step import Built


def build_evaluators(
    config: EvaluationConfig,
    model: ModelConfig,
    held_out: TokenDataset | None,
    built: Built,
    tokenizer: Any,
    engine: Engine,
    runtime: Runtime,
    stop_now: Callable[[], bool],
) -> list[Evaluator]:
    """Loss and, where asked for, generated answers; none without held-out data. `stop_now` is asked by all ranks alike."""
    if held_out is None or len(held_out) == 0:
        return []
    reading, collator = built.reading, built.collator
    share = EvalShare(
        config.batch, engine.dp_rank, engine.dp_size, config.max_documents, reading.sequences_per_document
    )
    batches = partial(eval_batches, held_out, share, collator, runtime.device)
    found: list[Evaluator] = [
        LossEvaluator(
            batches,
            count=int(held_out.counts["loss"][: share.sequences(held_out)].sum()),
            prefix="eval",
            perplexity=built.step_module.objective.perplexity,
            stop_now=stop_now,
            ahead=None if reading.ahead is None else partial(batches, ahead=reading.ahead),
        )
    ]
    if config.generate.samples:
        start = built.two_sides.decoder_start if built.two_sides else None
        asked = EvalShare(config.batch, engine.dp_rank, engine.dp_size, config.generate.samples)
        found.append(
            GenerationEvaluator(
                held_out,
                asked,
                tokenizer,
                config.generate,
                generation_config=generation_config(model, built.config, start),
                runtime=runtime,
                stop_now=stop_now,
            )
        )
    return found
