"""The model: its settings, tokenizer and architecture. Its weights are `trainer.model.weights`' matter."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError
from trainer.data.config import Layout
from trainer.heads.loss import fuse_head
from trainer.model import attention as attention_module
from trainer.model import encoder_decoder
from trainer.model.architecture import architecture, describe_head, grow_vocabulary
from trainer.model.layer_names import head_names, vocabulary_names
from trainer.model.quantisation import Quantisation, Scheme, quantise_layers
from trainer.model.weights import BaseWeights, tied_names
from trainer.objectives.base import ObjectiveConfig, ObjectiveName
from trainer.objectives.build import build_objective
from trainer.step import TrainStep
from trainer.tuning.base import Tuning, TuningConfig
from trainer.tuning.build import around_update, build_tuning, fold_adapters
from trainer.tuning.fast_lora import fuse_lora
from trainer.tuning.table import needs_own_rows

if TYPE_CHECKING:
    from trainer.tuning.folded import Folded


class Attention(StrEnum):
    """Attention kernel. `auto` takes FlashAttention where it is installed and usable, else the built-in varlen kernel."""

    auto = "auto"
    varlen = "varlen"
    flash_attention_2 = "flash_attention_2"
    sdpa = "sdpa"
    eager = "eager"


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Which pretrained model is tuned."""

    path: str | None = None
    """Directory of a Hugging Face model, or a hub id that is in the local cache (or downloaded with `model.download=true`)."""
    tokenizer: str | None = None
    """Directory or hub id of the tokenizer; default: `model.path`."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    download: bool = False
    """Allow fetching the model from the hub; off by default, so that a run never reaches for the network unasked."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; only for sources you trust."""
    attention: Attention = Attention.auto
    """Attention kernel: `auto`, `varlen`, `flash_attention_2`, `sdpa` or `eager`."""
    add_tokens: list[str] = field(default_factory=list)
    """New vocabulary entries; their embeddings start at the mean of the existing ones."""
    chat_template: str | None = None
    """File with a Jinja chat template that replaces the tokenizer's own."""
    dropout: float = 0.0
    """Dropout probability set on the model's own dropout layers, 0 to 1."""
    quantisation: Quantisation = Quantisation.none
    """Storage of the frozen base under adapters: `none`, `nf4` or `fp4` (4 bits, QLoRA) or `int8`; needs bitsandbytes."""
    double_quantisation: bool = True
    """Quantise the scales of `nf4` and `fp4` too: 4.13 instead of 4.5 bits an element."""
    adapters: list[str] = field(default_factory=list)
    """Directories of adapters folded into the base, in this order, as it is loaded; a new adapter then trains on top."""


@dataclass(slots=True)
class Built:
    """The architecture of a run, on the meta device, tuned but not sharded."""

    step_module: TrainStep
    tuning: Tuning
    layout: Layout
    attention: str
    new_token_ids: list[int]
    vocabulary: frozenset[str]
    """Base names of the parameters that have a row for each token."""
    base_prefix: str
    """Name under which the architecture holds its base model; checkpoints may omit it."""
    head_prefixes: tuple[str, ...]
    """Top-level names of a head that the checkpoint need not have (classification)."""
    config: Any
    """The transformers config of the model."""
    substitutions: dict[str, str]
    """What was chosen for the user, and why."""
    two_sides: encoder_decoder.EncoderDecoder | None = None
    """Set for encoder-decoder models trained as such."""
    scheme: Scheme | None = None
    """How the weights in `quantised` are stored."""
    quantised: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Shapes of the weights that are stored packed, by base name."""
    folded: Folded | None = None
    """Adapters that are folded into the base as it is loaded."""

    def base_weights(self, directory: Path) -> BaseWeights:
        """The values of the base as it is trained on, read from the model in `directory`."""
        return BaseWeights(
            directory,
            self.base_prefix,
            tied_names(self.step_module.model, self.tuning.base_name),
            folded=self.folded,
            scheme=self.scheme,
            quantised=self.quantised,
        )


def resolve_path(config: ModelConfig, value: str | None = None) -> str:
    """A local directory as an absolute path, or a hub id as it is."""
    text = value or config.path
    if text is None:
        raise ConfigError("model.path: not set; give a model directory or a hub id, as in model.path=models/smollm2")
    path = Path(text).expanduser()
    return str(path.resolve()) if path.is_dir() else text


def _hub_error(key: str, value: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{key}={value}: not a model directory here and not loadable from the local hub cache "
        f"({str(error).splitlines()[0][:160]}); give an existing directory, or set model.download=true to fetch it"
    )


def weights_directory(config: ModelConfig) -> Path:
    """The directory of the weights: `model.path` itself, or the hub's local snapshot (fetched with model.download)."""
    path = resolve_path(config)
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                path,
                revision=config.revision,
                local_files_only=not config.download,
                allow_patterns=["*.safetensors", "*.json", "tokenizer*", "*.txt", "*.model"],
            )
        )
    except Exception as error:  # the hub client has a dozen error types; all mean that there are no weights
        raise _hub_error("model.path", path, error) from error


