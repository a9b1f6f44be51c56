"""The frozen model beside the trained one: which it is, how it is built on meta, and where its weights come from."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError
from strategies.parameters import meta_context
from trainer.data.config import Layout
from trainer.losses.fuse import install_loss_head
from trainer.model.architecture import from_config_options, set_dropout, transformers_class
from trainer.model.attention import VARLEN_ATTENTION
from trainer.model.config import ModelConfig, ModelKind, RopeConfig
from trainer.model.flex import FLEX_ATTENTION
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
    """The model settings of the teacher, which the student imitates; None if the objective has none.

    Its tokenizer and positions are those of its own files. The rest (attention, whether to download) is as for the trained model.
    """
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
    """Choose a layout of rows that both model and teacher can read.

    Returns (layout, note by setting if it is not the requested one). Padded rows if a test on a small copy of the teacher does
    not show that it keeps documents in one row apart. `teacher`: its settings; None without one. `half_on_gpu`: whether models
    compute in half precision on a GPU. Raises ConfigError if the settings ask for rows without padding.
    """
    if teacher is None or layout is Layout.padded:
        return layout, {}
    hf_config = load_model_config(teacher)
    kind = hf_config.model_type
    reason = Proofs(teacher, hf_config, half_on_gpu=half_on_gpu).why_documents_need_own_rows(VARLEN_ATTENTION)
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
    hf_config: Any,
    attention_layout: AttentionLayout,
    initial: WeightSource,
    merged_adapters: MergedAdapters | None,
    tokenizer: Any,
) -> FrozenReference:
    """Build the frozen model that the trained one is compared with: the teacher, or a second copy of the model as the run begins.

    It is on meta, without gradients; `weights` of the result says where its values come from.

    `hf_config`, `attention_layout`: those of the trained model, whose batches it reads.
    `initial`: where the trained model's weights come from, which a copy shares.
    `merged_adapters`: the adapter that the run continues from, added to the copy's weights; None without one.

    Raises ConfigError if a teacher has another vocabulary, or a head that cannot compare distributions.
    """
    teacher = teacher_model(config, objective)
    if teacher is None:
        model = _frozen_architecture(config, hf_config, attention_layout)
        return _frozen_reference(model, StartingWeights(initial, merged_adapters))
    model = _frozen_architecture(teacher, load_model_config(teacher), attention_layout)
    is_plan = not isinstance(initial, WeightSource)  # a plan simulates weights, and needs no files and no tokenizer
    if is_plan:
        return _frozen_reference(model, StartingWeights(initial, merged_adapters=None))
    check_vocabulary(tokenizer, load_tokenizer(teacher), str(teacher.path))
    return _frozen_reference(model, _teacher_weights(teacher, model, attention_layout, initial.seed))


def _teacher_weights(teacher: ModelConfig, model: Any, attention_layout: AttentionLayout, seed: int) -> WeightSource:
    """Describe where the teacher's weights come from: its own files. Raises ConfigError if they are not those of `model`.

    `model`: the teacher on meta.
    """
    base_weights = BaseWeights(find_weights_directory(teacher), copy.deepcopy(model))
    weights = WeightSource(base_weights, Full(), seed=seed, init_std=0.0)
    # With a layout of its own, since notes of the teacher's rows are not told to the user.
    unseen_notes: dict[str, str] = {}
    weights.zero_row_by_name = always_zero_rows(
        model, AttentionLayout(attention_layout.layout, attention_layout.attention, unseen_notes)
    )
    # No `head_prefixes`: a weight that the teacher's checkpoint lacks is an error, never drawn anew.
    shapes_by_name = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    weights.check_names_and_shapes(shapes_by_name, head_prefixes=())
    return weights


def _frozen_reference(model: Any, weights: WeightSource | StartingWeights) -> FrozenReference:
    """`model`, from now on without gradients, with its weights. Raises ConfigError if its head cannot compare distributions."""
    model.requires_grad_(False)
    check_head_computes_divergence(model, "objective.teacher.path")
    return FrozenReference(model, weights, block_class_names(model))


def _frozen_architecture(config: ModelConfig, hf_config: Any, attention_layout: AttentionLayout) -> Any:
    """Build a causal model on meta without dropout, for the teacher or the copy. Raises ConfigError for other kinds of models.

    Its head computes the loss itself (is fused) if a test found that right for the architecture. `attention_layout`: of the
    trained model; its kernel is taken unless it is FlexAttention and not right here. `hf_config` is not changed.
    """
    hf_config = copy.deepcopy(hf_config)
    attention = attention_layout.attention
    if attention == FLEX_ATTENTION:  # chosen for the trained model, and perhaps not right for the teacher
        on_gpu = Proofs(config, hf_config, half_on_gpu=True)
        if on_gpu.why_documents_need_own_rows(FLEX_ATTENTION):
            attention = VARLEN_ATTENTION
    set_dropout(hf_config, 0.0)
    model = _build_causal_on_meta(config, hf_config, attention)
    if untie_as_stored(config, hf_config, model):  # the checkpoint has an output head of its own: build again, untied
        model = _build_causal_on_meta(config, hf_config, attention)
    model.tie_weights()
    # A layout of its own: what the choice of a path notes down about a frozen model is not told to the user.
    layout_without_notes = AttentionLayout(attention_layout.layout, attention, notes={})
    half_on_gpu = attention not in (VARLEN_ATTENTION, "sdpa", "eager")  # other kernels run nowhere else
    model.forward_path = Proofs(config, hf_config, half_on_gpu=half_on_gpu).choose_path(layout_without_notes)
    if model.forward_path.fused:
        install_loss_head(model, hf_config)
    return model


def _build_causal_on_meta(config: ModelConfig, hf_config: Any, attention: str) -> Any:
    """Build the causal model of `hf_config` on meta. Raises ConfigError for what is no causal model, or cannot be built."""
    remedy = "take a causal model of the student's family"
    if getattr(hf_config, "is_encoder_decoder", False):  # transformers could build the decoder of some alone
        raise ConfigError(
            f"objective.teacher.path={config.path}: is an encoder-decoder ({hf_config.model_type}); {remedy}"
        )
    model_class = transformers_class(ModelKind.causal, hf_config)
    try:
        with meta_context():
            return model_class.from_config(hf_config, attn_implementation=attention, **from_config_options(config))
    except ValueError as error:
        reason = str(error).partition("\nModel type should be one of")[0][:300]  # hundreds of names follow
        raise ConfigError(
            f"objective.teacher.path={config.path}: a {hf_config.model_type} model cannot be built as a teacher with "
            f"attention {attention}: {reason}; {remedy}"
        ) from error


def check_vocabulary(student: Any, teacher: Any, path: str) -> None:
    """Raise ConfigError if student and teacher do not give every token the same id: distributions could not be compared then.

    `path`: of the teacher, for the message.
    """
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
