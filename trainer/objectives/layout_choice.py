"""Chooses for a causal model its attention kernel, the layout of documents, and the forward path."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from strategies.errors import ConfigError
from strategies.hardware import gpu_of_device
from strategies.parameters import meta_context
from trainer.data.config import Layout
from trainer.model import attention, experts, flex
from trainer.model.architecture import build_plain_model, modules_beside_text, text_model_config
from trainer.model.attention import VARLEN_ATTENTION
from trainer.model.config import Attention, ModelConfig, ModelKind
from trainer.model.flash import head_sizes, why_not_flash
from trainer.model.kernels import missing_kernels
from trainer.model.layout import KERNELS_BY_SETTING, AttentionLayout, KernelChoices, choose_attention_layout
from trainer.model.tied_heads import untie_as_stored
from trainer.objectives.causal import HF_PATH, ForwardPath
from trainer.objectives.forward_path import ProvenPaths, error_on_tokens_alone, proven_paths
from trainer.objectives.pooled_proof import classifier_packing_problem


class Proofs:
    """What is proven of one architecture by tests on a small copy of it: which forward passes are right, by attention kernel."""

    def __init__(self, config: ModelConfig, hf_config: Any, *, half_on_gpu: bool) -> None:
        """Make our attention kernels known to transformers. `hf_config`: its configuration of the model, which is not changed."""
        attention.register()
        flex.register()
        experts.register()
        self.config = config
        self.hf_config = hf_config
        self.half_on_gpu = half_on_gpu
        """Whether the model runs in half precision on a GPU, or would in a plan."""

    def paths(self, kernel: str) -> ProvenPaths:
        """What is proven with this kernel for documents in one row."""
        # A plan or a dry run may mean a GPU that is not here. The CPU then proves the same mathematics.
        on_gpu = self.half_on_gpu and torch.cuda.is_available()
        return proven_paths(self.hf_config, self.eager_model, kernel, on_gpu=on_gpu)

    def why_documents_need_own_rows(self, kernel: str) -> str:
        """Why several documents cannot lie in one row without padding with this kernel; empty if they can."""
        proven = self.paths(kernel)
        if proven.padding_free is not None:
            return ""
        return proven.reason or "it was not found right"

    def sequence_problem(self, attention_layout: AttentionLayout) -> str | None:
        """Why several ranks cannot share a row of this model; None if they can."""
        if attention_layout.layout is not Layout.padding_free:
            return attention_layout.sequence_problem
        return self.paths(attention_layout.attention).sequence_problem

    def eager_model(self) -> Any:
        """The model on meta, with dropout as the run has it, in eager attention."""
        with meta_context():
            model, _ = build_plain_model(
                ModelKind.causal, copy.deepcopy(self.hf_config), self.config, attention="eager", objective="sft"
            )
        return model

    def choose_path(self, attention_layout: AttentionLayout) -> ForwardPath:
        """Choose the fastest way to run this model that a test on a small copy found right.

        Adds notes, for example if it is a slow one. Cases, in order:
        - tokens see what follows them, or paths were tested and none was right for the layout: ConfigError.
        - no small copy could be run: ConfigError if the model needs more inputs than tokens, else transformers' own path.
        - else: the fastest path that was right. It is fused if the output head computes the loss itself, without keeping logits.
        """
        layout = attention_layout.layout
        notes = attention_layout.notes
        # Every proof covers padded rows too; that of the built-in kernel is the one that needs no package.
        kernel = attention_layout.attention if layout is Layout.padding_free else VARLEN_ATTENTION
        proven = self.paths(kernel)
        if not proven.causal:
            raise ConfigError(
                f"model.path={self.config.path}: tokens of this {self.hf_config.model_type} see what follows them, so that "
                f"predicting it would teach nothing; {' or '.join(_remedies_for_noncausal_model(self.hf_config))}"
            )
        # `tried`: whether a small copy could be run at all; if not, nothing is known.
        if proven.tried and proven.for_layout(layout) is None:
            raise ConfigError(
                f"model.path={self.config.path}: a {self.hf_config.model_type} cannot be trained here: on a small copy of it "
                f"{proven.reason}; take a model of another architecture (docs/models.md lists those that train)"
            )
        if not proven.tried:
            self._refuse_model_that_needs_more_than_tokens()
        # Such as routers that draw experts.
        if proven.random:
            notes["model"] = "draws something at random while it trains, whatever model.dropout says"
        path = proven.for_layout(layout)
        if path is None:  # nothing could be tried: take what transformers itself does with padded rows
            notes["model.head"] = f"the model's own forward pass, not proven on a copy ({proven.reason})"
            return HF_PATH
        if not path.fused:
            notes["model.head"] = "the model's own forward pass (its logits are more than a product)"
        return path

    def _refuse_model_that_needs_more_than_tokens(self) -> None:
        """Raise ConfigError for a model that cannot be given tokens and nothing else, such as one that needs images."""
        refusal = error_on_tokens_alone(self.eager_model())
        if refusal:
            raise ConfigError(
                f"model.path={self.config.path}: a {self.hf_config.model_type} cannot be trained on texts alone: plain "
                f"transformers says {refusal}; set what it lacks in its config.json, if it is that, or take a model of another "
                "architecture (docs/models.md lists those that train)"
            )


def _remedies_for_noncausal_model(hf_config: Any) -> list[str]:
    """What to do instead with a model whose tokens see what follows them, as texts for an error: ["take a causal model", ...]."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    alternatives = ["take a causal model"]
    if getattr(hf_config, "is_decoder", None) is False:
        alternatives.append("set is_decoder to true in its config.json")
    if type(hf_config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        alternatives.append("use objective=classification")
    return alternatives


def _kernel_choices(
    config: ModelConfig, hf_config: Any, build_eager: Callable[[], Any] | None, *, half_on_gpu: bool
) -> KernelChoices:
    """Find out which attention kernels beside the built-in one can run this model, and why not, for the choice of its layout.

    `build_eager`: builds a causal model on meta; None for other kinds of models, which use no FlexAttention.
    `half_on_gpu`: whether the model computes in half precision on a GPU, of this machine or of a plan.
    """
    gpu = gpu_of_device(torch.device("cuda")) if half_on_gpu and torch.cuda.is_available() else None
    flash_refusal = why_not_flash(hf_config, gpu, half_precision=half_on_gpu, dropout=config.dropout)
    if build_eager is None:
        return KernelChoices(flash_refusal, "it is for objectives over next tokens")
    if not half_on_gpu:  # FlexAttention needs half precision on a GPU, so the model need not be looked at
        return KernelChoices(flash_refusal, flex.FLEX_REQUIREMENTS_TEXT)
    model = build_eager()
    flex_refusal = flex.flex_refusal(model, head_sizes(hf_config), dropout=config.dropout)
    # Flex computes soft caps and sinks itself; the built-in kernel falls back on slow eager attention for them.
    prefers_flex = flex.needs_eager(model, text_model_config(hf_config))
    return KernelChoices(flash_refusal, flex_refusal, prefers_flex=prefers_flex)


def build_causal_model(
    config: ModelConfig,
    hf_config: Any,
    layout: Layout,
    *,
    needs_padding: bool,
    half_on_gpu: bool,
) -> tuple[Any, AttentionLayout]:
    """Choose layout, attention kernel and forward path of a causal model, and build it on meta; returns (the plain model, those).

    `hf_config`: transformers' configuration.
    `layout`: that of the settings.
    `needs_padding`: whether the tuning method needs a row for each document, and hidden states.
    `half_on_gpu`: whether the model computes in half precision on a GPU, of this machine or of a plan.

    Sets the model's attributes `forward_path` and `modules_beside_text`. Raises ConfigError.
    """
    # The layout of documents in rows, the kernel and the forward path.
    proofs = Proofs(config, hf_config, half_on_gpu=half_on_gpu)
    attention_layout = choose_attention_layout(
        config.attention,
        layout,
        hf_config.model_type,
        reason_for_own_rows=proofs.why_documents_need_own_rows,
        needs_padding=needs_padding,
        kernels=_kernel_choices(config, hf_config, proofs.eager_model, half_on_gpu=half_on_gpu),
    )
    if attention_layout.layout is Layout.padded and config.attention is Attention.auto:
        attention_layout = replace(attention_layout, attention=proofs.paths(VARLEN_ATTENTION).stock)
        if attention_layout.attention != "sdpa":
            attention_layout.notes["model.attention"] = (
                f"{attention_layout.attention} (SDPA is not there, or not right)"
            )
    path = proofs.choose_path(attention_layout)
    attention_layout = replace(attention_layout, sequence_problem=proofs.sequence_problem(attention_layout))
    if needs_padding and not path.fused:
        raise ConfigError(
            f"tuning: virtual tokens cannot be put before the inputs of a {hf_config.model_type}, whose logits are made by its "
            "own forward pass; use tuning=lora"
        )
    # The model. `kernel`: the one that it got, which may differ from `attention_layout.attention`.
    with meta_context():
        model, kernel = build_plain_model(ModelKind.causal, hf_config, config, attention_layout.attention, "sft")
    untied = untie_as_stored(config, hf_config, model)  # changes `hf_config`
    if untied:
        # The checkpoint has two matrices although the configuration ties them: build again, untied.
        attention_layout.notes["model.tied_head"] = untied
        with meta_context():
            model, kernel = build_plain_model(ModelKind.causal, hf_config, config, attention_layout.attention, "sft")
    if half_on_gpu:
        missing = missing_kernels(model)
        if missing:
            attention_layout.notes["model.kernels"] = missing
    # Read by `states_at_targets` and by the choice of adapter targets.
    model.forward_path = path
    model.modules_beside_text = modules_beside_text(model)
    if model.modules_beside_text:
        attention_layout.notes["tuning"] = f"frozen beside the text model: {', '.join(model.modules_beside_text)}"
    return model, replace(attention_layout, attention=kernel)


def build_padded_model(
    kind: ModelKind,
    config: ModelConfig,
    hf_config: Any,
    layout: Layout,
    objective: str,
    *,
    half_on_gpu: bool,
) -> tuple[Any, AttentionLayout]:
    """Build a classifier or an encoder-decoder model; returns (the model, the layout of its rows and its attention kernel).

    Each row is one document. Only a classifier with `layout` padding_free has rows of several documents, which ranks may share.

    `objective`: its name, for messages.
    `half_on_gpu`: whether the model computes in half precision on a GPU.

    Raises ConfigError.
    """
    if kind is ModelKind.classifier and layout is Layout.padding_free:
        return build_packed_classifier(config, hf_config, objective)
    attention_layout = choose_attention_layout(
        config.attention,
        layout,
        hf_config.model_type,
        reason_for_own_rows=lambda _kernel: "",  # never asked: with a document a row, documents cannot mix
        needs_padding=True,
        kernels=_kernel_choices(config, hf_config, None, half_on_gpu=half_on_gpu),
    )
    with meta_context():
        model, kernel = build_plain_model(kind, hf_config, config, attention_layout.attention, objective)
    if kernel != attention_layout.attention:
        attention_layout.notes["model.attention"] = f"{kernel} (this architecture has no {attention_layout.attention})"
    return model, replace(attention_layout, attention=kernel)


def why_causal_rows_cannot_be_shared(config: ModelConfig, hf_config: Any, *, half_on_gpu: bool) -> str | None:
    """Why ranks cannot share rows of a causal model (`parallel.sequence`); None if they can with one of the attention kernels.

    Each kernel is tested on a small copy of the model. They are that of `model.attention`, or for `auto` all that could run the
    model here, in half precision on a GPU if `half_on_gpu`. The reason is that of the first.
    """
    proofs = Proofs(config, hf_config, half_on_gpu=half_on_gpu)
    kernels = KERNELS_BY_SETTING.get(config.attention)
    if kernels is None:
        kernels = _kernel_choices(config, hf_config, proofs.eager_model, half_on_gpu=half_on_gpu).kernels_in_order()
    problems = []
    for kernel in kernels:
        problem = proofs.paths(kernel).sequence_problem
        if problem is None:
            return None
        problems.append(problem)
    return problems[0]


def why_classifier_rows_cannot_be_shared(config: ModelConfig, hf_config: Any, objective: str) -> str | None:
    """Why ranks cannot share rows of a classifier (`parallel.sequence`), as a test on a small copy shows; None if they can.

    `objective`: its name, for messages.
    """
    # Else transformers would not know our attention and experts by the names that the model is built with.
    attention.register()
    experts.register()

    def build_on_meta() -> Any:
        with meta_context():
            model, _ = build_plain_model(ModelKind.classifier, copy.deepcopy(hf_config), config, "eager", objective)
        return model

    if config.attention not in (Attention.auto, Attention.varlen):
        return f"a classifier has the built-in attention kernel alone, and model.attention={config.attention}"
    return classifier_packing_problem(hf_config, build_on_meta, VARLEN_ATTENTION)


def build_packed_classifier(config: ModelConfig, hf_config: Any, objective: str) -> tuple[Any, AttentionLayout]:
    """Build a classifier for rows of several documents, which ranks may share with `parallel.sequence`.

    Returns (the model on meta, the layout of its rows and its attention kernel). If a test on a small copy shows such rows to be
    wrong for it, the second value's `sequence_problem` says why.
    """
    problem = why_classifier_rows_cannot_be_shared(config, hf_config, objective)
    with meta_context():
        model, kernel = build_plain_model(ModelKind.classifier, hf_config, config, VARLEN_ATTENTION, objective)
    return model, AttentionLayout(Layout.padding_free, kernel, {}, sequence_problem=problem)
