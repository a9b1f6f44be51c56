"""The parts of a run, each built from its settings: data, engine, loader, evaluators. All ranks call them alike."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch

from strategies import runtime as processes
from strategies.base import Engine, Precision
from strategies.build import build_strategy
from strategies.errors import ConfigError
from strategies.parameters import named_parameters
from trainer.config.run import RunConfig
from trainer.data.batches.loader import StepLoader, eval_batches
from trainer.data.batches.mixing import pack_by_source, quotas
from trainer.data.batches.order import GlobalOrder, MixedOrder, Order, steps_for_tokens
from trainer.data.batches.pack import best_fit_decreasing
from trainer.data.config import Layout
from trainer.data.inputs import source_weights
from trainer.data.prepare import Preparation, Prepared
from trainer.data.rated import check_verdicts
from trainer.data.replay import check_replayed
from trainer.data.source_target import SourceTarget
from trainer.evaluation.base import Evaluator
from trainer.evaluation.generation import GenerationEvaluator
from trainer.evaluation.loss import LossEvaluator
from trainer.loop import steps_from_budget
from trainer.model import encoder_decoder
from trainer.model.loading import Built, ModelConfig, build_step, weights_directory
from trainer.model.weights import WeightSource, fill_buffers
from trainer.objectives.base import ObjectiveName, Seq2seqConfig
from trainer.objectives.build import build_objective, holds, settled
from trainer.objectives.frozen import attach_teacher, common_layout, teacher_model
from trainer.optim.build import build_optimizer
from trainer.planning.activations import plan_checkpointing
from trainer.preempt import Agreement
from trainer.tuning import lstm
from trainer.tuning.check import check_room


def prepare_data(config: RunConfig, tokenizer: Any, *, stop: Callable[[], bool] = lambda: False) -> Prepared:
    """The prepared data set of the run, from the cache where nothing has changed. `stop` is asked now and then.

    Errors: DataError, also where the objective could learn nothing from it.
    """
    data = _preparation(config, tokenizer, stop).open_or_make()
    if config.objective.name is ObjectiveName.kto:
        check_verdicts(data.train)
    if holds(config.objective):
        check_replayed(data.train)
    return data


def prepare_shard(config: RunConfig, tokenizer: Any, shard: tuple[int, int], *, stop: Callable[[], bool]) -> None:
    """Part i of n of the first pass over the data; `prepare_data` merges them once all are made."""
    _preparation(config, tokenizer, stop).make_shard(*shard)


def _preparation(config: RunConfig, tokenizer: Any, stop: Callable[[], bool]) -> Preparation:
    objective, source_target = build_objective(config.objective), None
    if isinstance(config.objective, Seq2seqConfig):
        source_target = SourceTarget(prefix=config.objective.prefix, max_target=config.objective.max_target)
    return Preparation(
        config.data,
        tokenizer,
        counts=objective.counts,
        pairs=objective.sequences_per_document == 2,
        seed=config.run.seed,
        label_names=getattr(config.objective, "labels", None),
        labelled=config.objective.name is ObjectiveName.classification,
        rated=config.objective.name is ObjectiveName.kto,
        texts=config.objective.name is ObjectiveName.pretrain,
        multi_label=getattr(config.objective, "multi_label", False),
        source_target=source_target,
        stop=stop,
    )


def resolve_precision(asked: Precision, runtime: processes.Runtime) -> Precision:
    """What `auto` means on this device: bf16 on GPUs that have it, else fp32."""
    if asked is not Precision.auto:
        return asked
    on_gpu = runtime.device.type == "cuda" and torch.cuda.is_bf16_supported()
    return Precision.bf16 if on_gpu else Precision.fp32


def build_model(
    config: RunConfig, tokenizer: Any, data: Prepared, context: AbstractContextManager[None], *, half_on_gpu: bool
) -> tuple[Built, WeightSource]:
    """The tuned architecture on meta and where its values come from, checked against each other; reads only headers."""
    objective = settled(config.objective, data.train.labels, data.label_names)
    layout, noted = common_layout(config.data.layout, teacher_model(config.model, objective))
    built = build_step(
        config.model,
        objective_config=objective,
        tuning_config=config.tuning,
        layout=layout,
        tokenizer=tokenizer,
        num_labels=len(data.label_names) if data.label_names else None,
        context=context,
        half_on_gpu=half_on_gpu,
    )
    built.substitutions.update(noted)
    if objective is not config.objective:
        built.substitutions["objective.class_weights"] = f"balanced -> {objective.class_weights}"  # type: ignore[attr-defined]
    check_room(
        config.tuning, int(data.train.lengths.max(initial=0)), getattr(built.config, "max_position_embeddings", None)
    )
    if config.data.packing and built.layout is not Layout.padding_free:
        raise ConfigError(
            f"data.packing=true: needs a padding-free layout, and {built.config.model_type} is trained with "
            "padded rows here; set data.packing=false"
        )
    if isinstance(config.objective, Seq2seqConfig):
        encoder_decoder.check(
            built.config.to_dict(),
            config.model.path,
            config.objective.name,
            max_source=config.data.max_length,
            max_target=config.objective.max_target,
        )
    checkpoint = built.base_weights(weights_directory(config.model))
    fill_buffers(built.step_module.model, checkpoint, built.tuning.base_name)
    source = WeightSource(
        checkpoint,
        built.tuning,
        seed=config.run.seed,
        init_std=getattr(built.config, "initializer_range", 0.02),
        new_token_ids=built.new_token_ids,
        vocabulary=built.vocabulary,
        fixed=built.two_sides.fixed if built.two_sides else None,
    )
    shapes = {name: tuple(p.shape) for name, p in named_parameters(built.step_module)}
    source.check(shapes, head_prefixes=built.head_prefixes)
    attach_teacher(built, config.model, objective, tokenizer, source)
    return built, source


def build_engine(
    config: RunConfig, tokenizer: Any, data: Prepared, precision: Precision, runtime: processes.Runtime
) -> tuple[Engine, Built, WeightSource]:
    """Architecture on meta, tuned, sharded, filled, with its optimizer. All ranks must call."""
    strategy = build_strategy(config.strategy, precision, runtime)
    half_on_gpu = runtime.device.type == "cuda" and precision is not Precision.fp32
    built, source = build_model(config, tokenizer, data, strategy.init_context(), half_on_gpu=half_on_gpu)
    built.substitutions.update(lstm.substituted(built.step_module, precision, runtime.device))
    plan_checkpointing(config, built, data, precision, runtime)
    model_names = [name for name, _ in named_parameters(built.step_module)]
    engine = strategy.prepare(
        built.step_module,
        source=source,
        make_optimizer=partial(build_optimizer, config.optim, model_names=model_names, rate_of=built.tuning.rate_of),
        max_grad_norm=config.optim.max_grad_norm,
    )
    source.close()
    return engine, built, source


def build_order(config: RunConfig, data: Prepared) -> tuple[list[list[int]] | None, Order]:
    """The sequences that stay together (packs, pairs of answers), and the order in which documents (packs) are drawn."""
    train, seed, shuffle = data.train, config.run.seed, config.data.shuffle
    sources = train.sources if train.sources is not None else np.zeros(len(train), np.int64)
    per = build_objective(config.objective).sequences_per_document
    weights = source_weights(config.data, train.source_names)
    mixed = any(weight is not None for weight in weights)
    packs: list[list[int]] | None = None
    if per > 1:
        packs, sources = np.arange(len(train)).reshape(-1, per).tolist(), sources[::per]
    elif config.data.packing and mixed:
        packs, sources = pack_by_source(train.lengths, sources, config.data.max_length)
    elif config.data.packing:
        packs = best_fit_decreasing(train.lengths, config.data.max_length)
    if not mixed:
        return packs, GlobalOrder(len(train) if packs is None else len(packs), seed=seed, shuffle=shuffle)
    unit_tokens = train.lengths if packs is None else np.array([train.lengths[pack].sum() for pack in packs])
    unit_documents = np.ones(len(train), np.int64) if packs is None else np.array([len(pack) // per for pack in packs])
    quota = quotas(
        np.bincount(sources, minlength=len(weights)),
        np.bincount(sources, unit_tokens, minlength=len(weights)).astype(np.int64),
        weights,
        config.data.mixing.over,
        config.data.mixing.epoch,
        documents=np.bincount(sources, unit_documents, minlength=len(weights)).astype(np.int64),
        names=train.source_names,
    )
    return packs, MixedOrder(sources, quota, seed=seed, shuffle=shuffle)


def build_loader(
    config: RunConfig, data: Prepared, built: Built, tokenizer: Any, engine: Engine, runtime: processes.Runtime
) -> tuple[StepLoader, int]:
    """The batches of this rank, and how many steps the budget makes of them."""
    units, order = build_order(config, data)
    loader = StepLoader(
        data.train,
        order=order,
        units=units,
        global_batch=config.batch["global"],
        micro_batch=config.batch["micro"],
        dp_rank=engine.dp_rank,
        dp_size=engine.dp_size,
        layout=built.layout,
        pad_token_id=tokenizer.pad_token_id,
        device=runtime.device,
        decoder_start=built.two_sides.decoder_start if built.two_sides else None,
        looks_ahead=built.step_module.objective.looks_ahead,
    )
    steps = steps_from_budget(
        config,
        num_units=order.num_units,
        for_tokens=lambda tokens: steps_for_tokens(order, loader.unit_tokens, config.batch["global"], tokens),
    )
    if built.step_module.around_update is not None:
        built.step_module.around_update.begin(steps)
    return loader, steps


def build_evaluators(
    config: RunConfig,
    data: Prepared,
    built: Built,
    tokenizer: Any,
    engine: Engine,
    runtime: processes.Runtime,
    agreement: Agreement,
) -> list[Evaluator]:
    """The evaluators that the config asks for; none without held-out data."""
    held_out = data.evaluation
    if held_out is None or len(held_out) == 0:
        return []
    limit = config.evaluation.max_documents
    objective = built.step_module.objective
    per = objective.sequences_per_document
    batches = partial(
        eval_batches,
        held_out,
        batch=config.evaluation.batch,
        dp_rank=engine.dp_rank,
        dp_size=engine.dp_size,
        layout=built.layout,
        pad_token_id=tokenizer.pad_token_id,
        device=runtime.device,
        max_documents=limit,
        sequences_per_document=per,
        decoder_start=built.two_sides.decoder_start if built.two_sides else None,
    )

    count = int(held_out.counts["loss"][: None if limit is None else limit * per].sum())
    found: list[Evaluator] = [
        LossEvaluator(
            batches,
            count=count,
            prefix="eval",
            perplexity=objective.perplexity,
            stop_now=agreement.asked,
            ahead=partial(batches, ahead=True) if objective.looks_ahead else None,
        )
    ]
    if config.evaluation.generate.samples:
        found.append(
            GenerationEvaluator(
                held_out,
                tokenizer,
                config.evaluation.generate,
                generation_config=generation_config(config.model, built),
                encoder_decoder=built.two_sides is not None,
                batch=config.evaluation.batch,
                runtime=runtime,
                prefix="eval",
                stop_now=agreement.asked,
            )
        )
    return found


def generation_config(model: ModelConfig, built: Built) -> Any:
    """How the model generates: by its generation_config.json, as its export will, else by its config."""
    from transformers import GenerationConfig

    directory = weights_directory(model)
    if (directory / "generation_config.json").is_file():
        found = GenerationConfig.from_pretrained(directory)
    else:
        found = GenerationConfig.from_model_config(built.config)
    if built.two_sides is not None:
        found.decoder_start_token_id = built.two_sides.decoder_start
    return found
