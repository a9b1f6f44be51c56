"""Makes the evaluators that a run asks for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from strategies.base import Engine
from strategies.errors import ConfigError
from strategies.runtime import Runtime
from trainer.data.batches.loader import EvalShare, eval_batches, sources_in
from trainer.data.store.sequences import TokenDataset, exact_sum
from trainer.data.tokens.encode import Encoder
from trainer.evaluation.base import EvaluationConfig, Evaluator
from trainer.evaluation.endpoint.judge import Judge
from trainer.evaluation.generate import Writer
from trainer.evaluation.generation import GenerationEvaluator
from trainer.evaluation.loss import EvaluationPart, LossEvaluator
from trainer.evaluation.tasks.model_interface import ModelInterface
from trainer.evaluation.tasks.registry import metric_directions
from trainer.model.architecture import text_settings
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
    watch_for_stop: Callable[[], Callable[[], bool]],
) -> list[Evaluator]:
    """Loss and, where asked for, generated answers; none without held-out data.

    `watch_for_stop` makes for each of them what all ranks ask alike.
    """
    if held_out is None or len(held_out) == 0:
        return []
    reading = built.reading
    parts = evaluation_parts(held_out, generates=config.generate.samples > 0)
    told_apart = [name for names in parts.values() for name in names.values()]
    if config.watch.count("/") > 1 and config.watch not in {*told_apart, *metric_directions(config.tasks)}:
        there = f"of their parts there are {', '.join(told_apart)}"
        if not told_apart:
            there = f"all {len(held_out)} are of one source ({', '.join(sources_in(held_out).values())}); "
            there += "watch eval/loss, draw others by run.seed, hold out more, or name sets in data.eval_path"
        raise ConfigError(f"evaluation.watch={config.watch}: the evaluation documents have no such part; {there}")
    share = EvalShare(
        config.batch,
        engine.dp_rank,
        engine.dp_size,
        config.max_documents,
        reading.sequences_per_document,
        by_source=bool(parts),
    )
    batches, counts = partial(eval_batches, held_out, share, built.collator, runtime.device), held_out.counts["loss"]
    covered = share.sequences(held_out)
    evaluator = LossEvaluator(
        batches,
        count=exact_sum(counts[covered]),
        prefix="eval",
        perplexity=built.step_module.objective.perplexity,
        stop_now=watch_for_stop(),
        ahead=None if reading.ahead is None else partial(batches, ahead=reading.ahead),
        parts=[EvaluationPart(n, _loss_targets(held_out, covered, n), names) for n, names in parts.items()],
    )
    found: list[Evaluator] = [evaluator]
    if config.generate.samples:
        named, sides = bool(held_out.manifest.get("sets")), built.two_sides
        asked = EvalShare(config.batch, engine.dp_rank, engine.dp_size, config.generate.samples, by_source=named)
        found.append(
            GenerationEvaluator(
                held_out,
                asked,
                tokenizer,
                config.generate,
                generation_config=generation_config(model, built.config, sides.decoder_start if sides else None),
                runtime=runtime,
                stop_now=watch_for_stop(),
            )
        )
    return found


def build_model_interface(
    config: EvaluationConfig,
    model: ModelConfig,
    built: Built,
    labels: list[str] | None,
    encoder: Encoder,
    engine: Engine,
    runtime: Runtime,
    stop_now: Callable[[], bool],
) -> ModelInterface:
    """The model of an engine as tasks ask it. `labels` are those of a classifier's head, by their ids."""
    sides = built.two_sides
    writer = Writer(
        encoder.tokenizer,
        generation_config(model, built.config, sides.decoder_start if sides else None),
        runtime,
        batch=config.batch,
        stop_now=stop_now,
    )
    positions = getattr(text_settings(built.config), "max_position_embeddings", None)
    if positions is not None and positions <= 0:  # models without positions of their own
        positions = None
    return ModelInterface(
        engine=engine,
        built=built,
        writer=writer,
        encoder=encoder,
        runtime=runtime,
        max_positions=None if sides else positions,
        label_names=labels,
        stop_now=stop_now,
        batch=config.batch,
        judge=Judge(config.judge, runtime, stop_now) if config.judge.url else None,
    )


def evaluation_parts(held_out: TokenDataset, *, generates: bool = False) -> dict[int, dict[str, str]]:
    """What of the evaluation documents is told apart, by number of the source: metric -> its name; nothing of a single source.

    Not among them are metrics whose terms depend on counts of the whole set.
    """
    sources = sources_in(held_out)
    if held_out.manifest.get("sets"):  # named in data.eval_path, even a single one
        metrics = ("loss", "perplexity", "accuracy", "f1_macro", "f1_micro", *(("bleu", "rougeL") if generates else ()))
        return {number: {metric: f"eval/{name}/{metric}" for metric in metrics} for number, name in sources.items()}
    return {number: {"loss": f"eval/loss/{name}"} for number, name in sources.items()} if len(sources) > 1 else {}


def _loss_targets(held_out: TokenDataset, covered: np.ndarray, source: int) -> float:
    return exact_sum(held_out.counts["loss"][covered[held_out.sources[covered] == source]])
