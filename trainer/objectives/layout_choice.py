"""Chooses for a causal model its attention kernel, the layout of documents, and the forward path."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from strategies.errors import ConfigError
from strategies.hardware import gpu_of_device
from strategies.parameters import meta_context
from trainer.data.config import Layout
from trainer.model import attention, experts, flex
from trainer.model.architecture import build_plain_model, modules_beside_text, text_model_config
from trainer.model.attention import NAME
from trainer.model.config import Attention, ModelConfig, ModelKind
from trainer.model.flash import head_sizes, why_not_flash
from trainer.model.kernels import missing_kernels
from trainer.model.layout import KERNELS_BY_SETTING, AttentionLayout, KernelChoices, choose_attention_layout
from trainer.model.tied_heads import untie_as_stored
from trainer.objectives.causal import STOCK_PATH, ForwardPath
from trainer.objectives.forward_path import ProvenPaths, error_on_tokens_alone, proven_paths
from trainer.objectives.pooled_proof import pooling_problem


class Proofs:
    """Proofs of the forward paths of one architecture, by attention kernel: cached on this host, or made when asked for."""

    def __init__(self, config: ModelConfig, settings: Any, *, half_on_gpu: bool) -> None:
        """`settings`: transformers' configuration of the model; it is not changed."""
        attention.register()
        flex.register()
        experts.register()
        self.config = config
        self.settings = settings
        self.half_on_gpu = half_on_gpu
        """Whether the model runs in half precision on a GPU, or would in a plan."""

    def paths(self, kernel: str) -> ProvenPaths:
        """What is proven with this kernel for documents in one row."""
        # A plan or a dry run may mean a GPU that is not here. The CPU then proves the same mathematics.
        on_gpu = self.half_on_gpu and torch.cuda.is_available()
        return proven_paths(self.settings, self.eager_model, kernel, on_gpu=on_gpu)

    def why_not_one_row(self, kernel: str) -> str:
        """Why documents cannot lie in one row with this kernel; empty if they can."""
        proven = self.paths(kernel)
        if proven.padding_free is not None:
            return ""
        return proven.reason or "it was not found right"

    def sequence_problem(self, arrangement: AttentionLayout) -> str | None:
        """Why several ranks cannot share a row of an arrangement; None if they can."""
        if arrangement.layout is not Layout.padding_free:
            return arrangement.sequence_problem
        return self.paths(arrangement.attention).sequence_problem

    def eager_model(self) -> Any:
        """The model on meta, with dropout as the run has it, in eager attention."""
        with meta_context():
            model, _ = build_plain_model(
                ModelKind.causal, copy.deepcopy(self.settings), self.config, attention="eager", objective="sft"
            )
        return model

    def choose_path(self, arrangement: AttentionLayout) -> ForwardPath:
        """The proven forward path of an arrangement. Adds notes to `arrangement.notes`, for example if it is not the fastest.

        Proofs run on a small copy of the model (`ProvenPaths`). Cases, in order:
        - tokens see what follows them, or paths were tried and none was right for the layout: ConfigError.
        - nothing could be tried: ConfigError if the model cannot be given tokens alone, else the stock path.
        - else: the fastest path that was right.
        """
        layout = arrangement.layout
        kernel = NAME  # padded rows are proven together with the built-in kernel
        if layout is Layout.padding_free:
            kernel = arrangement.attention
        proven = self.paths(kernel)
        if not proven.causal:
            raise ConfigError(
                f"model.path={self.config.path}: tokens of this {self.settings.model_type} see what follows them, so that "
                f"predicting it would teach nothing; {' or '.join(_remedies_for_noncausal_model(self.settings))}"
            )
        if proven.tried and proven.for_layout(layout) is None:
            raise ConfigError(
                f"model.path={self.config.path}: a {self.settings.model_type} cannot be trained here: on a small copy of it "
                f"{proven.reason}; take a model of another architecture (docs/models.md lists those that train)"
            )
        if not proven.tried:
            self._check_takes_tokens_alone()
        if proven.random:
            arrangement.notes["model"] = "draws something at random while it trains, whatever model.dropout says"
        path = proven.for_layout(layout)
        if path is None:  # nothing could be tried: take what transformers itself does with padded rows
            arrangement.notes["model.head"] = f"the model's own forward pass, not proven on a copy ({proven.reason})"
            return STOCK_PATH
        if not path.fused:
            arrangement.notes["model.head"] = "the model's own forward pass (its logits are more than a product)"
        return path

    def _check_takes_tokens_alone(self) -> None:
        """Raise ConfigError for a model that cannot be given tokens and nothing else, such as one that needs images."""
        refusal = error_on_tokens_alone(self.eager_model())
        if refusal:
            raise ConfigError(
                f"model.path={self.config.path}: a {self.settings.model_type} cannot be trained on texts alone: plain "
                f"transformers says {refusal}; set what it lacks in its config.json, if it is that, or take a model of another "
                "architecture (docs/models.md lists those that train)"
            )


