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
from trainer.data.batches.loader import EvalShare, eval_batches, source_name_by_number
from trainer.data.store.sequences import TokenDataset, exact_sum
from trainer.data.tokens.encode import Encoder
from trainer.evaluation.base import EvaluationConfig, Evaluator
from trainer.evaluation.by_position import position_group_bounds, position_metric_names, with_position_groups
from trainer.evaluation.endpoint.judge import Judge
from trainer.evaluation.generate import AnswerGenerator
from trainer.evaluation.generation import GenerationEvaluator
from trainer.evaluation.loss import LossEvaluator, ReportedSource
from trainer.evaluation.tasks.model_interface import ModelInterface
from trainer.evaluation.tasks.registry import metric_directions
from trainer.model.architecture import text_model_config
from trainer.model.config import ModelConfig
from trainer.model.loading import load_generation_config
from trainer.step import BuiltModel


def build_evaluators(
    config: EvaluationConfig,
    model: ModelConfig,
    held_out: TokenDataset | None,
    built: BuiltModel,
    tokenizer: Any,
    engine: Engine,
    runtime: Runtime,
    new_stop_check: Callable[[], Callable[[], bool]],
) -> list[Evaluator]:
    """Build what computes a run's held-out metrics: the evaluator of the loss and, if configured, that of generated answers.

    Empty without held-out data. `held_out`: the evaluation documents as tokens. `new_stop_check`: makes, for each evaluator, a
    function that says on all ranks alike whether the run must stop. Raises ConfigError if `evaluation.watch` names a part of
    the data that does not exist.
    """
    if held_out is None or len(held_out) == 0:
        return []
    # Which documents this rank reads, and which of their sources get metrics of their own.
    data_spec = built.data_spec
    metric_names_by_source = source_metric_names(held_out, generates=config.generate.samples > 0)
    share = EvalShare(
        config.batch,
        runtime.dp_rank,
        runtime.dp_size,
        config.max_documents,
        data_spec.sequences_per_document,
        by_source=bool(metric_names_by_source),
        cut=sequence_cut(runtime),
    )
    batches = partial(eval_batches, held_out, share, built.collator, runtime.device)
    sequences = share.covered_sequences(held_out)

    # Groups of token positions, such as 1024, 2048, 4096, if the loss is reported by position.
    loss_batches = batches
    longest_document = int(held_out.lengths[sequences].max(initial=0))
    bounds: list[int] = []
    if not built.encoder_decoder:  # batches of encoder-decoder models have no `position_ids`
        bounds = position_group_bounds(longest_document, loss_by_position=config.loss_by_position)
    if bounds:
        loss_batches = partial(with_position_groups, batches, bounds)
    position_metrics = [f"eval/{name}" for name in position_metric_names(bounds)]
    _raise_if_watched_part_is_missing(config, held_out, metric_names_by_source, position_metrics)

    # The loss.
    reported_sources = []
    for source, metric_names in metric_names_by_source.items():
        loss_denominator = _loss_denominator(held_out, sequences, source)
        reported_sources.append(ReportedSource(source, loss_denominator, metric_names))
    loss_evaluator = LossEvaluator(
        loss_batches,
        loss_denominator=exact_sum(held_out.counts["loss"][sequences]),
        ranks_per_row=runtime.sequence_size,
        perplexity=built.step_module.objective.perplexity,
        stop_now=new_stop_check(),
        ahead=None
        if data_spec.look_ahead_sample is None
        else partial(batches, look_ahead_sample=data_spec.look_ahead_sample),
        reported_sources=reported_sources,
    )
    evaluators: list[Evaluator] = [loss_evaluator]

    # Generated answers.
    if config.generate.samples:
        has_named_sets = bool(held_out.manifest.get("sets"))
        generation_share = EvalShare(
            config.batch, engine.rank, engine.world_size, config.generate.samples, by_source=has_named_sets
        )
        decoder_start = built.encoder_decoder.decoder_start if built.encoder_decoder else None
        generation_evaluator = GenerationEvaluator(
            held_out,
            generation_share,
            tokenizer,
            config.generate,
            generation_config=load_generation_config(model, built.config, decoder_start),
            runtime=runtime,
            stop_now=new_stop_check(),
        )
        evaluators.append(generation_evaluator)
    return evaluators


