"""What each tuning method can do, as data: read when a run is composed, and printed as docs/methods.md."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.tuning.base import TuningConfig
from trainer.tuning.settings import PeftConfig

SHARDED = ("fsdp2", "hsdp", "zero1", "zero2", "zero3")
PROPERTIES = {
    "checkpointing": "full activation checkpointing",
    "selective": "selective activation checkpointing",
    "padding_free": "padding-free rows and packing",
    "half": "bf16 and fp16",
}
"""What a method may be combined with, beside strategies. `half` is refused under the strategies that convert parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One row: what a method is and what it cannot be combined with."""

    title: str
    adapter: bool = True
    """Whether the export is an adapter beside an unchanged base, else a whole model."""
    reads_base: bool = False
    """Whether initial values depend on the base weights."""
    no_merge: str = ""
    """Why the adapter cannot be folded into the base; empty where it can."""
    refused: dict[str, str] = field(default_factory=dict)
    """Words of `PROPERTIES` that it does not work with, and why."""
    optimizers: dict[str, str] = field(default_factory=dict)
    """Optimizers that it is not trained with, and why; all others train it alike under every strategy that runs them."""


_IN_PLACE = {"selective": "its gradients then differ by up to 5e-3 from those without (measured)"}
_PUT_TOGETHER = {"selective": "its backward pass then asks under strategy=zero3 for what was not kept (measured)"}
_FLOAT_PROJECTION = {"half": "peft multiplies its float32 projection with half-precision activations"}

METHODS: dict[str, Method] = {
    "full": Method(title="every parameter", adapter=False),
    "freeze": Method(title="a part of the base: blocks, modules, biases, norms or embeddings", adapter=False),
    "lora": Method(title="low-rank update; rsLoRA, DoRA, LoRA+, PiSSA, OLoRA"),
    "ia3": Method(title="factors on keys, values and feed-forward inputs"),
    "vera": Method(title="vectors around one shared random projection", refused=_FLOAT_PROJECTION),
    "loha": Method(title="Hadamard product of low-rank updates"),
    "lokr": Method(title="Kronecker product update"),
    "oft": Method(title="block-wise rotation of inputs"),
    "boft": Method(title="rotation by butterfly factors"),
    "ln": Method(title="normalisation layers, saved as an adapter", reads_base=True),
}
"""The choices of `tuning=`; `peft` has a table of its own."""

TYPES: dict[str, Method] = {
    "beft": Method(title="bias of values", no_merge="a layer without a bias has nothing to fold it into"),
    "c3a": Method(title="circular convolution", refused=_IN_PLACE),
    "glora": Method(title="generalised LoRA on weights, biases and activations"),
    "gralora": Method(title="LoRA in blocks of the matrix", refused=_IN_PLACE),
    "hira": Method(title="low-rank factors on the weights themselves"),
    "hra": Method(title="Householder reflections"),
    "miss": Method(title="shards of one small matrix"),
    "peanut": Method(title="small networks over the weights", refused=_PUT_TOGETHER),
    "road": Method(title="rotations in two dimensions"),
    "waveft": Method(title="sparse update in the wavelet domain"),
}
"""The values of `tuning.type` under `tuning=peft` that are proven here."""

_VIRTUAL = "it adds virtual tokens, which need padded rows and shifted targets; it is not one of the adapters here"
_SHARED = "its layers share parameters, which sharding keeps in one layer only"
_REBUILDS = "it takes the base weights apart when it is added, before there are any"
NOT_HERE: dict[str, str] = {
    **dict.fromkeys(
        ("prompt_tuning", "multitask_prompt_tuning", "p_tuning", "prefix_tuning", "cpt", "cartridge"), _VIRTUAL
    ),
    "adaption_prompt": "it replaces whole attention modules, whose documents would not be kept apart",
    "adalora": "it moves ranks between layers by importance scores of whole gradients, which no strategy that shards them "
    "computes alike, and adds a penalty that is no sum over tokens",
    **dict.fromkeys(("vblora", "unilora", "tinylora", "lily"), _SHARED),
    **dict.fromkeys(("psoft", "osf", "frod"), _REBUILDS),
    "shira": "it chooses entries of the weights when it is added, before there are any",
    "pvera": "it draws noise in every forward pass, so that no two strategies take the same steps",
    "fourierft": "its transform rounds too coarsely: strategies drift apart by more than 1e-5 within five steps",
    "randlora": "peft stores its shared bases once for every layer",
    "delora": "its first gradients are zero, so that its steps could not be compared",
    "deft": "its start depends on values of the base that are not read here",
}
"""Types of peft that are refused, and why; any other type is refused as not proven."""


def method_of(config: TuningConfig) -> Method:
    """The row of a method whose settings were checked."""
    return TYPES[str(config.type)] if isinstance(config, PeftConfig) else METHODS[config.name]


def rewrites_base(init: str) -> bool:
    """Whether a start of LoRA takes its part off the base weight."""
    return init.startswith("pissa") or init == "olora"
