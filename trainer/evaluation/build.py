"""Builds the evaluators of a run from its configuration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from strategies.base import Engine
from strategies.errors import ConfigError
from strategies.runtime import Runtime
from trainer.data.batches.cutting import sequence_cut
from trainer.data.batches.loader import EvalShare, eval_batches, sources_in
from trainer.data.store.sequences import TokenDataset, exact_sum
from trainer.data.tokens.encode import Encoder
from trainer.evaluation.base import EvaluationConfig, Evaluator
from trainer.evaluation.by_position import metric_names, position_bounds, with_position_groups
from trainer.evaluation.endpoint.judge import Judge
from trainer.evaluation.generate import AnswerGenerator
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
    """The evaluator of the loss and, if configured, that of generated answers; none without held-out data.

    `watch_for_stop` makes, for each of them, a function that says on all ranks alike whether the run must stop.
    """
    if held_out is None or len(held_out) == 0:
        return []
    # Which documents this rank reads, and which of their parts get metrics of their own.
    data_spec = built.data_spec
    parts = evaluation_parts(held_out, generates=config.generate.samples > 0)
    share = EvalShare(
        config.batch,
        runtime.dp_rank,
        runtime.dp_size,
        config.max_documents,
        data_spec.sequences_per_document,
        by_source=bool(parts),
        cut=sequence_cut(runtime),
    )
    batches = partial(eval_batches, held_out, share, built.collator, runtime.device)
    sequences = share.sequences(held_out)

    # Groups of token positions, such as 1024, 2048, 4096, if the loss is reported by position.
    loss_batches = batches
    longest = int(held_out.lengths[sequences].max(initial=0))
    bounds = [] if built.two_sides else position_bounds(longest, asked=config.loss_by_position)
    if bounds:
        loss_batches = partial(with_position_groups, batches, bounds)
    _check_watched(config, held_out, parts, [f"eval/{name}" for name in metric_names(bounds)])

    # The loss.
    loss_parts = []
    for source, names in parts.items():
        loss_parts.append(EvaluationPart(source, _loss_targets(held_out, sequences, source), names))
    loss_evaluator = LossEvaluator(
        loss_batches,
        count=exact_sum(held_out.counts["loss"][sequences]),
        ranks_per_row=runtime.sequence_size,
        perplexity=built.step_module.objective.perplexity,
        stop_now=watch_for_stop(),
        ahead=None if data_spec.ahead is None else partial(batches, ahead=data_spec.ahead),
        parts=loss_parts,
    )
    evaluators: list[Evaluator] = [loss_evaluator]

    # Generated answers.
    if config.generate.samples:
        has_named_sets = bool(held_out.manifest.get("sets"))
        generation_share = EvalShare(
            config.batch, engine.rank, engine.world_size, config.generate.samples, by_source=has_named_sets
        )
        decoder_start = built.two_sides.decoder_start if built.two_sides else None
        generation_evaluator = GenerationEvaluator(
            held_out,
            generation_share,
            tokenizer,
            config.generate,
            generation_config=generation_config(model, built.config, decoder_start),
            runtime=runtime,
            stop_now=watch_for_stop(),
        )
        evaluators.append(generation_evaluator)
    return evaluators


def _check_watched(
    config: EvaluationConfig, held_out: TokenDataset, parts: dict[int, dict[str, str]], position_metrics: list[str]
) -> None:
    """Raise ConfigError if the monitored metric (`evaluation.watch`) is of a part or a group of positions that there is not.

    Checks only names with two slashes or more, such as `eval/loss/code`. `parts`: {number of the source: {metric: its full
    name}}, as `evaluation_parts` returns them. `position_metrics`: full names of the losses by position.
    """
    part_metrics = [*position_metrics]
    for names in parts.values():
        part_metrics += names.values()
    if config.watched.count("/") > 1 and config.watched not in {*part_metrics, *metric_directions(config.tasks)}:
        known = f"of their parts there are {', '.join(part_metrics)}"
        if not part_metrics:
            known = f"all {len(held_out)} are of one source ({', '.join(sources_in(held_out).values())}); "
            known += "watch eval/loss, draw others by run.seed, hold out more, or name sets in data.eval_path"
        raise ConfigError(f"evaluation.watch={config.watched}: the evaluation documents have no such part; {known}")


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
    """The model of an engine, as tasks see it. `labels` are those of a classification head, by their ids."""
    decoder_start = built.two_sides.decoder_start if built.two_sides else None
    answer_generator = AnswerGenerator(
        encoder.tokenizer,
        generation_config(model, built.config, decoder_start),
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
        answer_generator=answer_generator,
        encoder=encoder,
        runtime=runtime,
        max_positions=None if built.two_sides else positions,
        label_names=labels,
        stop_now=stop_now,
        batch=config.batch,
        judge=Judge(config.judge, runtime, stop_now) if config.judge.url else None,
    )


def evaluation_parts(held_out: TokenDataset, *, generates: bool = False) -> dict[int, dict[str, str]]:
    """Which sources of the evaluation documents get metrics of their own: {number of the source: {metric: its full name}}.

    - Sets named in `data.eval_path`: {0: {"loss": "eval/code/loss", "accuracy": "eval/code/accuracy", ...}}.
    - Several sources without names of sets: {0: {"loss": "eval/loss/code"}, 1: {"loss": "eval/loss/prose"}}.
    - One source: {}.

    Metrics whose terms depend on counts of the whole set are left out.
    """
    sources = sources_in(held_out)
    if held_out.manifest.get("sets"):  # named in data.eval_path: reported by name even if there is one alone
        metrics = ["loss", "perplexity", "accuracy", "f1_macro", "f1_micro"]
        if generates:
            metrics += ["bleu", "rougeL"]
        names_by_source = {}
        for number, name in sources.items():
            names_by_source[number] = {metric: f"eval/{name}/{metric}" for metric in metrics}
        return names_by_source
    if len(sources) < 2:
        return {}
    return {number: {"loss": f"eval/loss/{name}"} for number, name in sources.items()}


def _loss_targets(held_out: TokenDataset, sequences: np.ndarray, source: int) -> float:
    """The denominator of the loss of one source, over the evaluated sequences."""
    of_source = sequences[held_out.sources[sequences] == source]
    return exact_sum(held_out.counts["loss"][of_source])
