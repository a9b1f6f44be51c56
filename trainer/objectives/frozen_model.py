"""The frozen model beside the trained one: which it is, how it is built on meta, and where its weights come from."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError
from strategies.parameters import meta_context
from trainer.data.config import Layout
from trainer.losses.fuse import fuse_head
from trainer.model.architecture import from_config_options, set_dropout, transformers_class
from trainer.model.attention import NAME
from trainer.model.config import ModelConfig, ModelKind, RopeConfig
from trainer.model.flex import NAME as FLEX
from trainer.model.frozen_rows import always_zero_rows
from trainer.model.layout import AttentionLayout
from trainer.model.loading import find_weights_directory, load_model_config, load_tokenizer
from trainer.model.tied_heads import untie_as_stored
from trainer.model.weights import BaseWeights, StartingWeights, WeightSource
from trainer.objectives.base import ObjectiveConfig
from trainer.objectives.layout_choice import Proofs
from trainer.objectives.registry import objective_family
from trainer.objectives.teacher import check_head_computes_divergence
from trainer.tuning.compat.transformers import block_class_names
from trainer.tuning.full import Full

if TYPE_CHECKING:
    from trainer.tuning.merged_adapters import MergedAdapters

SHOWN_TOKENS = 3
"""How many differences of two vocabularies an error names."""


def teacher_model(config: ModelConfig, objective: ObjectiveConfig) -> ModelConfig | None:
    """The model settings of the teacher; None if the objective has none."""
    teacher = objective_family(objective).teacher(objective)
    if teacher is None:
        return None
    return replace(
        config,
        path=teacher.path,
        revision=teacher.revision,
        tokenizer=None,
        chat_template=None,
        add_tokens=[],
        positions=None,
        rope=RopeConfig(),
        trust_remote_code=teacher.trust_remote_code,
    )


def common_layout(layout: Layout, teacher: ModelConfig | None, *, half_on_gpu: bool) -> tuple[Layout, dict[str, str]]:
    """(layout of rows for model and teacher, note by setting if it is not the requested one).

    Padded rows if the teacher is not proven to keep documents in one row apart. Raises ConfigError if the settings ask for one
    row.
    """
    if teacher is None or layout is Layout.padded:
        return layout, {}
    settings = load_model_config(teacher)
    kind = settings.model_type
    reason = Proofs(teacher, settings, half_on_gpu=half_on_gpu).why_not_one_row(NAME)
    if not reason:
        return layout, {}
    if layout is Layout.padding_free:
        raise ConfigError(
            f"data.layout=padding_free: the teacher ({kind}) needs padded rows ({reason}); set data.layout=auto"
        )
    return Layout.padded, {"data.layout": f"padded (the teacher, {kind}, is not proven padding-free: {reason})"}


@dataclass(frozen=True, slots=True)
class FrozenReference:
    """A frozen model beside the tuned one, on the meta device."""

    model: Any
    weights: WeightSource | StartingWeights
    """Where its values come from."""
    block_classes: set[str]
    """Classes of its repeated blocks, which are shard units."""


def frozen_model(
    config: ModelConfig,
    objective: ObjectiveConfig,
    settings: Any,
    arrangement: AttentionLayout,
    initial: WeightSource,
    folded: MergedAdapters | None,
    tokenizer: Any,
) -> FrozenReference:
    """The teacher, or without one a second copy of the model that the run begins with.

    The copy has the run's `initial` weights; if the run continues from an adapter, `folded` adds it to them. `settings` are
    transformers' of the tuned model. Raises ConfigError if a teacher has another vocabulary, or a head that cannot compare
    distributions.
    """
    teacher = teacher_model(config, objective)
    if teacher is None:
        model = _architecture(config, settings, arrangement)
        weights: WeightSource | StartingWeights = StartingWeights(initial, folded)
    else:
        model = _architecture(teacher, load_model_config(teacher), arrangement)
        if not isinstance(initial, WeightSource):  # a plan, which needs neither weights nor tokenizers
            return _frozen(model, StartingWeights(initial, None))
        check_vocabulary(tokenizer, load_tokenizer(teacher), str(teacher.path))
        teacher_weights = WeightSource(
            BaseWeights(find_weights_directory(teacher), copy.deepcopy(model)), Full(), seed=initial.seed, init_std=0.0
        )
        teacher_weights.zero_row_by_name = always_zero_rows(
            model, AttentionLayout(arrangement.layout, arrangement.attention, {})
        )
        # No `head_prefixes`: a weight that the teacher's checkpoint lacks is an error, never drawn anew.
        teacher_weights.check_names_and_shapes(
            {name: tuple(p.shape) for name, p in model.named_parameters()}, head_prefixes=()
        )
        weights = teacher_weights
    return _frozen(model, weights)


def _frozen(model: Any, weights: WeightSource | StartingWeights) -> FrozenReference:
    """A model without gradients. Raises ConfigError if its head cannot compare distributions."""
    model.requires_grad_(False)
    check_head_computes_divergence(model, "objective.teacher.path")
    return FrozenReference(model, weights, block_class_names(model))


def _architecture(config: ModelConfig, settings: Any, arrangement: AttentionLayout) -> Any:
    """A frozen causal model on meta, without dropout, its head fused with the loss. Raises ConfigError for other models."""
    settings = copy.deepcopy(settings)
    attention = arrangement.attention
    # The student's kernel may not be right for the teacher.
    if attention == FLEX and Proofs(config, settings, half_on_gpu=True).why_not_one_row(FLEX):
        attention = NAME
    set_dropout(settings, 0.0)
    model_class = transformers_class(ModelKind.causal, settings)
    remedy = "take a causal model of the student's family"
    if getattr(settings, "is_encoder_decoder", False):  # transformers could build the decoder of some alone
        raise ConfigError(
            f"objective.teacher.path={config.path}: is an encoder-decoder ({settings.model_type}); {remedy}"
        )

    def build() -> Any:
        with meta_context():
            return model_class.from_config(settings, attn_implementation=attention, **from_config_options(config))

    # Build, once more if the checkpoint has an output head of its own.
    try:
        model = build()
    except ValueError as error:
        reason = str(error).partition("\nModel type should be one of")[0][:300]  # hundreds of names follow
        raise ConfigError(
            f"objective.teacher.path={config.path}: a {settings.model_type} model cannot be built as a teacher with "
            f"attention {attention}: {reason}; {remedy}"
        ) from error
    if untie_as_stored(config, settings, model):
        model = build()
    model.tie_weights()
    copy_arrangement = AttentionLayout(arrangement.layout, attention, {})
    model.forward_path = Proofs(config, settings, half_on_gpu=attention not in (NAME, "sdpa", "eager")).choose_path(
        copy_arrangement
    )
    if model.forward_path.fused:
        fuse_head(model, settings)
    return model


def check_vocabulary(student: Any, teacher: Any, path: str) -> None:
    """Raise ConfigError if two tokenizers do not give every token the same id."""
    student_ids = student.get_vocab()
    teacher_ids = teacher.get_vocab()
    tokens = student_ids.keys() | teacher_ids.keys()
    differing = sorted(token for token in tokens if student_ids.get(token) != teacher_ids.get(token))
    if not differing:
        return
    examples = []
    for token in differing[:SHOWN_TOKENS]:
        student_id = student_ids.get(token, "no token")
        teacher_id = teacher_ids.get(token, "no token")
        examples.append(f"{token!r} is {student_id} and {teacher_id}")
    raise ConfigError(
        f"objective.teacher.path={path}: its vocabulary is not the student's ({len(differing)} tokens differ: "
        f"{', '.join(examples)}); distributions can only be compared over one vocabulary: take a teacher of the same family, "
        "or train on texts that the teacher wrote with objective=sft"
    )
