"""Every tuning method in a small setting: our settings, and the plain peft config that must mean the same."""

from typing import Any

from trainer.tuning.base import LoraConfig, TuningConfig
from trainer.tuning.config import (
    Activation,
    AdaLoraConfig,
    AdaptionPromptConfig,
    BoftConfig,
    BottleneckConfig,
    EncoderKind,
    FreezeConfig,
    Ia3Config,
    LnConfig,
    LohaConfig,
    LokrConfig,
    OftConfig,
    PeftConfig,
    Placement,
    PrefixConfig,
    PromptConfig,
    PromptInit,
    PTuningConfig,
    VeraConfig,
)

FROZEN: dict[str, TuningConfig] = {
    "freeze last-1": FreezeConfig(layers="last-1"),
    "freeze modules": FreezeConfig(modules=r".*\.(mlp|DenseReluDense)"),
    "freeze norms": FreezeConfig(norm_only=True),
    "freeze embeddings": FreezeConfig(embeddings=True),
}
ADAPTERS: dict[str, tuple[TuningConfig, str, dict[str, Any]]] = {  # settings, peft's config class, its options
    "lora": (LoraConfig(rank=4), "LoraConfig", {"r": 4, "lora_alpha": 32}),
    "lora gaussian": (
        LoraConfig(rank=4, init="gaussian"),
        "LoraConfig",
        {"r": 4, "lora_alpha": 32, "init_lora_weights": "gaussian"},
    ),
    "lora pissa": (
        LoraConfig(rank=4, init="pissa"),
        "LoraConfig",
        {"r": 4, "lora_alpha": 32, "init_lora_weights": "pissa"},
    ),
    "lora pissa_niter_4": (
        LoraConfig(rank=4, init="pissa_niter_4"),
        "LoraConfig",
        {"r": 4, "lora_alpha": 32, "init_lora_weights": "pissa_niter_4"},
    ),
    "lora olora": (
        LoraConfig(rank=4, init="olora", rslora=True),
        "LoraConfig",
        {"r": 4, "lora_alpha": 32, "init_lora_weights": "olora", "use_rslora": True},
    ),
    "lora+": (LoraConfig(rank=4, lr_ratio=16.0), "LoraConfig", {"r": 4, "lora_alpha": 32}),
    "lora patterns": (
        LoraConfig(rank=4, rank_pattern={"q_proj": 8}, alpha_pattern={"q_proj": 4.0}),
        "LoraConfig",
        {"r": 4, "lora_alpha": 32, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 4}},
    ),
    "adalora": (
        AdaLoraConfig(init_rank=4, target_rank=2, alpha=512.0, delta_t=1),  # its start is small: a scale that shows
        "AdaLoraConfig",
        {"init_r": 4, "target_r": 2, "lora_alpha": 512, "deltaT": 1, "total_step": 2},
    ),
    "ia3": (Ia3Config(), "IA3Config", {"target_modules": None}),
    "vera": (VeraConfig(rank=16), "VeraConfig", {"r": 16}),
    "loha": (LohaConfig(rank=4), "LoHaConfig", {"r": 4, "alpha": 8}),
    "lokr": (LokrConfig(rank=4), "LoKrConfig", {"r": 4, "alpha": 8}),
    "oft": (OftConfig(block_size=8), "OFTConfig", {"oft_block_size": 8}),
    "boft": (BoftConfig(), "BOFTConfig", {}),
    "ln": (LnConfig(), "LNTuningConfig", {"target_modules": None}),
}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {  # of tuning=peft, by type: peft's config class and options
    "beft": ("BeftConfig", {}),
    "c3a": ("C3AConfig", {"block_size": 8}),
    "glora": ("GloraConfig", {}),
    "gralora": ("GraloraConfig", {"r": 8}),
    "hira": ("HiraConfig", {}),
    "hra": ("HRAConfig", {}),
    "miss": ("MissConfig", {"r": 8}),
    "peanut": ("PeanutConfig", {}),
    "road": ("RoadConfig", {"group_size": 8}),
    "waveft": ("WaveFTConfig", {"n_frequency": 50}),
}
for _type, (_class, _options) in OPTIONS.items():
    ADAPTERS[f"peft {_type}"] = PeftConfig(type=_type, options=dict(_options)), _class, dict(_options)
ADDED: dict[str, TuningConfig] = {  # parameters beside the base's layers, with loaders and forward passes of their own
    "prompt": PromptConfig(num_virtual_tokens=4),
    "prefix": PrefixConfig(num_virtual_tokens=4),
    "p_tuning mlp": PTuningConfig(num_virtual_tokens=4),
    "p_tuning lstm": PTuningConfig(num_virtual_tokens=4, encoder=EncoderKind.lstm, encoder_hidden_size=12),
    "prompt text": PromptConfig(num_virtual_tokens=4, init=PromptInit.text, init_text="What is it about?"),
    "adaption_prompt": AdaptionPromptConfig(adapter_len=4),
    "bottleneck pfeiffer": BottleneckConfig(size=8, placement=Placement.pfeiffer, activation=Activation.relu),
    "bottleneck": BottleneckConfig(size=8),
    "prefix projection": PrefixConfig(num_virtual_tokens=4, projection=True, encoder_hidden_size=16),
}
CASES: dict[str, TuningConfig] = {**FROZEN, **{name: case[0] for name, case in ADAPTERS.items()}, **ADDED}