def _remedies_for_noncausal_model(settings: Any) -> list[str]:
    """What to do instead with a model whose tokens see what follows them, as texts for an error: `take a causal model`."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    alternatives = ["take a causal model"]
    if getattr(settings, "is_decoder", None) is False:
        alternatives.append("set is_decoder to true in its config.json")
    if type(settings) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        alternatives.append("use objective=classification")
    return alternatives


def _kernel_choices(
    config: ModelConfig, settings: Any, build_eager: Callable[[], Any] | None, *, half_on_gpu: bool
) -> KernelChoices:
    """Why FlashAttention and FlexAttention cannot run this model, each None if it can; and which of them is to be tried first.

    Asked for this machine, or for the GPU that a plan means. `settings`: transformers' configuration. `build_eager` builds a
    causal model on meta; None for other kinds of models, which use no FlexAttention.
    """
    gpu = gpu_of_device(torch.device("cuda")) if half_on_gpu and torch.cuda.is_available() else None
    flash_refusal = why_not_flash(settings, gpu, half=half_on_gpu, dropout=config.dropout)
    if build_eager is None:
        return KernelChoices(flash_refusal, "it is for objectives over next tokens")
    if not half_on_gpu:  # FlexAttention needs half precision on a GPU, so the model need not be looked at
        return KernelChoices(flash_refusal, flex.REQUIREMENTS)
    model = build_eager()
    flex_refusal = flex.flex_refusal(model, head_sizes(settings), dropout=config.dropout)
    return KernelChoices(flash_refusal, flex_refusal, prefers_flex=flex.needs_eager(model, text_model_config(settings)))


def build_causal_model(
    config: ModelConfig,
    settings: Any,
    layout: Layout,
    *,
    needs_padding: bool,
    half_on_gpu: bool,
    context: AbstractContextManager[None],
) -> tuple[Any, AttentionLayout]:
    """Choose layout, attention kernel and forward path of a causal model, and build it; returns (the plain model, those).

    The model is built within `context`, which puts it on meta. Sets its attributes `forward_path` and `modules_beside_text`.
    `settings`: transformers' configuration. `layout`: that of the settings. `needs_padding`: the tuning method needs a row for
    each document, and hidden states. Raises ConfigError.
    """
    # The layout of documents in rows, the kernel and the forward path.
    proofs = Proofs(config, settings, half_on_gpu=half_on_gpu)
    arrangement = choose_attention_layout(
        config,
        layout,
        settings.model_type,
        unproven=proofs.why_not_one_row,
        needs_padding=needs_padding,
        kernels=_kernel_choices(config, settings, proofs.eager_model, half_on_gpu=half_on_gpu),
    )
    if arrangement.layout is Layout.padded and config.attention is Attention.auto:
        arrangement = replace(arrangement, attention=proofs.paths(NAME).stock)
        if arrangement.attention != "sdpa":
            arrangement.notes["model.attention"] = f"{arrangement.attention} (SDPA is not there, or not right)"
    path = proofs.choose_path(arrangement)
    arrangement = replace(arrangement, sequence_problem=proofs.sequence_problem(arrangement))
    if needs_padding and not path.fused:
        raise ConfigError(
            f"tuning: virtual tokens cannot be put before the inputs of a {settings.model_type}, whose logits are made by its "
            "own forward pass; use tuning=lora"
        )
    # The model. `kernel`: the one that it got, which may differ from the arrangement's.
    with context:
        model, kernel = build_plain_model(ModelKind.causal, settings, config, arrangement.attention, "sft")
    untied = untie_as_stored(config, settings, model)  # changes `settings`
    if untied:
        # The checkpoint has two matrices although the configuration ties them: build again, untied.
        arrangement.notes["model.tied_head"] = untied
        with meta_context():
            model, kernel = build_plain_model(ModelKind.causal, settings, config, arrangement.attention, "sft")
    if half_on_gpu:
        missing = missing_kernels(model)
        if missing:
            arrangement.notes["model.kernels"] = missing
    # Read by `supervised_rows` and by the choice of adapter targets.
    model.forward_path = path
    model.modules_beside_text = modules_beside_text(model)
    if model.modules_beside_text:
        arrangement.notes["tuning"] = f"frozen beside the text model: {', '.join(model.modules_beside_text)}"
    return model, replace(arrangement, attention=kernel)


def build_padded_model(
    kind: ModelKind,
    config: ModelConfig,
    settings: Any,
    layout: Layout,
    context: AbstractContextManager[None],
    objective: str,
    *,
    half_on_gpu: bool,
) -> tuple[Any, AttentionLayout]:
    """Build a classifier or an encoder-decoder model; returns (the model, the layout of its rows and its attention kernel).

    Each row is one document. Only a classifier with `layout` padding_free has rows of several documents
    (`build_pooled_model`), which ranks may share. The model is built within `context`, which puts it on meta. `settings`:
    transformers' configuration. Raises ConfigError.
    """
    if kind is ModelKind.classifier and layout is Layout.padding_free:
        return build_pooled_model(config, settings, context, objective)
    arrangement = choose_attention_layout(
        config,
        layout,
        settings.model_type,
        unproven=lambda _: "",
        needs_padding=True,
        kernels=_kernel_choices(config, settings, None, half_on_gpu=half_on_gpu),
    )
    with context:
        model, kernel = build_plain_model(kind, settings, config, arrangement.attention, objective)
    if kernel != arrangement.attention:
        arrangement.notes["model.attention"] = f"{kernel} (this architecture has no {arrangement.attention})"
    return model, replace(arrangement, attention=kernel)


def why_rows_cannot_be_shared(config: ModelConfig, settings: Any, *, half_on_gpu: bool) -> str | None:
    """Why ranks cannot share rows of a causal model (`parallel.sequence`); None if they can with one of the attention kernels.

    The kernels are that of `model.attention`, or for `auto` all that could run the model here; the reason is that of the first.
    `settings`: transformers' configuration of the model.
    """
    proofs = Proofs(config, settings, half_on_gpu=half_on_gpu)
    kernels = KERNELS_BY_SETTING.get(config.attention)
    if kernels is None:
        kernels = _kernel_choices(config, settings, proofs.eager_model, half_on_gpu=half_on_gpu).in_order()
    problems = []
    for kernel in kernels:
        problem = proofs.paths(kernel).sequence_problem
        if problem is None:
            return None
        problems.append(problem)
    return problems[0]


def why_pooled_rows_cannot_be_shared(config: ModelConfig, settings: Any, objective: str) -> str | None:
    """Why ranks cannot share rows of a classifier (`parallel.sequence`); None if they can.

    `settings`: transformers' configuration of the model.
    """
    attention.register()
    experts.register()

    def build() -> Any:
        with meta_context():
            model, _ = build_plain_model(ModelKind.classifier, copy.deepcopy(settings), config, "eager", objective)
        return model

    if config.attention not in (Attention.auto, Attention.varlen):
        return f"a classifier has the built-in attention kernel alone, and model.attention={config.attention}"
    return pooling_problem(settings, build, NAME)


def build_pooled_model(
    config: ModelConfig, settings: Any, context: AbstractContextManager[None], objective: str
) -> tuple[Any, AttentionLayout]:
    """Build a classifier for rows of several documents; returns (the model, the layout of its rows and its attention kernel).

    For `parallel.sequence`, with which ranks share the rows. The model is built within `context`, which puts it on meta.
    `settings`: transformers' configuration. If the architecture is not proven for such rows, the second value's
    `sequence_problem` says why.
    """
    problem = why_pooled_rows_cannot_be_shared(config, settings, objective)
    with context:
        model, kernel = build_plain_model(ModelKind.classifier, settings, config, NAME, objective)
    return model, AttentionLayout(Layout.padding_free, kernel, {}, sequence_problem=problem)
