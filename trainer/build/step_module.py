"""Builds the module that a strategy shards: architecture, vocabulary, tuning, quantisation. All on meta, without weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from trainer.build.references import reference_models
from trainer.data.config import Layout
from trainer.losses.fuse import install_loss_head
from trainer.model import attention as attention_module
from trainer.model import encoder_decoder, experts, flex
from trainer.model.architecture import (
    freeze_key_selectors,
    grow_vocabulary,
    head_names,
    set_head_settings,
    vocabulary_parameter_names,
)
from trainer.model.compat import names_kept_in_float32
from trainer.model.config import ModelConfig, ModelKind
from trainer.model.frozen_rows import always_zero_rows
from trainer.model.known_shapes import shape_instead_of_files
from trainer.model.layout import AttentionLayout
from trainer.model.loading import find_weights_directory, load_model_config
from trainer.model.quantisation import QuantisationScheme, quantise_layers, unquantised_note
from trainer.model.quantised_experts import quantise_experts
from trainer.model.rope import check_adapter_positions, positions_are_set
from trainer.model.rules import check_kind
from trainer.model.sequence_attention import register_flash
from trainer.objectives.base import ObjectiveConfig
from trainer.objectives.layout_choice import build_causal_model, build_padded_model
from trainer.objectives.registry import build_objective, objective_family
from trainer.objectives.routed import install_added_losses
from trainer.step import BuiltModel, TrainStep
from trainer.tuning.base import Tuning, TuningConfig
from trainer.tuning.build import build_tuning, merged_adapter_reader, optimizer_hooks
from trainer.tuning.compat.transformers import block_class_names
from trainer.tuning.expert_lora import use_low_rank_forward
from trainer.tuning.fast_lora import fuse_lora
from trainer.tuning.table import needs_padded_rows


def build_step_module(
    config: ModelConfig,
    *,
    objective_config: ObjectiveConfig,
    tuning_config: TuningConfig,
    layout: Layout,
    tokenizer: Any,
    num_labels: int | None,
    half_on_gpu: bool,
) -> BuiltModel:
    """Build the module that a strategy shards, with added tokens and tuning, on meta, without weights. Errors: ConfigError."""
    _register_kernels()
    family = objective_family(objective_config)
    is_classifier = family.kind is ModelKind.classifier
    is_encoder_decoder = family.kind is ModelKind.encoder_decoder

    # The architecture.
    base_config = _base_config(config, tuning_config)
    hf_config = copy.deepcopy(base_config)
    new_ids = list(range(len(tokenizer) - len(config.add_tokens), len(tokenizer)))
    grow_vocabulary(config, hf_config, len(tokenizer), len(new_ids))
    check_kind(hf_config.to_dict(), config.path, family.kind, family.name, {})
    if is_classifier:
        outputs = family.num_outputs or num_labels
        set_head_settings(hf_config, outputs, tokenizer.pad_token_id, multi_label=family.multi_label(objective_config))
    if family.kind is ModelKind.causal:
        needs_padding = needs_padded_rows(tuning_config)
        model, attention_layout = build_causal_model(
            config, hf_config, layout, needs_padding=needs_padding, half_on_gpu=half_on_gpu
        )
    else:
        model, attention_layout = build_padded_model(
            family.kind, config, hf_config, layout, family.name, half_on_gpu=half_on_gpu
        )
    model.tie_weights()
    two_sides = None
    if is_encoder_decoder:
        two_sides = encoder_decoder.prepare_encoder_decoder(model, _weights_directory_or_none(config))

    # Facts of the architecture that are needed before its layers are replaced and wrapped.
    base_on_meta = copy.deepcopy(model)
    zero_row_by_name = always_zero_rows(model, attention_layout)
    if is_encoder_decoder or (not is_classifier and model.forward_path.fused):
        install_loss_head(model, hf_config, frozen_row=next(iter(zero_row_by_name.values()), None))
    vocabulary_parameters = vocabulary_parameter_names(model)
    heads = head_names(model) if is_classifier else ()
    blocks = encoder_decoder.block_classes(model) if is_encoder_decoder else block_class_names(model)
    merged_adapters = merged_adapter_reader(model, config.adapters)
    head = model.get_output_embeddings()

    # The tuning method. Modules that it must not train are frozen.
    tuning = build_tuning(tuning_config, new_tokens=bool(new_ids), new_heads=heads, tokenizer=tokenizer)
    model = tuning.apply(model)
    _freeze_without_gradient(model, tuning, base_on_meta, attention_layout)
    model.train()

    # The step module, and the collator that makes its batches.
    step = TrainStep(model, build_objective(objective_config, reference_models(tuning)), blocks)
    step.plan.optimizer_hooks = optimizer_hooks(tuning)
    data_spec = family.data_spec(objective_config)
    decoder_start = two_sides.decoder_start if two_sides else None
    built = BuiltModel(
        step_module=step,
        tuning=tuning,
        data_spec=data_spec,
        collator=data_spec.collator(attention_layout.layout, tokenizer.pad_token_id, decoder_start),
        attention_layout=attention_layout,
        new_token_ids=new_ids,
        vocabulary_parameters=vocabulary_parameters,
        base_on_meta=base_on_meta,
        head_prefixes=heads,
        config=hf_config,
        base_config=base_config if positions_are_set(config) else None,
        encoder_decoder=two_sides,
        zero_row_by_name=zero_row_by_name,
        merged_adapters=merged_adapters,
    )
    _finish_step_module(built, config, head, family.kind)
    return built


def _weights_directory_or_none(config: ModelConfig) -> Path | None:
    """The directory of a model's files; None if only its published shape is used, as in a plan without files."""
    return find_weights_directory(config) if shape_instead_of_files(config) is None else None