def load_model_config(config: ModelConfig) -> Any:
    """The transformers config; raises ConfigError when the model cannot be found or needs remote code."""
    from transformers import AutoConfig

    path = resolve_path(config)
    try:
        return AutoConfig.from_pretrained(
            path,
            revision=config.revision,
            local_files_only=not config.download,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise _hub_error("model.path", path, error) from error


def load_tokenizer(config: ModelConfig) -> Any:
    """The fast tokenizer with added tokens and the chosen chat template; raises ConfigError where there is none."""
    from transformers import AutoTokenizer

    path = resolve_path(config, config.tokenizer)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            revision=config.revision,
            local_files_only=not config.download,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise _hub_error("model.tokenizer" if config.tokenizer else "model.path", path, error) from error
    if not tokenizer.is_fast:
        raise ConfigError(f"model.tokenizer={path}: has no fast tokenizer (tokenizer.json); convert it first")
    if config.chat_template is not None:
        tokenizer.chat_template = Path(config.chat_template).expanduser().read_text()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    known = set(tokenizer.get_vocab())
    if present := [t for t in config.add_tokens if t in known]:
        raise ConfigError(f"model.add_tokens={present}: already in the vocabulary; remove them from the list")
    tokenizer.add_tokens(list(config.add_tokens), special_tokens=True)
    return tokenizer


def resolve_layout(
    model: ModelConfig, layout: Layout, model_type: str, *, needs_padding: bool, half_on_gpu: bool
) -> tuple[Layout, str, dict[str, str]]:
    """(layout, transformers attention name, substitutions made).

    Raises ConfigError for a combination that would silently mix documents.
    """
    known = model_type in attention_module.PADDING_FREE
    notes: dict[str, str] = {}
    if layout is Layout.auto:
        wants_stock = model.attention in (Attention.sdpa, Attention.eager)
        layout = Layout.padding_free if known and not needs_padding and not wants_stock else Layout.padded
        if layout is Layout.padded and not needs_padding:
            reason = f"attention={model.attention}" if wants_stock else f"{model_type} is not proven padding-free"
            notes["data.layout"] = f"padded ({reason})"
    elif layout is Layout.padding_free and (needs_padding or not known):
        raise ConfigError(
            f"data.layout=padding_free: {model_type} with this objective and tuning is not proven to keep documents apart; "
            f"use data.layout=padded (proven: {', '.join(sorted(attention_module.PADDING_FREE))})"
        )
    if layout is Layout.padded:
        if model.attention is Attention.varlen:
            raise ConfigError(
                "model.attention=varlen: is for padding-free rows; use sdpa, eager or auto with padded ones"
            )
        return layout, "sdpa" if model.attention is Attention.auto else str(model.attention), notes
    if model.attention in (Attention.sdpa, Attention.eager):
        raise ConfigError(
            f"model.attention={model.attention} with data.layout=padding_free: would let documents see each other; use "
            "model.attention=varlen or data.layout=padded"
        )
    has_flash = half_on_gpu and find_spec("flash_attn") is not None
    if model.attention is Attention.flash_attention_2 and not has_flash:
        raise ConfigError(
            "model.attention=flash_attention_2: needs a CUDA device, precision=bf16 or fp16, and the package flash-attn "
            "(pip install 'shardtune[gpu]'); use model.attention=auto"
        )
    if has_flash and model.attention in (Attention.auto, Attention.flash_attention_2):
        return layout, "flash_attention_2", notes
    if model.attention is Attention.auto:
        notes["model.attention"] = "varlen (built in; FlashAttention needs a GPU, half precision and flash-attn)"
    return layout, attention_module.NAME, notes


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
    import transformers

    attention_module.register()
    model_config = copy.deepcopy(load_model_config(config))
    new_ids = list(range(len(tokenizer) - len(config.add_tokens), len(tokenizer)))
    grow_vocabulary(config, model_config, len(tokenizer), len(new_ids))
    head_labels = build_objective(objective_config).head_labels
    classification = head_labels is not None
    seq2seq = objective_config.name is ObjectiveName.seq2seq
    encoder_decoder.check(model_config.to_dict(), config.path, objective_config.name)
    padded = classification or seq2seq or needs_own_rows(tuning_config)
    layout, attention, notes = resolve_layout(
        config, layout, model_config.model_type, needs_padding=padded, half_on_gpu=half_on_gpu
    )
    if classification:
        describe_head(model_config, objective_config, head_labels or num_labels, tokenizer.pad_token_id)
        auto: Any = transformers.AutoModelForSequenceClassification
    else:
        auto = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    with context:
        model = architecture(auto, model_config, config, attention, objective_config)
    model.tie_weights()
    two_sides = encoder_decoder.finish(model, weights_directory(config)) if seq2seq else None
    if not classification:
        fuse_head(model, model_config)
    vocabulary, prefix = vocabulary_names(model), model.base_model_prefix
    heads = head_names(model) if classification else ()
    blocks = encoder_decoder.block_classes(model) if seq2seq else set(getattr(model, "_no_split_modules", None) or ())
    folded, head = fold_adapters(model, config.adapters), model.get_output_embeddings()
    tuning = build_tuning(tuning_config, new_tokens=bool(new_ids), new_heads=heads, tokenizer=tokenizer)
    model = tuning.apply(model)
    encoder_decoder.freeze_fixed(model)
    model.train()
    objective = build_objective(objective_config, tuning.reference if tuning.keeps_base else None)
    step = TrainStep(model, objective, blocks)
    step.around_update = around_update(tuning)
    built = Built(step, tuning, layout, attention, new_ids, vocabulary, prefix, heads, model_config, notes, two_sides)
    built.folded = folded
    _quantise(built, config, head)
    fuse_lora(step.model)
    return built


def _quantise(built: Built, config: ModelConfig, head: Any) -> None:
    """Store frozen layers packed, where asked for; after tuning, since peft sizes its adapters by ordinary layers."""
    built.scheme = scheme = Scheme.asked(config.quantisation, config.double_quantisation)
    if scheme is not None:
        built.quantised = quantise_layers(
            built.step_module.model, scheme, keep=head, heads=built.head_prefixes, base_name=built.tuning.base_name
        )
