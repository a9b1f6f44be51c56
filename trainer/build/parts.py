"""Makes data, the model up to a sharded engine, and batches from the configuration of a run. All ranks must call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from strategies import runtime as processes
from strategies.base import Engine, Precision
from strategies.build import build_strategy
from strategies.errors import ConfigError
from strategies.parameters import named_parameters
from trainer.build.gradient_sync import plan_reduction
from trainer.build.recomputation import Workload, expect_memory, plan_checkpointing
from trainer.config.run import RunConfig, kept_date
from trainer.data.batches.loader import Share, StepLoader
from trainer.data.batches.mixing import build_order
from trainer.data.batches.order import steps_from_budget
from trainer.data.config import Layout
from trainer.data.prepare import ChooseDate, Preparation, Prepared, keep_or_first_date
from trainer.data.report.progress import PrintLine, print_on_rank_0
from trainer.losses.fuse import fuse_head
from trainer.model import attention as attention_module
from trainer.model import encoder_decoder, experts, flex
from trainer.model.architecture import (
    describe_head,
    freeze_choosers,
    grow_vocabulary,
    head_names,
    text_settings,
    vocabulary_names,
)
from trainer.model.compat import names_kept_in_float32
from trainer.model.config import ModelConfig, ModelKind
from trainer.model.frozen_rows import still_rows
from trainer.model.loading import load_model_config, weights_directory
from trainer.model.quantisation import Scheme, not_packed, quantise_layers
from trainer.model.quantised_experts import quantise_experts
from trainer.model.rules import check_kind
from trainer.model.weights import WeightSource, fill_buffers
from trainer.objectives.base import ObjectiveConfig, ReferenceModels
from trainer.objectives.causal import plain_model
from trainer.objectives.frozen_model import common_layout, frozen_model, teacher_model
from trainer.objectives.layout_choice import causal_model, padded_model
from trainer.objectives.registry import build_objective, family_of, reading_of
from trainer.objectives.routed import added_losses
from trainer.objectives.teacher import check_head
from trainer.optim.build import build_optimizer
from trainer.step import Built, TrainStep
from trainer.tuning import lstm
from trainer.tuning.base import Tuning, TuningConfig
from trainer.tuning.build import build_tuning, merge_adapters, merge_initial_adapter, optimizer_hooks
from trainer.tuning.check import check_positions
from trainer.tuning.compat.transformers import block_class_names
from trainer.tuning.expert_lora import use_low_rank
from trainer.tuning.fast_lora import fuse_lora
from trainer.tuning.key_mapping import check_loadable
from trainer.tuning.table import needs_padded_rows


def prepare_data(
    config: RunConfig,
    tokenizer: Any,
    *,
    stop: Callable[[], bool] = lambda: False,
    choose_date: ChooseDate | None = None,
    say: PrintLine = print_on_rank_0,
) -> Prepared:
    """The prepared data set of the run, from the cache where nothing has changed. `stop` is asked now and then.

    `say` gets a line every 15 s. `choose_date`: as in `Preparation`; without it the date is the run's, else that of the cache.
    Errors: DataError, also where the objective could learn nothing from it.
    """
    reading = reading_of(config.objective)
    data = Preparation(
        config.data,
        tokenizer,
        reading,
        seed=config.run.seed,
        stop=stop,
        choose_date=choose_date or keep_or_first_date(kept_date(config)),
        say=say,
    ).open_or_make()
    reading.check(data.train)
    return data


def prepare_shard(config: RunConfig, tokenizer: Any, shard: tuple[int, int], *, stop: Callable[[], bool]) -> None:
    """Part i of n of the first pass over the data; `prepare_data` merges them once all are made."""
    reading = reading_of(config.objective)
    choose_date = keep_or_first_date(kept_date(config))
    Preparation(config.data, tokenizer, reading, seed=config.run.seed, stop=stop, choose_date=choose_date).make_shard(
        *shard
    )


def build_loader(
    config: RunConfig, data: Prepared, built: Built, engine: Engine, runtime: processes.Runtime
) -> tuple[StepLoader, int]:
    """The batches of this rank, and how many steps the budget makes of them."""
    reading, global_batch = built.reading, config.batch["global"]
    units, order = build_order(
        config.data, data.train, sequences_per_document=reading.sequences_per_document, seed=config.run.seed
    )
    loader = StepLoader(
        data.train,
        order=order,
        units=units,
        share=Share(global_batch, config.batch["micro"], engine.dp_rank, engine.dp_size),
        collator=built.collator,
        device=runtime.device,
        ahead=reading.ahead,
    )
    steps = steps_from_budget(config.budget, order, loader.unit_tokens, global_batch)
    if built.step_module.plan.optimizer_hooks is not None:
        built.step_module.plan.optimizer_hooks.begin(steps)
    return loader, steps


def build_engine(
    config: RunConfig, tokenizer: Any, data: Prepared, precision: Precision, runtime: processes.Runtime
) -> tuple[Engine, Built, WeightSource]:
    """Architecture on meta, tuned, sharded, filled, with its optimizer. All ranks must call."""
    strategy = build_strategy(config.strategy, precision, runtime)
    half_on_gpu = runtime.device.type == "cuda" and precision is not Precision.fp32
    built, source = build_model(config, tokenizer, data, strategy.init_context(), half_on_gpu=half_on_gpu)
    if built.scheme is not None and config.model.keep_packed:
        source.checkpoint.keep(config.model.adapters, (runtime.local_rank, runtime.local_world_size))
    built.step_module.plan.ema_decay = config.optim.ema_decay
    built.step_module.neftune_alpha = config.model.neftune_alpha
    built.substitutions.update(lstm.lstm_substitutions(built.step_module, precision, runtime.device))
    longest_batch = workload(config, data)
    micro_batches_per_step = config.batch["global"] // (config.batch["micro"] * runtime.world_size)
    plan_checkpointing(built, longest_batch, config.strategy, precision, runtime)
    plan_reduction(built, longest_batch, config.strategy, precision, runtime, micro_batches=micro_batches_per_step)
    expect_memory(built, longest_batch, config.strategy, precision, runtime)
    model_names = [name for name, _ in named_parameters(built.step_module)]
    engine = strategy.prepare(
        built.step_module,
        source=source,
        make_optimizer=partial(build_optimizer, config.optim, model_names=model_names, rate_of=built.tuning.rate_of),
        max_grad_norm=config.optim.max_grad_norm,
    )
    source.close()
    return engine, built, source


def workload(config: RunConfig, data: Prepared) -> Workload:
    """What one forward pass of a rank is made of, at most."""
    return Workload(data.train, config.batch["micro"], config.data.max_length if config.data.packing else None)


def build_model(
    config: RunConfig, tokenizer: Any, data: Prepared, context: AbstractContextManager[None], *, half_on_gpu: bool
) -> tuple[Built, WeightSource]:
    """The tuned architecture on meta and where its values come from, checked against each other; reads only headers."""
    objective, objective_notes = family_of(config.objective).settle(config.objective, data.train, data.label_names)
    layout, layout_notes = common_layout(
        config.data.layout, teacher_model(config.model, objective), half_on_gpu=half_on_gpu
    )
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
    built.substitutions.update(layout_notes | objective_notes)
    check_fit(config, built, data)
    if config.export.at_end and not config.export.merge:
        check_loadable(built.step_module.model)
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
    source.zeroed = built.zeroed
    shapes = {name: tuple(p.shape) for name, p in named_parameters(built.step_module)}
    source.check(shapes, head_prefixes=built.head_prefixes)
    attach_frozen(built, config.model, objective, config.tuning, source, tokenizer)
    return built, source


def check_fit(config: RunConfig, built: Built, data: Prepared) -> None:
    """Raise ConfigError where documents or packs do not fit the model that was built."""
    positions = getattr(text_settings(built.config), "max_position_embeddings", None)
    family = family_of(config.objective)
    if family.kind is not ModelKind.encoder_decoder:  # whose sides have positions each of their own
        check_positions(config.tuning, int(data.train.lengths.max(initial=0)), positions)
    if config.data.packing and built.layout is not Layout.padding_free:
        raise ConfigError(
            f"data.packing=true: needs a padding-free layout, and {built.config.model_type} is trained with "
            "padded rows here; set data.packing=false"
        )
    if right_alone(built, config.objective):
        _check_alone(config, built, data)
    if family.kind is ModelKind.encoder_decoder:
        lengths = family.max_positions(config.objective, config.data)
        check_kind(built.config.to_dict(), config.model.path, family.kind, family.name, lengths)


def right_alone(built: Built, objective: ObjectiveConfig) -> bool:
    """Whether the model is right for one row at a time only."""
    if family_of(objective).kind is not ModelKind.causal:
        return False
    plain: Any = plain_model(built.step_module.model)
    return bool(plain.forward_path.alone)


def _check_alone(config: RunConfig, built: Built, data: Prepared) -> None:
    """Raise ConfigError where a model that reads one document at a time would be given several."""
    kind, name = built.config.model_type, config.objective.name
    if built.reading.sequences_per_document > 1:
        problem = f"objective={name}: compares documents of one batch, and a {kind} is right for one at a time only"
        raise ConfigError(f"{problem}; use objective=sft, or another model")
    batches = {"batch.micro": config.batch["micro"]}
    batches |= {"evaluation.batch": config.evaluation.batch} if data.evaluation else {}
    if too_large := {key: size for key, size in batches.items() if size > 1}:
        typed = " and ".join(f"{key}={size}" for key, size in too_large.items())
        remedy = " ".join(f"{key}=1" for key in too_large)
        raise ConfigError(
            f"{typed}: a {kind} computes something else where rows are padded to one length; set {remedy}"
        )


def build_step(
    config: ModelConfig,
    *,
    objective_config: ObjectiveConfig,
    tuning_config: TuningConfig,
    layout: Layout,
    tokenizer: Any,
    num_labels: int | None,
    context: AbstractContextManager[None],
    half_on_gpu: bool,
) -> Built:
    """Architecture, added vocabulary and tuning, all on the meta device; raises ConfigError, touches no weights."""
    attention_module.register()
    flex.register()
    experts.register()
    family = family_of(objective_config)
    model_config = copy.deepcopy(load_model_config(config))
    new_ids = list(range(len(tokenizer) - len(config.add_tokens), len(tokenizer)))
    grow_vocabulary(config, model_config, len(tokenizer), len(new_ids))
    check_kind(model_config.to_dict(), config.path, family.kind, family.name, {})
    classifier, seq2seq = family.kind is ModelKind.classifier, family.kind is ModelKind.encoder_decoder
    if classifier:
        outputs = family.num_outputs or num_labels
        describe_head(model_config, outputs, tokenizer.pad_token_id, several=family.multi_label(objective_config))
    needs_padding = needs_padded_rows(tuning_config)
    if family.kind is ModelKind.causal:
        model, arrangement = causal_model(
            config, model_config, layout, needs_padding=needs_padding, half_on_gpu=half_on_gpu, context=context
        )
    else:
        model, arrangement = padded_model(
            family.kind, config, model_config, layout, context, family.name, half_on_gpu=half_on_gpu
        )
    model.tie_weights()
    two_sides = encoder_decoder.finish(model, weights_directory(config)) if seq2seq else None
    plain, zeroed = copy.deepcopy(model), still_rows(model, arrangement)
    if seq2seq or (not classifier and model.forward_path.fused):
        fuse_head(model, model_config, frozen_row=next(iter(zeroed.values()), None))
    vocabulary = vocabulary_names(model)
    heads = head_names(model) if classifier else ()
    blocks = encoder_decoder.block_classes(model) if seq2seq else block_class_names(model)
    folded, head = merge_adapters(model, config.adapters), model.get_output_embeddings()
    tuning = build_tuning(tuning_config, new_tokens=bool(new_ids), new_heads=heads, tokenizer=tokenizer)
    model = tuning.apply(model)
    encoder_decoder.freeze_fixed(model)
    freeze_beside_text(model, tuning, getattr(plain, "beside_text", ()))
    if choosers := freeze_choosers(model):
        arrangement.notes["model.indexers"] = f"stay as they were loaded: no gradient reaches {', '.join(choosers)}"
    model.train()
    objective = build_objective(objective_config, ReferenceModels(tuning.reference if tuning.keeps_base else None))
    step = TrainStep(model, objective, blocks)
    step.plan.optimizer_hooks = optimizer_hooks(tuning)
    reading = family.reading(objective_config)
    collator = reading.collator(
        arrangement.layout, tokenizer.pad_token_id, two_sides.decoder_start if two_sides else None
    )
    built = Built(step, tuning, reading, collator, arrangement, new_ids, vocabulary, plain, heads, model_config)
    built.two_sides, built.folded, built.zeroed = two_sides, folded, zeroed
    if note := getattr(tuning, "note", ""):
        built.substitutions["tuning.targets"] = note
    _equip(built, config, head, family.kind)
    return built


def _equip(built: Built, config: ModelConfig, head: Any, kind: ModelKind) -> None:
    """Pack the base, give adapters their fast forms, and let routers be seen: what follows once everything is in place."""
    step = built.step_module
    _quantise(built, config, head)
    fuse_lora(step.model)
    use_low_rank(step.model)
    step.added_losses, routing_notes = added_losses(config, built.config, built.plain, step.model, kind)
    built.substitutions.update(routing_notes)


def freeze_beside_text(model: Any, tuning: Tuning, names: tuple[str, ...]) -> None:
    """Keep towers for images and sound from training: texts give them no gradient."""
    for name, parameter in model.named_parameters():
        if names and tuning.base_name(name).startswith(tuple(f"{n}." for n in names)):
            parameter.requires_grad_(False)


def _quantise(built: Built, config: ModelConfig, head: Any) -> None:
    """Store frozen layers packed, where asked for; after tuning, since peft sizes its adapters by ordinary layers."""
    built.scheme = scheme = Scheme.asked(config.quantisation, config.double_quantisation)
    if scheme is not None:
        built.quantised = quantise_layers(
            built.step_module.model, scheme, keep=head, heads=built.head_prefixes, base_name=built.tuning.base_name
        )
        model, base_name = built.step_module.model, built.tuning.base_name
        built.quantised |= quantise_experts(model, scheme, plain=names_kept_in_float32(model), base_name=base_name)
        trained_names = {base_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
        if (
            unpacked_note := not_packed(built.plain, {*built.quantised, *built.vocabulary, *trained_names})
        ) is not None:
            built.substitutions["model.quantisation"] = f"{scheme} -> {unpacked_note}"


def attach_frozen(
    built: Built,
    config: ModelConfig,
    objective: ObjectiveConfig,
    tuning_config: TuningConfig,
    source: WeightSource,
    tokenizer: Any,
) -> None:
    """Give the step module what its objective compares with, where that is a model: a teacher, or the one before training.

    With a new adapter the model before training is the tuned one with the adapter off. With one that was trained before
    (`tuning.from`) it is the base with that adapter. Raises ConfigError where a teacher has another vocabulary, or a head that
    cannot be compared.
    """
    family, step, tuning = family_of(objective), built.step_module, built.tuning
    if not family.compares_distributions(objective):
        return
    check_head(step.model, f"objective={family.name}")
    if family.teacher(objective) is None and tuning.keeps_base:
        return
    # A teacher has weights of its own, whatever the run begins with.
    start = merge_initial_adapter(built.plain, tuning_config) if family.teacher(objective) is None else None
    frozen = frozen_model(config, objective, built.config, built.arrangement, source, start, tokenizer)
    step.teacher, source.teacher = frozen.model, frozen.weights
    step.objective = build_objective(
        objective, ReferenceModels(tuning.reference if tuning.keeps_base else None, frozen.model)
    )
    step.add_block_classes(frozen.block_classes)