def _register_kernels() -> None:
    """Register our attention and experts functions with transformers, by their names."""
    attention_module.register()
    flex.register()
    register_flash()
    experts.register()


def _base_config(config: ModelConfig, tuning_config: TuningConfig) -> Any:
    """Load the transformers configuration of the base model, with the positions that the settings ask for.

    Raises ConfigError if an adapter (of `model.adapters` or `tuning.from`) was trained under other positions.
    """
    base_config = load_model_config(config)
    for directory in config.adapters:
        check_adapter_positions(directory, "model.adapters", base_config, config)
    start = getattr(tuning_config, "from_", None)
    if start:
        check_adapter_positions(start, "tuning.from", base_config, config)
    return base_config


def _freeze_without_gradient(model: Any, tuning: Tuning, base_on_meta: Any, attention_layout: AttentionLayout) -> None:
    """Freeze what gets no gradient or must not train: fixed tables, towers for images and sound, and indexers of keys.

    `base_on_meta`: the model before tuning. Adds a note on indexers to `attention_layout`.
    """
    encoder_decoder.freeze_fixed(model)
    freeze_beside_text(model, tuning, getattr(base_on_meta, "modules_beside_text", ()))
    indexers = freeze_key_selectors(model)
    if indexers:
        attention_layout.notes["model.indexers"] = (
            f"stay as they were loaded: no gradient reaches {', '.join(indexers)}"
        )


def _finish_step_module(built: BuiltModel, config: ModelConfig, head: Any, kind: ModelKind) -> None:
    """Make the last changes to a tuned model: quantise its base, fuse adapters, and add losses of routers and logits.

    `head`: the model's output layer. What the user is told of these changes goes into `built.substitutions`, by setting.
    """
    step = built.step_module
    tuning_note = getattr(built.tuning, "note", "")
    if tuning_note:
        built.substitutions["tuning.targets"] = tuning_note
    _quantise_frozen_weights(built, config, head)
    # After quantising, since both change the forward passes of the layers that are there then.
    fuse_lora(step.model)
    use_low_rank_forward(step.model)
    step.added_losses, routing_notes = install_added_losses(config, built.config, built.base_on_meta, step.model, kind)
    built.substitutions.update(routing_notes)


def freeze_beside_text(model: Any, tuning: Tuning, names: tuple[str, ...]) -> None:
    """Freeze the towers of a multimodal model for images and sound, to which texts give no gradient.

    `names`: of these modules in the base model; () for a model without.
    """
    prefixes = tuple(f"{name}." for name in names)
    if not prefixes:
        return
    for name, parameter in model.named_parameters():
        if tuning.base_name(name).startswith(prefixes):
            parameter.requires_grad_(False)


def _quantise_frozen_weights(built: BuiltModel, config: ModelConfig, head: Any) -> None:
    """Replace frozen layers and experts by quantised ones (QLoRA), if `model.quantisation` asks for it.

    Sets `built.scheme` and, for what was replaced, `built.quantised_shapes`. A note on large weights that stay as they are goes
    into `built.substitutions`. Not replaced: the output layer `head` of a language model, and the new heads of a classifier
    (`built.head_prefixes`).

    Called after tuning, since peft sizes its adapters by plain layers.
    """
    scheme = QuantisationScheme.from_settings(config.quantisation, config.double_quantisation)
    built.scheme = scheme
    if scheme is None:
        return
    model = built.step_module.model
    base_name = built.tuning.base_name
    built.quantised_shapes = quantise_layers(
        model, scheme, output_head=head, kept_prefixes=built.head_prefixes, base_name=base_name
    )
    built.quantised_shapes |= quantise_experts(
        model, scheme, kept_in_float32=names_kept_in_float32(model), base_name=base_name
    )
    trained_names = {base_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    note_on_unpacked = unquantised_note(
        built.base_on_meta, {*built.quantised_shapes, *built.vocabulary_parameters, *trained_names}
    )
    if note_on_unpacked is not None:
        built.substitutions["model.quantisation"] = f"{scheme} -> {note_on_unpacked}"
