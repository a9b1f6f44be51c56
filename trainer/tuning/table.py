"""What each tuning method can do, as data: read when a run is composed, and printed in docs/methods.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trainer.tuning.base import TuningConfig
from trainer.tuning.config import PeftConfig

SHARDED = ("fsdp2", "hsdp", "zero1", "zero2", "zero3")
"""Strategies whose engines split parameters, gradients or optimizer state, and convert parameters to half precision."""
PROPERTIES = {
    "checkpointing": "full activation checkpointing",
    "selective": "selective activation checkpointing",
    "padding_free": "padding-free rows and packing",
    "half": "bf16 and fp16",
    "quantised": "a quantised base model",
    "sequence": "sequence parallelism (`parallel.sequence`)",
    "experts": "expert parallelism (`parallel.experts`)",
}
"""What a method may be combined with, beside strategies. `half` is refused under the strategies that convert parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningMethod:
    """One row of the table: what a method is, and what it cannot be combined with. A reason is empty if it can."""

    title: str
    adapter: bool = True
    """Whether the export is an adapter beside an unchanged base, else a whole model."""
    reads_base: bool = False
    """Whether initial values depend on the base weights."""
    merge_refusal: str = ""
    """Why the adapter cannot be merged into the base; empty where it can."""
    new_head_refusal: str = ""
    """Why it cannot train and keep a new head (classification, reward models); empty where it can."""
    new_tokens_refusal: str = ""
    """Why it cannot train the embeddings of new vocabulary; empty where it can, or where peft decides by the model."""
    seq2seq_refusal: str = ""
    """Why it cannot train an encoder-decoder model; empty where it can."""
    refusal_by_property: dict[str, str] = field(default_factory=dict)
    """Keys of `PROPERTIES` that it does not work with, and why."""
    refusal_by_strategy: dict[str, str] = field(default_factory=dict)
    """Strategies that it does not work under, and why."""
    continuation_refusal: str = ""
    """Why training cannot continue from its files, nor merge them into a base; empty if it can."""
    refusal_by_optimizer: dict[str, str] = field(default_factory=dict)
    """Optimizers that it is not trained with, and why; all others train it alike under every strategy that runs them."""


_SELECTIVE_REFUSAL = {"selective": "its gradients then differ by up to 5e-3 from those without (measured)"}
_NO_PLACE_FOR_EMBEDDINGS_REASON = "the new embeddings must be trained too, and its file format cannot store them"
_NO_PREFIX_HEAD_REASON = "peft 0.21 cannot run a prefix in the classifiers of transformers 5.24 (measured)"
_CAUSAL_ONLY_REASON = "it is made for models with one stack of layers, and an encoder-decoder model has two"
_VIRTUAL_TOKEN_REFUSALS: dict[str, Any] = {
    "seq2seq_refusal": _CAUSAL_ONLY_REASON,
    "merge_refusal": "virtual tokens are inputs, not weights of the base model",
    "new_tokens_refusal": _NO_PLACE_FOR_EMBEDDINGS_REASON,
    "refusal_by_property": {
        "padding_free": "virtual tokens come before a document, so each document needs a row of its own",
        "sequence": "each document has a padded row of its own, and padded rows cannot be split over ranks",
    },
}
_TRAINED_BASE_REFUSAL = {
    "quantised": "it trains the base weights, and rounding to 4 or 8 bits would cancel small steps"
}
_READ_WEIGHT_REFUSAL = {"quantised": "peft reads the base weight, or its shape, in every forward pass"}
_WHOLE_GRADIENTS_REASON = (
    "it compares the importance of whole weights and gradients, and these strategies shard weights or gradients"
)
_FLOAT_PROJECTION_REFUSAL = {"half": "peft multiplies a float32 projection with half-precision activations"}