def _raise_if_watched_part_is_missing(
    config: EvaluationConfig,
    held_out: TokenDataset,
    metric_names_by_source: dict[int, dict[str, str]],
    position_metrics: list[str],
) -> None:
    """Refuse, before the run starts, an `evaluation.watch` that names a source, position group or task that does not exist.

    Only names with two slashes or more are checked, such as `eval/loss/code`: others, such as `eval/loss`, exist in every run.

    `metric_names_by_source`: what `source_metric_names` returns. `position_metrics`: full names of the losses by position,
    such as `eval/loss_by_position/1024`. Raises ConfigError.
    """
    if config.watched.count("/") < 2:
        return
    data_metrics = [*position_metrics]
    for metric_names in metric_names_by_source.values():
        data_metrics += metric_names.values()
    if config.watched not in {*data_metrics, *metric_directions(config.tasks)}:
        known = f"of their parts there are {', '.join(data_metrics)}"
        if not data_metrics:  # the documents are of one source, which has no metrics of its own
            known = f"all {len(held_out)} are of one source ({', '.join(source_name_by_number(held_out).values())}); "
            known += "watch eval/loss, draw others by run.seed, hold out more, or name sets in data.eval_path"
        raise ConfigError(f"evaluation.watch={config.watched}: the evaluation documents have no such part; {known}")


def build_model_interface(
    config: EvaluationConfig,
    model: ModelConfig,
    built: BuiltModel,
    labels: list[str] | None,
    encoder: Encoder,
    engine: Engine,
    runtime: Runtime,
    stop_now: Callable[[], bool],
) -> ModelInterface:
    """Build the interface through which tasks ask an engine's model for answers, likelihoods, logits and losses.

    `built`: the model with its objective. `labels`: names of the labels of a classification head, in the order of their ids;
    None for a language model. `encoder`: turns prompts and answers into tokens. `stop_now`: whether the run must stop, the
    same on all ranks.
    """
    # The decoder's first token; None for a model that is no encoder-decoder.
    decoder_start = built.encoder_decoder.decoder_start if built.encoder_decoder else None
    answer_generator = AnswerGenerator(
        encoder.tokenizer,
        load_generation_config(model, built.config, decoder_start),
        runtime,
        batch=config.batch,
        stop_now=stop_now,
    )
    max_positions = getattr(text_model_config(built.config), "max_position_embeddings", None)
    # The encoder has positions of its own, and the decoder those of the answer alone, so a question is never too long.
    is_encoder_decoder = bool(built.encoder_decoder)
    if is_encoder_decoder or (max_positions is not None and max_positions <= 0):  # 0 or -1: the model has no limit
        max_positions = None
    return ModelInterface(
        engine=engine,
        built=built,
        answer_generator=answer_generator,
        encoder=encoder,
        runtime=runtime,
        max_positions=max_positions,
        label_names=labels,
        stop_now=stop_now,
        batch=config.batch,
        judge=Judge(config.judge, runtime, stop_now) if config.judge.url else None,
    )


def source_metric_names(held_out: TokenDataset, *, generates: bool = False) -> dict[int, dict[str, str]]:
    """Which metrics single sources of the evaluation documents have, with their full names: {source: {metric: name}}.

    A source is its index, as batches have it.

    - Sets named in `data.eval_path`: {0: {"loss": "eval/code/loss", "accuracy": "eval/code/accuracy", ...}}.
    - Several sources without names of sets: {0: {"loss": "eval/loss/code"}, 1: {"loss": "eval/loss/prose"}}.
    - One source: {}.

    Metrics whose terms depend on counts of the whole set are left out. `generates`: whether answers are generated, so that
    named sets also get BLEU and ROUGE-L.
    """
    name_by_source = source_name_by_number(held_out)
    if held_out.manifest.get("sets"):  # named in data.eval_path: reported by name even if there is one alone
        metrics = ["loss", "perplexity", "accuracy", "f1_macro", "f1_micro"]
        if generates:
            metrics += ["bleu", "rougeL"]
        metric_names_by_source = {}
        for source, name in name_by_source.items():
            metric_names_by_source[source] = {metric: f"eval/{name}/{metric}" for metric in metrics}
        return metric_names_by_source
    if len(name_by_source) < 2:
        return {}
    return {source: {"loss": f"eval/loss/{name}"} for source, name in name_by_source.items()}


def _loss_denominator(held_out: TokenDataset, sequences: np.ndarray, source: int) -> float:
    """What the summed loss of one source is divided by to get its mean: the weights of its targets in the evaluated sequences."""
    sequences_of_source = sequences[held_out.sources[sequences] == source]
    return exact_sum(held_out.counts["loss"][sequences_of_source])
