"""Builds the parts of a run from its configuration: data, the model up to a sharded engine, batches. All ranks must call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from strategies import runtime as processes
from strategies.base import Engine, ParameterSource, Precision
from strategies.build import build_strategy
from strategies.errors import ConfigError
from strategies.parameters import named_parameters
from trainer.build.experts import plan_expert_parallelism
from trainer.build.gradient_sync import plan_gradient_reduction
from trainer.build.recomputation import (
    LargestMicroBatch,
    check_host_memory_for_inputs,
    longest_sequence_lengths,
    plan_checkpointing,
    set_expected_memory,
)
from trainer.build.references import attach_reference_model
from trainer.build.reward_models import attach_reward_models
from trainer.build.sequence import sequence_parallel_notes, step_layout
from trainer.build.step_module import build_step_module
from trainer.config.parallel import accumulation_steps
from trainer.config.run import RunConfig, settled_template_date
from trainer.data.batches.cutting import RowCut, sequence_cut
from trainer.data.batches.loader import BatchShare, StepLoader
from trainer.data.batches.mixing import build_order
from trainer.data.batches.order import steps_from_budget
from trainer.data.config import Layout
from trainer.data.prepare import ChooseDate, Preparation, PreparedData, keep_or_first_date
from trainer.data.report.progress import PrintLine, print_on_rank_0
from trainer.model.architecture import attention_crossover_tokens, text_model_config
from trainer.model.config import ModelKind
from trainer.model.loading import find_weights_directory
from trainer.model.packed_cache import HostRank
from trainer.model.rules import check_kind
from trainer.model.tiles import tile_mlps
from trainer.model.weights import WeightSource, fill_buffers
from trainer.objectives.base import ObjectiveConfig
from trainer.objectives.causal import unwrap_adapter
from trainer.objectives.frozen_model import common_layout, teacher_model
from trainer.objectives.registry import data_spec_of, max_generated_tokens, objective_family
from trainer.objectives.rollouts import RoundsConfig
from trainer.optim.build import build_optimizer
from trainer.rollout.rewards.row_check import check_reward_rows
from trainer.step import BuiltModel
from trainer.tuning import lstm
from trainer.tuning.check import check_positions
from trainer.tuning.key_mapping import check_adapters_loadable

LONG_DOCUMENT_TOKENS = 32_768
"""Tokens above which the attention of a document is a large part of its cost."""


def prepare_data(
    config: RunConfig,
    tokenizer: Any,
    *,
    stop: Callable[[], bool] = lambda: False,
    choose_date: ChooseDate | None = None,
    print_line: PrintLine = print_on_rank_0,
) -> PreparedData:
    """Open the prepared data set of a run: from the cache if nothing has changed, else read and tokenise the raw data now.

    `choose_date`: returns the date that chat templates print as today's (`strftime_now`). By default it is the date that the
    run has recorded, else the one of the first preparation into the cache. `stop`: called now and then; True if the preparation
    shall stop (Preempted). `print_line`: called with a line of progress every 15 s.

    Raises DataError if the data cannot be prepared, or if the objective could learn nothing from it, such as kto from answers
    of which all are desirable.
    """
    data_spec = data_spec_of(config.objective)
    data = Preparation(
        config.data,
        tokenizer,
        data_spec,
        seed=config.run.seed,
        stop=stop,
        choose_date=choose_date or keep_or_first_date(settled_template_date(config)),
        print_line=print_line,
    ).open_or_prepare()
    data_spec.check(data.train)
    return data


def prepare_shard(config: RunConfig, tokenizer: Any, shard: tuple[int, int], *, stop: Callable[[], bool]) -> None:
    """Do part i of n of the first pass over the raw data, for `shard` = (i, n), so that several hosts can share it.

    When all are done, `prepare_data` merges them. `stop`: called now and then; True if the preparation shall stop.
    """
    preparation = Preparation(
        config.data,
        tokenizer,
        data_spec_of(config.objective),
        seed=config.run.seed,
        stop=stop,
        choose_date=keep_or_first_date(settled_template_date(config)),
    )
    preparation.make_shard(*shard)


def build_loader(
    config: RunConfig, data: PreparedData, built: BuiltModel, runtime: processes.Runtime
) -> tuple[StepLoader, int]:
    """Build the loader that gives this rank its batches, in the run's order; returns it, and the steps of the run's budget.

    `data`: the prepared documents. `built`: the model, with the collator that makes batches of samples. Also tells the hooks
    around optimizer steps, which only AdaLoRA has, how many steps the run has: its phases depend on it.
    """
    data_spec = built.data_spec
    global_batch = config.batch["global"]
    # A unit is what a batch counts: a document, a pack of several documents in one row, or a pair of answers.
    units, order = build_order(
        config.data, data.train, sequences_per_document=data_spec.sequences_per_document, seed=config.run.seed
    )
    loader = StepLoader(
        data.train,
        order=order,
        units=units,
        share=BatchShare(
            global_batch,
            config.batch["micro"],
            runtime.dp_rank,
            runtime.dp_size,
            cut=sequence_cut(runtime),  # the slice of rows that this rank takes, if ranks share rows
        ),
        collator=built.collator,
        device=runtime.device,
        look_ahead_sample=data_spec.look_ahead_sample,
    )
    if balances_by_squared_lengths(config.parallel.sequence, data.train.lengths):
        loader.balance_by_attention_cost(attention_crossover_tokens(built.config))
    steps = steps_from_budget(config.budget, order, loader.unit_tokens, global_batch)
    built.set_total_steps(steps)
    return loader, steps


def balances_by_squared_lengths(sequence_ranks: int, document_lengths: np.ndarray) -> bool:
    """Whether the loader balances ranks by the squared lengths of documents too, to which the cost of attention is proportional.

    So if `sequence_ranks` > 1 ranks share rows, or if a document is so long that attention is a large part of its cost.
    """
    return sequence_ranks > 1 or int(document_lengths.max(initial=0)) > LONG_DOCUMENT_TOKENS


def build_engine(
    config: RunConfig,
    tokenizer: Any,
    data: PreparedData,
    precision: Precision,
    runtime: processes.Runtime,
    *,
    values_of: Callable[[WeightSource], ParameterSource] = lambda source: source,
    scores_answers: bool = False,
) -> tuple[Engine, BuiltModel, WeightSource]:
    """Build what trains: the model on meta with its tuning method, sharded by the strategy, with its weights and its optimizer.

    Returns (the engine, the model in it, the source of its initial values). `values_of`: replaces that source by another one.
    `scores_answers`: whether the run's reward models are built too. All ranks must call.
    """
    strategy = build_strategy(config.strategy, precision, runtime)
    half_on_gpu = runtime.device.type == "cuda" and precision is not Precision.fp32
    built, source = build_model(config, tokenizer, data, half_on_gpu=half_on_gpu, scores_answers=scores_answers)
    if built.scheme is not None and config.model.keep_packed:
        host_rank = HostRank(runtime.local_rank, runtime.local_world_size)
        source.checkpoint.use_packed_cache(config.model.adapters, host_rank)

    # Decisions about the step that need the model before it is sharded. The engine reads them from `built.step_module.plan`.
    plan_expert_parallelism(built, config, runtime)
    built.step_module.plan.ema_decay = config.optim.ema_decay
    built.step_module.neftune_alpha = config.model.neftune_alpha
    built.collator.keeps_row_ids = config.model.neftune_alpha > 0
    built.substitutions.update(lstm.lstm_substitutions(built.step_module, precision, runtime.device))
    cut = sequence_cut(runtime)
    largest_batch = largest_micro_batch(config, data, cut)
    micro_batches_per_step = accumulation_steps(config, runtime.world_size)
    plan_checkpointing(built, largest_batch, config.strategy, precision, runtime)
    plan_gradient_reduction(
        built, largest_batch, config.strategy, precision, runtime, micro_batches=micro_batches_per_step
    )
    set_expected_memory(built, largest_batch, config.strategy, precision, runtime)
    check_host_memory_for_inputs(built, largest_batch, config.strategy, precision, runtime)

    model_names = [name for name, _ in named_parameters(built.step_module)]
    engine = strategy.prepare(
        built.step_module,
        source=values_of(source),
        make_optimizer=partial(
            build_optimizer, config.optim, model_names=model_names, lr_factor=built.tuning.lr_factor
        ),
        max_grad_norm=config.optim.max_grad_norm,
    )
    source.close()
    return engine, built, source


def largest_micro_batch(config: RunConfig, data: PreparedData, cut: RowCut | None = None) -> LargestMicroBatch:
    """The largest forward pass that a rank of this run makes, for estimates of memory: a micro-batch of the longest rows.

    `cut`: which slice of each row the rank takes, if ranks share rows (`parallel.sequence`); None: whole rows.
    """
    row_tokens = config.data.max_length if config.data.packing else None
    return LargestMicroBatch(data.train, config.batch["micro"], row_tokens, cut, max_generated_tokens(config.objective))


def build_model(
    config: RunConfig,
    tokenizer: Any,
    data: PreparedData,
    *,
    half_on_gpu: bool,
    scores_answers: bool = False,
) -> tuple[BuiltModel, WeightSource]:
    """Build the tuned architecture on meta and the source of its values, and check them against each other.

    `half_on_gpu`: whether it computes in half precision on a GPU. `scores_answers`: whether the run's reward models are built
    too. Raises ConfigError for a model that does not fit the run's data, weights or settings. Of the weight files it reads
    headers, buffers, and matrices that the configuration ties, to compare them.
    """
    # The architecture.
    objective, objective_notes = objective_family(config.objective).settle(
        config.objective, data.train, data.label_names
    )
    layout, layout_notes = common_layout(
        step_layout(config), teacher_model(config.model, objective), half_on_gpu=half_on_gpu
    )
    built = build_step_module(
        config.model,
        objective_config=objective,
        tuning_config=config.tuning,
        layout=layout,
        tokenizer=tokenizer,
        num_labels=len(data.label_names) if data.label_names else None,
        half_on_gpu=half_on_gpu,
    )
    built.substitutions.update(layout_notes | objective_notes)
    check_model_takes_data(config, built, data)
    if scores_answers and isinstance(config.objective, RoundsConfig):
        check_reward_rows(config.objective, data)
    if notes := _sequence_notes(config, built, data):
        built.substitutions["parallel.sequence"] = "; ".join(notes)
    if config.export.at_end and not config.export.merge:
        check_adapters_loadable(built.step_module.model)

    # The source of its values.
    checkpoint = built.base_weights(find_weights_directory(config.model))
    fill_buffers(built.step_module.model, checkpoint, built.tuning.base_name)
    source = WeightSource(
        checkpoint,
        built.tuning,
        seed=config.run.seed,
        init_std=getattr(built.config, "initializer_range", 0.02),
        new_token_ids=built.new_token_ids,
        vocabulary_parameter_names=built.vocabulary_parameters,
        computed_values=built.encoder_decoder.computed if built.encoder_decoder else None,
    )
    source.zero_row_by_name = built.zero_row_by_name
    shape_by_name = {name: tuple(parameter.shape) for name, parameter in named_parameters(built.step_module)}
    source.check_names_and_shapes(shape_by_name, head_prefixes=built.head_prefixes)

    # The frozen models beside it: reference model and reward models.
    attach_reference_model(built, config.model, objective, config.tuning, source, tokenizer)
    if scores_answers:
        attach_reward_models(built.step_module, objective, source, half_on_gpu=half_on_gpu)
    tile_mlps_of_built_model(built, config)
    return built, source


def tile_mlps_of_built_model(built: BuiltModel, config: RunConfig) -> None:
    """Let the MLPs of a model compute `strategy.mlp_tokens` tokens at a time, if that is set.

    Raises ConfigError if they cannot.
    """
    kind = objective_family(config.objective).kind
    tile_mlps(built.step_module, built.config, built.base_on_meta, kind, config.strategy.mlp_tokens)


def _sequence_notes(config: RunConfig, built: BuiltModel, data: PreparedData) -> list[str]:
    """Notes for the user on how ranks share the longest rows of this run under sequence parallelism; empty without."""
    if config.parallel.sequence == 1:
        return []
    longest_row = sum(longest_sequence_lengths(built.data_spec, largest_micro_batch(config, data)))
    return sequence_parallel_notes(
        config.parallel.sequence,
        built.config,
        config.precision,
        ranks_per_host=config.launcher.per_node,
        tokens=longest_row,
    )


def check_model_takes_data(config: RunConfig, built: BuiltModel, data: PreparedData) -> None:
    """Raise ConfigError if the model cannot take the run's data.

    Called once the model is built on meta, before its weights are loaded:

    - ranks share rows, and the model's tokens meet outside attention.
    - the longest document, with the answer that is generated to it, has more tokens than the model has positions.
    - packing is set, and the model is trained with padded rows.
    - batches have several rows, and the model computes correctly only with one.
    - one side of an encoder-decoder model has fewer positions than its part of a document may have tokens.
    """
    if config.parallel.sequence > 1 and built.attention_layout.sequence_problem is not None:
        raise ConfigError(
            f"parallel.sequence={config.parallel.sequence}: ranks cannot share rows of this {built.config.model_type}: "
            f"{built.attention_layout.sequence_problem}; set parallel.sequence=1"
        )
    family = objective_family(config.objective)
    # Each side of an encoder-decoder has positions of its own, which are checked below.
    if family.kind is not ModelKind.encoder_decoder:
        _check_positions_of_longest_document(config, built, data)
    if config.data.packing and built.layout is not Layout.padding_free:
        raise ConfigError(
            f"data.packing=true: needs a padding-free layout, and {built.config.model_type} is trained with "
            "padded rows here; set data.packing=false"
        )
    if needs_one_row_batches(built, config.objective):
        _check_one_row_batches(config, built, data)
    if family.kind is ModelKind.encoder_decoder:
        lengths = family.max_positions(config.objective, config.data)
        check_kind(built.config.to_dict(), config.model.path, family.kind, family.name, lengths)


def needs_one_row_batches(built: BuiltModel, objective: ObjectiveConfig) -> bool:
    """Whether the model computes correctly only if a batch has one row, so that no row is padded.

    False for all but causal models.
    """
    if objective_family(objective).kind is not ModelKind.causal:
        return False
    base_model: Any = unwrap_adapter(built.step_module.model)
    # The forward path was chosen when the model was built: how its rows are laid out and its loss is computed.
    return bool(base_model.forward_path.alone)


def _check_positions_of_longest_document(config: RunConfig, built: BuiltModel, data: PreparedData) -> None:
    """Raise ConfigError if the longest document, with the answer that is generated to it, has more tokens than positions."""
    max_answer_tokens = max_generated_tokens(config.objective)  # 0 for an objective that generates nothing
    longest = int(data.train.lengths.max(initial=0)) + max_answer_tokens
    if max_answer_tokens and data.evaluation is not None:  # answers are generated to held-out prompts too
        longest = max(longest, int(data.evaluation.lengths.max(initial=0)) + max_answer_tokens)
    text_config = text_model_config(built.config)
    check_positions(
        config.tuning,
        longest,
        getattr(text_config, "max_position_embeddings", None),
        has_rotary_positions=bool(getattr(text_config, "rope_parameters", None)),
        generated_tokens=max_answer_tokens,
    )


def _check_one_row_batches(config: RunConfig, built: BuiltModel, data: PreparedData) -> None:
    """Raise ConfigError if a batch of this run has several rows. Called for models that compute correctly only with one row."""
    model_type = built.config.model_type
    name = config.objective.name
    # Such as the chosen and the rejected answer of dpo, which are rows of one batch.
    if built.data_spec.sequences_per_document > 1:
        problem = (
            f"objective={name}: compares documents of one batch, and a {model_type} is right for one at a time only"
        )
        raise ConfigError(f"{problem}; use objective=sft, or another model")
    batches = {"batch.micro": config.batch["micro"]}
    if data.evaluation:
        batches["evaluation.batch"] = config.evaluation.batch
    too_large = {key: size for key, size in batches.items() if size > 1}
    if too_large:
        settings = " and ".join(f"{key}={size}" for key, size in too_large.items())
        remedy = " ".join(f"{key}=1" for key in too_large)
        raise ConfigError(
            f"{settings}: a {model_type} computes something else where rows are padded to one length; set {remedy}"
        )