TUNING_METHODS: dict[str, TuningMethod] = {
    "full": TuningMethod(title="every parameter", adapter=False, refusal_by_property=_TRAINED_BASE_REFUSAL),
    "freeze": TuningMethod(
        title="a part of the base model: blocks, modules, biases, norms or embeddings",
        adapter=False,
        refusal_by_property=_TRAINED_BASE_REFUSAL,
    ),
    "lora": TuningMethod(title="low-rank update; rsLoRA, DoRA, LoRA+, PiSSA, OLoRA"),
    "adalora": TuningMethod(
        title="low-rank update that gives more rank to important layers (AdaLoRA)",
        refusal_by_strategy=dict.fromkeys(SHARDED, _WHOLE_GRADIENTS_REASON),
        continuation_refusal="after training, each of its matrices has a different rank",
        refusal_by_property=_SELECTIVE_REFUSAL,
        refusal_by_optimizer={
            "schedule_free": "ranks are removed from the trained weights, but the average of the weights would still contain them"
        },
    ),
    "ia3": TuningMethod(title="scaling factors on keys, values and feed-forward inputs"),
    "vera": TuningMethod(
        title="scaling vectors around one shared random projection", refusal_by_property=_FLOAT_PROJECTION_REFUSAL
    ),
    "loha": TuningMethod(title="Hadamard product of low-rank updates", refusal_by_property=_READ_WEIGHT_REFUSAL),
    "lokr": TuningMethod(title="Kronecker product update", refusal_by_property=_READ_WEIGHT_REFUSAL),
    "oft": TuningMethod(title="block-wise rotation of inputs"),
    "boft": TuningMethod(title="rotation by butterfly factors"),
    "ln": TuningMethod(title="normalisation layers, saved as an adapter", reads_base=True),
    "prefix": TuningMethod(
        title="trained keys and values in front of every layer's",
        new_head_refusal=_NO_PREFIX_HEAD_REASON,
        **_VIRTUAL_TOKEN_REFUSALS,
    ),
    "prompt": TuningMethod(title="trained embeddings in front of every document's", **_VIRTUAL_TOKEN_REFUSALS),
    "p_tuning": TuningMethod(title="embeddings computed by a small network", **_VIRTUAL_TOKEN_REFUSALS),
    "adaption_prompt": TuningMethod(
        title="gated attention to trained tokens (LLaMA-Adapter)",
        merge_refusal="its tokens and gates do not correspond to a weight of the base model",
        new_head_refusal="peft's file format for it cannot store a classification head",
        seq2seq_refusal=_CAUSAL_ONLY_REASON,
        new_tokens_refusal=_NO_PLACE_FOR_EMBEDDINGS_REASON,
        refusal_by_property={
            "sequence": "peft attends to the trained tokens next to the model's attention; not tested with split rows",
            "experts": "the architectures that peft supports for it have no experts",
        },
    ),
    "bottleneck": TuningMethod(
        title="small networks after attention and feed-forward parts",
        merge_refusal="a nonlinear network cannot be merged into linear layers",
        seq2seq_refusal=_CAUSAL_ONLY_REASON,
        new_tokens_refusal=_NO_PLACE_FOR_EMBEDDINGS_REASON,
    ),
}
"""The choices of `tuning=`; `peft` has a table of its own."""

PEFT_METHODS: dict[str, TuningMethod] = {
    "beft": TuningMethod(
        title="a bias on attention values",
        merge_refusal="it trains a bias, and a layer without a bias has nothing to merge it into",
    ),
    "c3a": TuningMethod(title="circular convolution", refusal_by_property=_SELECTIVE_REFUSAL),
    "glora": TuningMethod(
        title="generalised LoRA on weights, biases and activations", refusal_by_property=_READ_WEIGHT_REFUSAL
    ),
    "gralora": TuningMethod(title="LoRA in blocks of the matrix", refusal_by_property=_SELECTIVE_REFUSAL),
    "hira": TuningMethod(title="low-rank factors on the weights themselves", refusal_by_property=_READ_WEIGHT_REFUSAL),
    "hra": TuningMethod(title="Householder reflections", refusal_by_property=_READ_WEIGHT_REFUSAL),
    "miss": TuningMethod(title="shards of one small matrix"),
    "peanut": TuningMethod(title="small networks over the weights", refusal_by_property=_READ_WEIGHT_REFUSAL),
    "road": TuningMethod(title="rotations in two dimensions"),
    "waveft": TuningMethod(title="sparse update in the wavelet domain"),
}
"""The values of `tuning.type` under `tuning=peft` that are proven here."""

_VIRTUAL_REASON = "shardtune does not support its kind of virtual tokens; use tuning=prompt, p_tuning or prefix"
_SHARED_PARAMETERS_REASON = "its layers share parameters, and sharding would keep them in one layer only"
_TAKES_BASE_APART_REASON = "it decomposes the base weights when it is added, before they are loaded"
UNSUPPORTED_TYPES: dict[str, str] = {
    **dict.fromkeys(("multitask_prompt_tuning", "cpt", "cartridge"), _VIRTUAL_REASON),
    **dict.fromkeys(("vblora", "unilora", "tinylora", "lily"), _SHARED_PARAMETERS_REASON),
    **dict.fromkeys(("psoft", "osf", "frod"), _TAKES_BASE_APART_REASON),
    "shira": "it chooses entries of the weights when it is added, before they are loaded",
    "pvera": "it adds random noise in every forward pass, so strategies would compute different training steps",
    "fourierft": "its transform is not precise enough: strategies differ by more than 1e-5 after five steps",
    "randlora": "peft stores its shared matrices again for every layer",
    "delora": "its first gradients are zero, so its training steps could not be compared",
    "deft": "its initial values depend on base weights that shardtune does not read at this point",
}
"""Types of peft that are refused, and why; any other type is refused as not proven."""


def method_of(config: TuningConfig) -> TuningMethod:
    """The table's row of the method that checked settings name."""
    if isinstance(config, PeftConfig):
        return PEFT_METHODS[str(config.type)]
    return TUNING_METHODS[config.name]


def rewrites_base(init: str) -> bool:
    """Whether a `tuning.init` of LoRA trains a part split off each base weight, so that the base changes."""
    return init.startswith("pissa") or init == "olora"


def needs_padded_rows(config: TuningConfig) -> bool:
    """Whether a method needs a padded row for each document, so that packing and padding-free rows are refused."""
    return "padding_free" in method_of(config).refusal_by_property
